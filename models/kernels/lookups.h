// What a lookup at a point is: taps, weights, products over the channels of a group; see lookups.cpp for the letters.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

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

typedef float V4 __attribute__((vector_size(16)));

template <class V>
inline void add(float* to, V value) {
    store(to, load<V>(to) + value);
}

// body(V{}, c) for all channels, as many at once as V holds.
template <class Channels, class Body>
inline void over_channels(Channels channels, Body body) {
    int64_t c = 0;
    for (; c + WIDE <= channels; c += WIDE) body(Wide{}, c);
    for (; c + 4 <= channels; c += 4) body(V4{}, c);
    for (; c < channels; ++c) body(float{}, c);
}

// body(channels) with a number that the compiler knows, for the usual ones: loops over channels are unrolled then.
template <class Body>
inline void with_channels(int64_t channels, const Body& body) {
    if (channels == 16) {
        body(std::integral_constant<int64_t, 16>{});
    } else if (channels == 48) {
        body(std::integral_constant<int64_t, 48>{});
    } else {
        body(channels);
    }
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
    int64_t index(int axis, int i) const { return axes[axis].index[i]; }
    float share(int axis, int i) const { return axes[axis].share[i]; }
};

constexpr int64_t AHEAD = 4;  // points

// The same of up to SIZE points, side by side. Written with vectors: of `along` the compiler would make stores under a
// mask, which some CPUs take one by one.
struct Block {
    static constexpr int64_t SIZE = 256;
    int32_t indices[3][2][SIZE];
    float shares[3][2][SIZE];

    void fill(const float* xyz, int64_t n, const int32_t* grid) {
        for (int axis = 0; axis < 3; ++axis) fill(axis, xyz, n, grid[axis]);
    }
    void fill(int axis, const float* xyz, int64_t n, int32_t points) {
        const float size = static_cast<float>(points), last = static_cast<float>(points - 1);
        float coordinates[SIZE];
        for (int64_t k = 0; k < n; ++k) coordinates[k] = xyz[3 * k + axis];
        for (int64_t k = n; k % WIDE != 0; ++k) coordinates[k] = 0;
        for (int64_t k = 0; k < n; k += WIDE) {
            const Wide position = ((load<Wide>(coordinates + k) + 1) / 2) * last;
            // Of the lower point and of the upper one; false for NaN as well.
            const WideBits low_in = (position >= 0) & (position < size);
            const WideBits high_in = (position >= -1) & (position < last);
            const Wide inside = where(low_in | high_in, position);
            const WideBits lower = floor_of(inside);
            const Wide upper_share = inside - __builtin_convertvector(lower, Wide);
            store(indices[axis][0] + k, lower & low_in);
            store(indices[axis][1] + k, (lower + 1) & high_in);
            store(shares[axis][0] + k, where(low_in, 1 - upper_share));
            store(shares[axis][1] + k, where(high_in, upper_share));
        }
    }
};

template <int N>
struct Taps {
    int64_t row[N];  // where its channels begin
    float weight[N];
};

inline Taps<2> line_taps(const Table& table, const Point& at, int64_t channels) {
    const int w = table.axes[0];
    return {{at.index(w, 0) * channels, at.index(w, 1) * channels}, {at.share(w, 0), at.share(w, 1)}};
}

inline Taps<4> plane_taps(const Table& table, const Point& at, const int32_t* grid, int64_t channels) {
    const int u = table.axes[0], v = table.axes[1];
    Taps<4> taps;
    for (int j = 0; j < 2; ++j)
        for (int i = 0; i < 2; ++i) {
            taps.row[2 * j + i] = (at.index(v, j) * grid[u] + at.index(u, i)) * channels;
            taps.weight[2 * j + i] = at.share(v, j) * at.share(u, i);
        }
    return taps;
}

// The taps of a block's points 0..n-1 in a table: the numbers of the rows and their weights.
template <int N>
struct BlockTaps {
    int32_t rows[N][Block::SIZE];
    float weights[N][Block::SIZE];

    BlockTaps(const Table& table, const Block& block, int64_t n, const int32_t* grid) {
        const int u = table.axes[0], v = table.axes[1];
        for (int tap = 0; tap < N; ++tap)
            for (int64_t k = 0; k < n; ++k) {
                rows[tap][k] = block.indices[u][tap % 2][k];
                weights[tap][k] = block.shares[u][tap % 2][k];
                if (N == 4) {
                    rows[tap][k] += block.indices[v][tap / 2][k] * grid[u];
                    weights[tap][k] *= block.shares[v][tap / 2][k];
                }
            }
    }
    template <class Channels>
    Taps<N> at(int64_t k, Channels channels) const {
        Taps<N> taps;
        for (int tap = 0; tap < N; ++tap) {
            taps.row[tap] = rows[tap][k] * static_cast<int64_t>(channels);
            taps.weight[tap] = weights[tap][k];
        }
        return taps;
    }
};

template <class V, int N>
inline V value_at(const Table& table, const Taps<N>& taps, int64_t c) {
    V sum = taps.weight[0] * load<V>(table.values + taps.row[0] + c);
    for (int i = 1; i < N; ++i) sum += taps.weight[i] * load<V>(table.values + taps.row[i] + c);
    return sum;
}

// use(V product, c) for all channels of a group's product, at a plane's and a line's taps, or those of three lines.
template <class Channels, class Use>
inline void product_of(const Group& g, const Taps<4>& plane, const Taps<2>& line, Channels channels, const Use& use) {
    over_channels(channels, [&](auto type, int64_t c) {
        using V = decltype(type);
        use(value_at<V>(g.tables[0], plane, c) * value_at<V>(g.tables[1], line, c), c);
    });
}

template <class Channels, class Use>
inline void product_of(const Group& g, const Taps<2>* lines, Channels channels, const Use& use) {
    over_channels(channels, [&](auto type, int64_t c) {
        using V = decltype(type);
        V product = value_at<V>(g.tables[0], lines[0], c);
        for (int i = 1; i < 3; ++i) product *= value_at<V>(g.tables[i], lines[i], c);
        use(product, c);
    });
}

// Asks for the rows around a later point of a block: they come from far away, and a CPU looks only some points ahead.
template <int WRITE>
inline void fetch_rows(const float* table, const Taps<4>& taps, int64_t channels) {
    for (int tap = 0; tap < 4; ++tap)
        for (int64_t c = 0; c < channels; c += 16) __builtin_prefetch(table + taps.row[tap] + c, WRITE);
}

// use(k, V product, c) for points 0..n-1 of a block.
template <class Use>
inline void products_of(const Group& g, const Block& block, int64_t n, const int32_t* grid, const Use& use) {
    with_channels(g.channels, [&](auto channels) {
        if (g.tables[0].axes[1] >= 0) {
            const BlockTaps<4> plane(g.tables[0], block, n, grid);
            const BlockTaps<2> line(g.tables[1], block, n, grid);
            for (int64_t k = 0; k < n; ++k) {
                if (k + AHEAD < n) fetch_rows<0>(g.tables[0].values, plane.at(k + AHEAD, channels), channels);
                product_of(g, plane.at(k, channels), line.at(k, channels), channels,
                           [&](auto product, int64_t c) { use(k, product, c); });
            }
        } else {
            const BlockTaps<2> a(g.tables[0], block, n, grid), b(g.tables[1], block, n, grid);
            const BlockTaps<2> c(g.tables[2], block, n, grid);
            for (int64_t k = 0; k < n; ++k) {
                const Taps<2> taps[3] = {a.at(k, channels), b.at(k, channels), c.at(k, channels)};
                product_of(g, taps, channels, [&](auto product, int64_t c) { use(k, product, c); });
            }
        }
    });
}

inline float summed_product(const Group* groups, int32_t n_groups, const Point& point, const int32_t* grid) {
    Sum sum;
    for (int number = 0; number < n_groups; ++number) {
        const Group& g = groups[number];
        const auto add_up = [&](auto product, int64_t) { sum += product; };
        const auto along_line = [&](int i) { return line_taps(g.tables[i], point, g.channels); };
        if (g.tables[0].axes[1] >= 0) {
            product_of(g, plane_taps(g.tables[0], point, grid, g.channels), along_line(1), g.channels, add_up);
        } else {
            const Taps<2> lines[3] = {along_line(0), along_line(1), along_line(2)};
            product_of(g, lines, g.channels, add_up);
        }
    }
    return sum.total();
}

// The same of points 0..n-1 of a block, into out [n].
inline void summed_products(const Group* groups, int32_t n_groups, const Block& block, int64_t n, const int32_t* grid,
                            float* out) {
    Sum sums[Block::SIZE];
    for (int g = 0; g < n_groups; ++g)
        products_of(groups[g], block, n, grid, [&](int64_t k, auto product, int64_t) { sums[k] += product; });
    for (int64_t k = 0; k < n; ++k) out[k] = sums[k].total();
}

// The products of all groups side by side, into out [n, width].
inline void all_products(const Group* groups, int32_t n_groups, const Block& block, int64_t n, const int32_t* grid,
                         float* out, int64_t width) {
    for (int g = 0; g < n_groups; ++g) {
        float* from = out + groups[g].offset;
        products_of(groups[g], block, n, grid, [=](int64_t k, auto product, int64_t c) { store(from + k * width + c, product); });
    }
}

}  // namespace
