// What a lookup at a point is: taps, weights, products over the channels of a group; see lookups.cpp for the letters.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>


extern "C" {
struct Table {
    const float* values;  // [rows, C]
    float* gradient;      // [rows, C], or null
    int32_t axes[2];      // the fastest first; the second is -1 for a line
};

struct Group {
    Table tables[3];
    int64_t channels;  // C, the same for all tables of the group
    int64_t offset;    // of its first channel among the products of all groups
};
}

namespace {

// Wide is what the CPU holds in one register: compilers take wider vectors apart through memory, five times slower.
#if defined(__AVX512F__)
constexpr int WIDE = 16;
#else
constexpr int WIDE = 8;
#endif
typedef float Wide __attribute__((vector_size(4 * WIDE)));
typedef float V4 __attribute__((vector_size(16)));

// By memcpy, which compilers turn into one unaligned move: channels begin anywhere.
template <class V>
inline V load(const float* from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
}

template <class V>
inline void store(float* to, V value) {
    std::memcpy(to, &value, sizeof(V));
}

template <class V>
inline void add(float* to, V value) {
    store(to, load<V>(to) + value);
}

// body(V{}, c) for all channels, as many at once as V holds.
template <class Body>
inline void over_channels(int64_t channels, Body body) {
    int64_t c = 0;
    for (; c + WIDE <= channels; c += WIDE) body(Wide{}, c);
    for (; c + 4 <= channels; c += 4) body(V4{}, c);
    for (; c < channels; ++c) body(float{}, c);
}

struct Sum {
    Wide wide{};
    V4 quad{};
    float single = 0;
    void operator+=(Wide v) { wide += v; }
    void operator+=(V4 v) { quad += v; }
    void operator+=(float v) { single += v; }
    // In halves: a sum one by one would wait for each addition.
    float total() const {
        V4 quarters[WIDE / 4];
        std::memcpy(quarters, &wide, sizeof(wide));
        V4 four = quad;
        for (int i = 0; i < WIDE / 4; i += 2) four += quarters[i] + quarters[i + 1];
        return (four[0] + four[1]) + (four[2] + four[3]) + single;
    }
};

// The two grid points around a coordinate. One outside has share 0 and index 0.
struct Axis {
    int64_t index[2];
    float share[2], slope[2];  // slope: d share / d coordinate
};

inline Axis along(float coordinate, int32_t size) {
    const float position = ((coordinate + 1) / 2) * (size - 1);
    const float lower = std::floor(position), upper_share = position - lower, slope = 0.5f * (size - 1);
    const bool low_in = lower >= 0 && lower < size, high_in = lower >= -1 && lower < size - 1;  // false for NaN as well
    const int32_t index = low_in || high_in ? static_cast<int32_t>(lower) : 0;
    Axis axis;
    axis.index[0] = low_in ? index : 0;
    axis.index[1] = high_in ? index + 1 : 0;
    axis.share[0] = low_in ? 1 - upper_share : 0;
    axis.share[1] = high_in ? upper_share : 0;
    axis.slope[0] = low_in ? -slope : 0;
    axis.slope[1] = high_in ? slope : 0;
    return axis;
}

struct Point {
    Axis axes[3];
    Point(const float* xyz, const int32_t* grid) {
        for (int i = 0; i < 3; ++i) axes[i] = along(xyz[i], grid[i]);
    }
};

template <int N>
struct Taps {
    int64_t row[N];  // where its channels begin
    float weight[N];
};

inline Taps<2> line_taps(const Table& table, const Point& point, int64_t channels) {
    const Axis& w = point.axes[table.axes[0]];
    return {{w.index[0] * channels, w.index[1] * channels}, {w.share[0], w.share[1]}};
}

inline Taps<4> plane_taps(const Table& table, const Point& point, const int32_t* grid, int64_t channels) {
    const Axis &u = point.axes[table.axes[0]], &v = point.axes[table.axes[1]];
    const int64_t width = grid[table.axes[0]];
    Taps<4> taps;
    for (int j = 0; j < 2; ++j)
        for (int i = 0; i < 2; ++i) {
            taps.row[2 * j + i] = (v.index[j] * width + u.index[i]) * channels;
            taps.weight[2 * j + i] = v.share[j] * u.share[i];
        }
    return taps;
}

template <class V, int N>
inline V value_at(const Table& table, const Taps<N>& taps, int64_t c) {
    V sum = taps.weight[0] * load<V>(table.values + taps.row[0] + c);
    for (int i = 1; i < N; ++i) sum += taps.weight[i] * load<V>(table.values + taps.row[i] + c);
    return sum;
}

// use(V product, c) for all channels of a group's product at a point.
template <class Use>
inline void product_of(const Group& g, const Point& point, const int32_t* grid, Use use) {
    const auto last = line_taps(g.tables[1], point, g.channels);
    if (g.tables[0].axes[1] >= 0) {
        const auto plane = plane_taps(g.tables[0], point, grid, g.channels);
        over_channels(g.channels, [&](auto type, int64_t c) {
            using V = decltype(type);
            use(value_at<V>(g.tables[0], plane, c) * value_at<V>(g.tables[1], last, c), c);
        });
    } else {
        const auto a = line_taps(g.tables[0], point, g.channels), b = line_taps(g.tables[2], point, g.channels);
        over_channels(g.channels, [&](auto type, int64_t c) {
            using V = decltype(type);
            use(value_at<V>(g.tables[0], a, c) * value_at<V>(g.tables[1], last, c) * value_at<V>(g.tables[2], b, c), c);
        });
    }
}

inline float summed_product(const Group* groups, int32_t n_groups, const Point& point, const int32_t* grid) {
    Sum sum;
    for (int g = 0; g < n_groups; ++g) product_of(groups[g], point, grid, [&](auto product, int64_t) { sum += product; });
    return sum.total();
}

// The products of all groups side by side, into out [width].
inline void all_products(const Group* groups, int32_t n_groups, const Point& point, const int32_t* grid, float* out) {
    for (int g = 0; g < n_groups; ++g) {
        float* row = out + groups[g].offset;
        product_of(groups[g], point, grid, [&](auto product, int64_t c) { store(row + c, product); });
    }
}

}  // namespace
