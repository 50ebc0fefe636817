// Lookups in the factors of a field, forward and backward, for CPUs; see compiled_lookups.py.
//
// Letters: K points xyz [K, 3] in [-1, 1], C channels of a table, table [rows, C] (channels-last), taps: the rows
// around a point, 2 along a line and 4 in a plane, outside ones weigh nothing. A group is 2 or 3 tables whose lookups
// are multiplied: plane x line (VM) or line x line x line (CP).
//
// Loops over channels are contiguous, so the compiler turns them into vector instructions. Nothing here starts a
// thread: callers split the points (forward, positions) or the channels (backward), so that no two calls write to
// one place and the sums have one order whatever the number of threads.
#include <cmath>
#include <cstdint>

extern "C" {
struct Table {
    const float* values;  // [rows, C]
    float* gradient;      // [rows, C], or null
    int32_t axes[2];      // the fastest first; the second is -1 for a line
    int32_t sizes[2];
};

struct Group {
    Table tables[3];
    int64_t channels;  // C, the same for all tables of the group
    int64_t offset;    // of its first channel among the products of all groups
};
}

namespace {

template <int N>
struct Taps {
    int64_t row[N];
    float weight[N];
};

struct Axis {
    int64_t index[2];
    float share[2], slope;  // slope: d share[1] / d coordinate
};

inline Axis along(const Table& table, int number, const float* xyz) {
    const int64_t size = table.sizes[number];
    const float position = ((xyz[table.axes[number]] + 1) / 2) * (size - 1);
    const float lower = std::floor(position), upper_share = position - lower;
    Axis axis{{0, 0}, {0, 0}, 0.5f * (size - 1)};
    for (int i = 0; i < 2; ++i) {
        const float index = lower + i;
        if (index >= 0 && index < size) {  // false for NaN as well
            axis.index[i] = static_cast<int64_t>(index);
            axis.share[i] = i ? upper_share : 1 - upper_share;
        }
    }
    return axis;
}

inline bool inside(const Table& table, int number, const float* xyz, int i) {
    const float position = ((xyz[table.axes[number]] + 1) / 2) * (table.sizes[number] - 1);
    const float index = std::floor(position) + i;
    return index >= 0 && index < table.sizes[number];
}

template <int N>
inline Taps<N> taps_of(const Table& table, const float* xyz, int64_t channels) {
    Taps<N> taps;
    const Axis u = along(table, 0, xyz);
    if constexpr (N == 2) {
        for (int i = 0; i < 2; ++i) {
            taps.row[i] = u.index[i] * channels;
            taps.weight[i] = u.share[i];
        }
    } else {
        const Axis v = along(table, 1, xyz);
        for (int j = 0; j < 2; ++j)
            for (int i = 0; i < 2; ++i) {
                taps.row[2 * j + i] = (v.index[j] * table.sizes[0] + u.index[i]) * channels;
                taps.weight[2 * j + i] = v.share[j] * u.share[i];
            }
    }
    return taps;
}

template <int N>
inline float value_at(const Table& table, const Taps<N>& taps, int64_t c) {
    float sum = 0;
    for (int i = 0; i < N; ++i) sum += taps.weight[i] * table.values[taps.row[i] + c];
    return sum;
}

// Products of points first..last-1: side by side into out [K, width], or their sum into out [K].
template <int N0, int N1, int N2>
void products_of(const float* xyz, const Group& g, int64_t first, int64_t last, float* out, int64_t width, bool sum) {
    for (int64_t k = first; k < last; ++k) {
        const float* point = xyz + 3 * k;
        const auto a = taps_of<N0>(g.tables[0], point, g.channels);
        const auto b = taps_of<N1>(g.tables[1], point, g.channels);
        Taps<2> c2{};
        if constexpr (N2 != 0) c2 = taps_of<2>(g.tables[2], point, g.channels);
        float total = 0;
        float* __restrict row = out + k * width + g.offset;
        for (int64_t c = 0; c < g.channels; ++c) {
            float product = value_at(g.tables[0], a, c) * value_at(g.tables[1], b, c);
            if constexpr (N2 != 0) product *= value_at(g.tables[2], c2, c);
            if (sum)
                total += product;
            else
                row[c] = product;
        }
        if (sum) out[k] += total;
    }
}

// Adds d loss / d tables for channels begin..end-1; upstream [K, width], or [K] for summed products.
template <int N0, int N1, int N2>
void scatter_to(const float* xyz, int64_t n, const Group& g, int64_t begin, int64_t end, const float* upstream,
                int64_t width, bool sum) {
    constexpr int64_t most = 64;  // channels at once
    float others[3][most];
    for (int64_t start = begin; start < end; start += most) {
        const int64_t count = end - start < most ? end - start : most;
        for (int64_t k = 0; k < n; ++k) {
            const float* point = xyz + 3 * k;
            const auto a = taps_of<N0>(g.tables[0], point, g.channels);
            const auto b = taps_of<N1>(g.tables[1], point, g.channels);
            Taps<2> c2{};
            if constexpr (N2 != 0) c2 = taps_of<2>(g.tables[2], point, g.channels);
            const float* up = sum ? upstream + k : upstream + k * width + g.offset + start;
            for (int64_t c = 0; c < count; ++c) {
                const float u = sum ? up[0] : up[c];
                const float va = value_at(g.tables[0], a, start + c), vb = value_at(g.tables[1], b, start + c);
                float vc = 1;
                if constexpr (N2 != 0) vc = value_at(g.tables[2], c2, start + c);
                others[0][c] = u * vb * vc;
                others[1][c] = u * va * vc;
                others[2][c] = u * va * vb;
            }
            for (int i = 0; i < N0; ++i)
                for (int64_t c = 0; c < count; ++c)
                    g.tables[0].gradient[a.row[i] + start + c] += a.weight[i] * others[0][c];
            for (int i = 0; i < N1; ++i)
                for (int64_t c = 0; c < count; ++c)
                    g.tables[1].gradient[b.row[i] + start + c] += b.weight[i] * others[1][c];
            if constexpr (N2 != 0)
                for (int i = 0; i < 2; ++i)
                    for (int64_t c = 0; c < count; ++c)
                        g.tables[2].gradient[c2.row[i] + start + c] += c2.weight[i] * others[2][c];
        }
    }
}

// d loss / d weight of each tap -> d loss / d coordinate. The share of a tap outside is 0 wherever the point moves.
template <int N>
inline void through_taps(const Table& table, const float* xyz, const float* slope, float* gradient) {
    const Axis u = along(table, 0, xyz);
    const float in_u[2] = {inside(table, 0, xyz, 0) ? -u.slope : 0.f, inside(table, 0, xyz, 1) ? u.slope : 0.f};
    if constexpr (N == 2) {
        gradient[table.axes[0]] += slope[0] * in_u[0] + slope[1] * in_u[1];
    } else {
        const Axis v = along(table, 1, xyz);
        const float in_v[2] = {inside(table, 1, xyz, 0) ? -v.slope : 0.f, inside(table, 1, xyz, 1) ? v.slope : 0.f};
        for (int j = 0; j < 2; ++j)
            for (int i = 0; i < 2; ++i) {
                gradient[table.axes[0]] += slope[2 * j + i] * in_u[i] * v.share[j];
                gradient[table.axes[1]] += slope[2 * j + i] * u.share[i] * in_v[j];
            }
    }
}

template <int N>
inline void slopes_of(const Table& table, const Taps<N>& taps, int64_t channels, const float* others, float* slope) {
    for (int i = 0; i < N; ++i) {
        float sum = 0;
        for (int64_t c = 0; c < channels; ++c) sum += others[c] * table.values[taps.row[i] + c];
        slope[i] = sum;
    }
}

// Adds d loss / d xyz of points first..last-1. scratch: 3 * channels floats.
template <int N0, int N1, int N2>
void positions_of(const float* xyz, const Group& g, int64_t first, int64_t last, const float* upstream, int64_t width,
                  bool sum, float* scratch, float* gradient) {
    float* others[3] = {scratch, scratch + g.channels, scratch + 2 * g.channels};
    for (int64_t k = first; k < last; ++k) {
        const float* point = xyz + 3 * k;
        const auto a = taps_of<N0>(g.tables[0], point, g.channels);
        const auto b = taps_of<N1>(g.tables[1], point, g.channels);
        Taps<2> c2{};
        if constexpr (N2 != 0) c2 = taps_of<2>(g.tables[2], point, g.channels);
        const float* up = sum ? upstream + k : upstream + k * width + g.offset;
        for (int64_t c = 0; c < g.channels; ++c) {
            const float u = sum ? up[0] : up[c];
            const float va = value_at(g.tables[0], a, c), vb = value_at(g.tables[1], b, c);
            float vc = 1;
            if constexpr (N2 != 0) vc = value_at(g.tables[2], c2, c);
            others[0][c] = u * vb * vc;
            others[1][c] = u * va * vc;
            others[2][c] = u * va * vb;
        }
        float slope[4];
        slopes_of<N0>(g.tables[0], a, g.channels, others[0], slope);
        through_taps<N0>(g.tables[0], point, slope, gradient + 3 * k);
        slopes_of<N1>(g.tables[1], b, g.channels, others[1], slope);
        through_taps<N1>(g.tables[1], point, slope, gradient + 3 * k);
        if constexpr (N2 != 0) {
            slopes_of<2>(g.tables[2], c2, g.channels, others[2], slope);
            through_taps<2>(g.tables[2], point, slope, gradient + 3 * k);
        }
    }
}

}  // namespace

extern "C" {
void products(const float* xyz, const Group* groups, int32_t n_groups, int64_t first, int64_t last, float* out,
              int64_t width, int32_t sum) {
    for (int g = 0; g < n_groups; ++g) {
        if (groups[g].tables[0].axes[1] >= 0)
            products_of<4, 2, 0>(xyz, groups[g], first, last, out, width, sum);
        else
            products_of<2, 2, 2>(xyz, groups[g], first, last, out, width, sum);
    }
}

void scatter(const float* xyz, int64_t n, const Group* group, int64_t begin, int64_t end, const float* upstream,
             int64_t width, int32_t sum) {
    if (group->tables[0].axes[1] >= 0)
        scatter_to<4, 2, 0>(xyz, n, *group, begin, end, upstream, width, sum);
    else
        scatter_to<2, 2, 2>(xyz, n, *group, begin, end, upstream, width, sum);
}

void positions(const float* xyz, const Group* groups, int32_t n_groups, int64_t first, int64_t last,
               const float* upstream, int64_t width, int32_t sum, float* scratch, float* gradient) {
    for (int g = 0; g < n_groups; ++g) {
        if (groups[g].tables[0].axes[1] >= 0)
            positions_of<4, 2, 0>(xyz, groups[g], first, last, upstream, width, sum, scratch, gradient);
        else
            positions_of<2, 2, 2>(xyz, groups[g], first, last, upstream, width, sum, scratch, gradient);
    }
}
}
