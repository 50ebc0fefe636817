// Lookups in the factors of a field, forward and backward, for CPUs; see compiled_lookups.py.
//
// Letters: K points xyz [K, 3] in [-1, 1], grid (Nx, Ny, Nz) points an axis, C channels of a table, table [rows, C]
// (channels-last), taps: the rows around a point, 2 along a line and 4 in a plane; those outside weigh nothing. A group
// is a plane and a line (VM) or three lines (CP) whose lookups are multiplied.
//
// A row's channels lie together, so arithmetic runs over vectors of 16, then 4, then single channels. Nothing here
// starts a thread: callers share out points (forward, positions, CP's backward) or bands of plane rows (VM's backward),
// so that no two calls write to one place and every sum has one order for a given number of shares.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "denormals.h"
#include "density.h"

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

typedef float V16 __attribute__((vector_size(64)));
typedef float V8 __attribute__((vector_size(32)));
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
    for (; c + 16 <= channels; c += 16) body(V16{}, c);
    for (; c + 4 <= channels; c += 4) body(V4{}, c);
    for (; c < channels; ++c) body(float{}, c);
}

struct Sum {
    V16 wide{};
    V4 quad{};
    float single = 0;
    void operator+=(V16 v) { wide += v; }
    void operator+=(V4 v) { quad += v; }
    void operator+=(float v) { single += v; }
    // In halves: a sum one by one would wait for each addition.
    float total() const {
        V8 halves[2];
        std::memcpy(halves, &wide, sizeof(wide));
        halves[0] += halves[1];
        V4 quarters[2];
        std::memcpy(quarters, &halves[0], sizeof(V8));
        const V4 four = quarters[0] + quarters[1] + quad;
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

}  // namespace

extern "C" {
// Products of points first..end-1: side by side into out [K, width], or their sum into out [K].
void products(const float* xyz, const int32_t* grid, const Group* groups, int32_t n_groups, int64_t first, int64_t end,
              float* out, int64_t width, int32_t sum) {
    const FlushDenormals flush;
    for (int64_t k = first; k < end; ++k) {
        const Point point(xyz + 3 * k, grid);
        if (sum) {
            out[k] = summed_product(groups, n_groups, point, grid);
            continue;
        }
        for (int g = 0; g < n_groups; ++g) {
            float* row = out + k * width + groups[g].offset;
            product_of(groups[g], point, grid, [&](auto product, int64_t c) { store(row + c, product); });
        }
    }
}

// Weights [K] of the samples of rays first..end-1, whose k-th begin at offsets[ray]; behind the sample at which the
// light that is left falls below `least`, nothing is looked up and all weights are 0.
void weights_until_opaque(const float* xyz, const int32_t* grid, const Group* groups, int32_t n_groups,
                          const float* delta, const int64_t* offsets, int64_t first, int64_t end, int32_t softplus,
                          float shift, float scale, float least, float* weights) {
    const FlushDenormals flush;
    for (int64_t ray = first; ray < end; ++ray) {
        double transmittance = 1;
        for (int64_t i = offsets[ray]; i < offsets[ray + 1]; ++i) {
            weights[i] = 0;
            if (transmittance < least) continue;
            const Point point(xyz + 3 * i, grid);
            const float feature = summed_product(groups, n_groups, point, grid);
            const float alpha = alpha_of(feature, delta[i] * scale, softplus, shift);
            weights[i] = static_cast<float>(alpha * transmittance);
            transmittance *= 1 - alpha + 1e-10f;
        }
    }
}

// How many points have their lower tap in each row of an axis, counts [N]; every `every`-th point is looked at.
void occupancy(const float* xyz, int64_t n, int32_t axis, int32_t size, int64_t every, int64_t* counts) {
    for (int64_t k = 0; k < n; k += every) ++counts[along(xyz[3 * k + axis], size).index[0]];
}

// Adds d loss / d plane for the plane's rows low..high-1, and d loss / d line [N, C] of the points whose lower tap lies
// there to line_gradient. upstream [K, width], or [K] for summed products.
void scatter_plane(const float* xyz, int64_t n, const int32_t* grid, const Group* group, int64_t low, int64_t high,
                   const float* upstream, int64_t width, int32_t sum, float* line_gradient) {
    const FlushDenormals flush;
    const Group& g = *group;
    const Table &plane = g.tables[0], &line = g.tables[1];
    const int v_axis = plane.axes[1];
    for (int64_t k = 0; k < n; ++k) {
        const float* up = sum ? upstream + k : upstream + k * width + g.offset;
        const Axis v = along(xyz[3 * k + v_axis], grid[v_axis]);
        const bool owner = v.index[0] >= low && v.index[0] < high;
        const bool upper = v.index[1] >= low && v.index[1] < high && v.share[1] != 0;
        if (!(owner || upper) || (sum && up[0] == 0)) continue;
        const Point point(xyz + 3 * k, grid);
        const auto a = plane_taps(plane, point, grid, g.channels);
        const auto b = line_taps(line, point, g.channels);
        // Taps of weight 0 are added too: it changes nothing, and a branch would cost more.
        over_channels(g.channels, [&](auto type, int64_t c) {
            using V = decltype(type);
            V u = V{} + up[0];
            if (!sum) u = load<V>(up + c);
            const V through_line = u * value_at<V>(line, b, c);
            if (owner) {
                add<V>(plane.gradient + a.row[0] + c, a.weight[0] * through_line);
                add<V>(plane.gradient + a.row[1] + c, a.weight[1] * through_line);
                const V through_plane = u * value_at<V>(plane, a, c);
                add<V>(line_gradient + b.row[0] + c, b.weight[0] * through_plane);
                add<V>(line_gradient + b.row[1] + c, b.weight[1] * through_plane);
            }
            if (upper) {
                add<V>(plane.gradient + a.row[2] + c, a.weight[2] * through_line);
                add<V>(plane.gradient + a.row[3] + c, a.weight[3] * through_line);
            }
        });
    }
}

// Adds d loss / d lines of points first..end-1 to three gradients, each [N of its axis, C].
void scatter_lines(const float* xyz, const int32_t* grid, const Group* group, int64_t first, int64_t end,
                   const float* upstream, int64_t width, int32_t sum, float* const* gradients) {
    const FlushDenormals flush;
    const Group& g = *group;
    for (int64_t k = first; k < end; ++k) {
        const Point point(xyz + 3 * k, grid);
        const float* up = sum ? upstream + k : upstream + k * width + g.offset;
        Taps<2> taps[3];
        for (int i = 0; i < 3; ++i) taps[i] = line_taps(g.tables[i], point, g.channels);
        over_channels(g.channels, [&](auto type, int64_t c) {
            using V = decltype(type);
            V u = V{} + up[0];
            if (!sum) u = load<V>(up + c);
            V value[3];
            for (int i = 0; i < 3; ++i) value[i] = value_at<V>(g.tables[i], taps[i], c);
            const V others[3] = {u * value[1] * value[2], u * value[0] * value[2], u * value[0] * value[1]};
            for (int i = 0; i < 3; ++i)
                for (int j = 0; j < 2; ++j) add<V>(gradients[i] + taps[i].row[j] + c, taps[i].weight[j] * others[i]);
        });
    }
}

// Adds d loss / d xyz of points first..end-1 to gradient [K, 3].
void positions(const float* xyz, const int32_t* grid, const Group* groups, int32_t n_groups, int64_t first, int64_t end,
               const float* upstream, int64_t width, int32_t sum, float* gradient) {
    const FlushDenormals flush;
    for (int64_t k = first; k < end; ++k) {
        const Point point(xyz + 3 * k, grid);
        float* to = gradient + 3 * k;
        for (int number = 0; number < n_groups; ++number) {
            const Group& g = groups[number];
            const float* up = sum ? upstream + k : upstream + k * width + g.offset;
            const bool is_plane = g.tables[0].axes[1] >= 0;
            const int n_tables = is_plane ? 2 : 3;
            // d loss / d weight of each tap: the row under it times all that it is multiplied by.
            Sum slopes[3][4];
            Taps<4> taps[3];
            for (int i = 0; i < n_tables; ++i) {
                if (i == 0 && is_plane) {
                    taps[i] = plane_taps(g.tables[i], point, grid, g.channels);
                } else {
                    const auto two = line_taps(g.tables[i], point, g.channels);
                    taps[i] = {{two.row[0], two.row[1], two.row[0], two.row[0]}, {two.weight[0], two.weight[1], 0, 0}};
                }
            }
            over_channels(g.channels, [&](auto type, int64_t c) {
                using V = decltype(type);
                V u = V{} + up[0];
                if (!sum) u = load<V>(up + c);
                V value[3] = {V{} + 1.f, V{} + 1.f, V{} + 1.f};
                for (int i = 0; i < n_tables; ++i) value[i] = value_at<V>(g.tables[i], taps[i], c);
                const V others[3] = {u * value[1] * value[2], u * value[0] * value[2], u * value[0] * value[1]};
                for (int i = 0; i < n_tables; ++i)
                    for (int tap = 0; tap < (i == 0 && is_plane ? 4 : 2); ++tap)
                        slopes[i][tap] += others[i] * load<V>(g.tables[i].values + taps[i].row[tap] + c);
            });
            for (int i = 0; i < n_tables; ++i) {
                const Axis& u = point.axes[g.tables[i].axes[0]];
                if (i == 0 && is_plane) {
                    const Axis& v = point.axes[g.tables[i].axes[1]];
                    for (int tap = 0; tap < 4; ++tap) {
                        const float slope = slopes[i][tap].total();
                        to[g.tables[i].axes[0]] += slope * u.slope[tap & 1] * v.share[tap >> 1];
                        to[g.tables[i].axes[1]] += slope * u.share[tap & 1] * v.slope[tap >> 1];
                    }
                } else {
                    for (int tap = 0; tap < 2; ++tap)
                        to[g.tables[i].axes[0]] += slopes[i][tap].total() * u.slope[tap];
                }
            }
        }
    }
}
}
