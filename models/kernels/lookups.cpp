// Lookups in the factors of a field, forward and backward, for CPUs; see compiled_lookups.py.
//
// Letters: K points xyz [K, 3] in [-1, 1], grid (Nx, Ny, Nz) points an axis, C channels of a table, table [rows, C]
// (channels-last), taps: the rows around a point, 2 along a line and 4 in a plane; those outside weigh nothing. A group
// is a plane and a line (VM) or three lines (CP) whose lookups are multiplied.
//
// A row's channels lie together, so arithmetic runs over vectors of 16 (8 without AVX-512), then 4, then single channels.
// Points are shared out (forward, positions, CP's backward) or bands of plane rows (VM's backward), so that no two
// shares write to one place and every sum has one order for a given number of threads.
#include "lookups.h"

#include <memory>
#include <utility>

#include "denormals.h"
#include "density.h"
#include "shares.h"

namespace {

constexpr int64_t POINTS = 1 << 11, RAYS = 1 << 6;  // of a share
constexpr int64_t ALONE = 1 << 9;                   // points that are too few to share out
constexpr int32_t PARTS = 2;                        // of a plane's rows or of the points, for each thread
constexpr int64_t EVERY = 16;                       // so many points are looked at to share out a plane's rows

// Rows of a plane's second axis v as bands, one a thread, and the points of each: those whose lower tap lies there, and
// those that only reach into it with their upper one. Made once for all planes with that axis.
class Bands {
  public:
    Bands(const float* points, int64_t n_points, int32_t axis, int32_t n_rows, int32_t n_bands)
        : xyz(points), n(n_points), v(axis), size(n_rows), count(n_bands), band_of(n_rows), numbers(2 * n_points),
          ends(slices() * n_bands) {
        // About as many points for each; not all are looked at.
        std::vector<int64_t> counts(size, 0);
        int64_t total = 0, below = 0;
        for (int64_t k = 0; k < n; k += EVERY, ++total) ++counts[along(xyz[3 * k + v], size).index[0]];
        borders.push_back(0);
        for (int32_t row = 0; row < size; ++row) {
            band_of[row] = static_cast<int32_t>(borders.size()) - 1;
            below += counts[row];
            while (static_cast<int64_t>(borders.size()) < count &&
                   below > static_cast<int64_t>(borders.size()) * total / count)
                borders.push_back(row + 1);
        }
        borders.resize(count, size);
        borders.push_back(size);
    }

    int64_t slices() const { return (n + SLICE - 1) / SLICE; }
    int64_t low(int64_t band) const { return borders[band]; }
    int64_t high(int64_t band) const { return borders[band + 1]; }

    // Sorts a slice of the points into bands; points that `skip(k)` says nothing flows to are left out.
    template <class Skip>
    void sort(int64_t slice, const Skip& skip) {
        const int64_t first = slice * SLICE, total = std::min(SLICE, n - first);
        std::vector<uint16_t> own(total), other(total);  // bands; `count` for none
        std::vector<int32_t> at(count + 1, 0);
        Block block;
        for (int64_t start = 0; start < total; start += Block::SIZE) {
            const int64_t some = std::min(Block::SIZE, total - start);
            block.fill(v, xyz + 3 * (first + start), some, size);
            for (int64_t k = 0; k < some; ++k) {
                const int32_t lower = band_of[block.indices[v][0][k]], upper = band_of[block.indices[v][1][k]];
                const bool none = skip(first + start + k), reaches = (upper != lower) & (block.shares[v][1][k] != 0);
                own[start + k] = none ? count : lower;
                other[start + k] = (!none & reaches) ? upper : count;
                ++at[own[start + k]];
                ++at[other[start + k]];
            }
        }
        int32_t begin = 0;
        for (int32_t band = 0; band < count; ++band) {
            const int32_t many = at[band];
            at[band] = begin;
            begin += many;
        }
        at[count] = begin;  // those left out, which nobody reads
        uint16_t* to = numbers.data() + 2 * first;
        for (int64_t k = 0; k < total; ++k) {
            to[at[own[k]]++] = static_cast<uint16_t>(k);
            to[at[other[k]]++] = static_cast<uint16_t>(k);
        }
        std::copy_n(at.data(), count, ends.data() + slice * count);
    }

    // Numbers of a slice's points in a band, counted from the slice's first; ascending.
    std::pair<const uint16_t*, const uint16_t*> in(int64_t slice, int64_t band) const {
        const uint16_t* from = numbers.data() + 2 * slice * SLICE;
        const int32_t* end = ends.data() + slice * count;
        return {from + (band == 0 ? 0 : end[band - 1]), from + end[band]};
    }

    static constexpr int64_t SLICE = 1 << 13;  // points whose numbers take 16 bits
    const float* const xyz;
    const int64_t n;

  private:
    const int32_t v, size, count;
    std::vector<int32_t> band_of;
    std::vector<int64_t> borders;
    std::vector<uint16_t, Aligned<uint16_t>> numbers;  // slice by slice, band by band
    std::vector<int32_t> ends;                         // [slices, bands]
};

// Adds d loss / d plane for the plane's rows low..high-1, and d loss / d line [N, C] of the points whose lower tap lies
// there to line_gradient. upstream [K, width], or [K] for summed products.
template <bool SUM, class Channels>
void scatter_block(const Block& block, const int64_t* numbers, int64_t n, const int32_t* grid, const Group& g,
                   Channels channels, int64_t low, int64_t high, const float* upstream, int64_t width,
                   float* line_gradient) {
    const Table plane = g.tables[0], line = g.tables[1];
    float* const plane_gradient = plane.gradient;
    const int v = plane.axes[1];
    const BlockTaps<4> planes(plane, block, n, grid);
    const BlockTaps<2> lines(line, block, n, grid);
    for (int64_t k = 0; k < n; ++k) {
        if (const int64_t later = k + AHEAD; later < n) {
            const auto rows = planes.at(later, channels);
            fetch_rows<0>(plane.values, rows, channels);
            fetch_rows<1>(plane_gradient, rows, channels);
            for (int64_t c = 0; !SUM && c < channels; c += 16)
                __builtin_prefetch(upstream + numbers[later] * width + g.offset + c);
        }
        const float* up = SUM ? upstream + numbers[k] : upstream + numbers[k] * width + g.offset;
        const auto a = planes.at(k, channels);
        const auto b = lines.at(k, channels);
        // Taps of weight 0 are added too: it changes nothing, and a branch would cost more.
        const auto spread = [&](auto owner, auto upper) {
            over_channels(channels, [&](auto type, int64_t c) {
                using V = decltype(type);
                V u = V{} + up[0];
                if (!SUM) u = load<V>(up + c);
                const V through_line = u * value_at<V>(line, b, c);
                if (owner) {
                    const V through_plane = u * value_at<V>(plane, a, c);
                    add<V>(plane_gradient + a.row[0] + c, a.weight[0] * through_line);
                    add<V>(plane_gradient + a.row[1] + c, a.weight[1] * through_line);
                    add<V>(line_gradient + b.row[0] + c, b.weight[0] * through_plane);
                    add<V>(line_gradient + b.row[1] + c, b.weight[1] * through_plane);
                }
                if (upper) {
                    add<V>(plane_gradient + a.row[2] + c, a.weight[2] * through_line);
                    add<V>(plane_gradient + a.row[3] + c, a.weight[3] * through_line);
                }
            });
        };
        const int64_t lower = block.indices[v][0][k], next = block.indices[v][1][k];
        const bool owner = (lower >= low) & (lower < high);
        const bool upper = (next >= low) & (next < high) & (block.shares[v][1][k] != 0);
        if (owner & upper) {
            spread(std::true_type{}, std::true_type{});
        } else if (owner) {
            spread(std::true_type{}, std::false_type{});
        } else {
            spread(std::false_type{}, std::true_type{});
        }
    }
}

// The same of all points in a band.
template <bool SUM>
void scatter_plane(const Bands& bands, int64_t band, const int32_t* grid, const Group& g, const float* upstream,
                   int64_t width, float* line_gradient) {
    int64_t numbers[Block::SIZE];
    float chosen[3 * Block::SIZE];
    Block block;
    with_channels(g.channels, [&](auto channels) {
        for (int64_t slice = 0; slice < bands.slices(); ++slice) {
            const int64_t first = slice * Bands::SLICE;
            for (auto [next, end] = bands.in(slice, band); next < end;) {
                const int64_t n = std::min<int64_t>(Block::SIZE, end - next);
                for (int64_t k = 0; k < n; ++k) {
                    numbers[k] = first + next[k];
                    std::copy_n(bands.xyz + 3 * numbers[k], 3, chosen + 3 * k);
                }
                next += n;
                block.fill(chosen, n, grid);
                scatter_block<SUM>(block, numbers, n, grid, g, channels, bands.low(band), bands.high(band), upstream,
                                   width, line_gradient);
            }
        }
    });
}

// Adds d loss / d lines of points first..end-1 to three gradients, each [N of its axis, C].
void scatter_lines(const float* xyz, const int32_t* grid, const Group& g, int64_t first, int64_t end,
                   const float* upstream, int64_t width, bool sum, float* const* gradients) {
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

// d loss / d xyz of a point, added to `to` [3].
void position_gradient(const float* xyz, int64_t k, const int32_t* grid, const Group* groups, int32_t n_groups,
                       const float* upstream, int64_t width, bool sum, float* to) {
    const Point point(xyz + 3 * k, grid);
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
                for (int tap = 0; tap < 2; ++tap) to[g.tables[i].axes[0]] += slopes[i][tap].total() * u.slope[tap];
            }
        }
    }
}

}  // namespace

extern "C" {
// Products of K points: side by side into out [K, width], or their sum into out [K].
int32_t products(const float* xyz, int64_t n, const int32_t* grid, const Group* groups, int32_t n_groups, float* out,
                 int64_t width, int32_t sum, int32_t threads) {
    return share_range(n, POINTS, n <= ALONE ? 1 : threads, [&](int64_t first, int64_t end) {
        const FlushDenormals flush;
        Block block;
        for (int64_t start = first; start < end; start += Block::SIZE) {
            const int64_t size = std::min(Block::SIZE, end - start);
            block.fill(xyz + 3 * start, size, grid);
            if (sum) {
                summed_products(groups, n_groups, block, size, grid, out + start);
            } else {
                all_products(groups, n_groups, block, size, grid, out + start * width, width);
            }
        }
    });
}

// Weights [K] of the samples of B rays, whose k-th begin at offsets[ray]; behind the sample at which the light that is
// left falls below `least`, nothing is looked up and all weights are 0.
int32_t weights_until_opaque(const float* xyz, const int32_t* grid, const Group* groups, int32_t n_groups,
                             const float* delta, const int64_t* offsets, int64_t n_rays, int32_t softplus, float shift,
                             float scale, float least, float* weights, int32_t threads) {
    return share_range(n_rays, RAYS, threads, [&](int64_t first, int64_t end) {
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
    });
}

// d loss / d factors into their gradients, from upstream [K, width], or [K] for summed products. fresh: the gradients
// hold nothing yet; otherwise it is added to them.
int32_t scatter(const float* xyz, int64_t n, const int32_t* grid, const Group* groups, int32_t n_groups,
                const float* upstream, int64_t width, int32_t sum, int32_t fresh, int32_t threads) try {
    if (n <= ALONE) threads = 1;
    const int32_t parts = threads == 1 ? 1 : PARTS * threads;
    const auto rows = [&](const Table& table) {
        return static_cast<int64_t>(grid[table.axes[0]]) * (table.axes[1] < 0 ? 1 : grid[table.axes[1]]);
    };
    std::vector<std::unique_ptr<Bands>> bands(3);  // by axis
    std::vector<Bands*> sorted;
    for (int g = 0; g < n_groups; ++g)
        if (const int axis = groups[g].tables[0].axes[1]; axis >= 0 && !bands[axis]) {
            bands[axis] = std::make_unique<Bands>(xyz, n, axis, grid[axis], parts);
            sorted.push_back(bands[axis].get());
        }
    const int64_t slices = (n + Bands::SLICE - 1) / Bands::SLICE;
    int32_t status = share_out(slices * static_cast<int64_t>(sorted.size()), threads, [&](int64_t share, int32_t) {
        sorted[share / slices]->sort(share % slices, [=](int64_t k) { return sum && upstream[k] == 0; });
    });
    if (status != GOOD) return status;
    // A share is a band of a plane's rows, or a part of the points; lines' sums are its own.
    std::vector<Floats> own(static_cast<size_t>(n_groups) * parts * 3);
    status = share_out(static_cast<int64_t>(n_groups) * parts, threads, [&](int64_t share, int32_t) {
        const FlushDenormals flush;
        const Group& group = groups[share / parts];
        const int64_t part = share % parts;
        const bool is_plane = group.tables[0].axes[1] >= 0;
        float* lines[3];
        for (int i = is_plane; i < (is_plane ? 2 : 3); ++i) {
            own[3 * share + i].assign(rows(group.tables[i]) * group.channels, 0);
            lines[i] = own[3 * share + i].data();
        }
        if (!is_plane) {
            scatter_lines(xyz, grid, group, n * part / parts, n * (part + 1) / parts, upstream, width, sum, lines);
            return;
        }
        const Bands& rows_of = *bands[group.tables[0].axes[1]];
        const int64_t row = grid[group.tables[0].axes[0]] * group.channels;
        float* gradient = group.tables[0].gradient;
        if (fresh) std::fill(gradient + rows_of.low(part) * row, gradient + rows_of.high(part) * row, 0.f);
        (sum ? scatter_plane<true> : scatter_plane<false>)(rows_of, part, grid, group, upstream, width, lines[1]);
    });
    if (status != GOOD) return status;
    for (int g = 0; g < n_groups; ++g)
        for (int i = 0; i < 3; ++i) {
            const Table& table = groups[g].tables[i];
            for (int part = 0; part < parts; ++part) {
                const auto& sums = own[3 * (static_cast<size_t>(g) * parts + part) + i];
                if (part == 0 && fresh && !sums.empty()) std::fill_n(table.gradient, sums.size(), 0.f);
                for (size_t at = 0; at < sums.size(); ++at) table.gradient[at] += sums[at];
            }
        }
    return GOOD;
} catch (...) {
    return OUT_OF_MEMORY;
}

// d loss / d xyz into gradient [K, 3].
int32_t positions(const float* xyz, int64_t n, const int32_t* grid, const Group* groups, int32_t n_groups,
                  const float* upstream, int64_t width, int32_t sum, float* gradient, int32_t threads) {
    return share_range(n, POINTS, n <= ALONE ? 1 : threads, [&](int64_t first, int64_t end) {
        const FlushDenormals flush;
        std::fill(gradient + 3 * first, gradient + 3 * end, 0.f);
        for (int64_t k = first; k < end; ++k)
            position_gradient(xyz, k, grid, groups, n_groups, upstream, width, sum, gradient + 3 * k);
    });
}
}
