// Marching, weights and compositing of packed samples, for CPUs; see compiled_rendering.py.
//
// Letters: B rays, K samples, k sample number of S. Compiled without contraction and reordering: a sample lives or not by
// the same roundings as in components/marching.py, whose expressions these are. Rays are shared
// out, and no two of them write to one place: results do not depend on the number of threads.
#include <cmath>
#include <cstdint>

#include "denormals.h"
#include "density.h"
#include "shares.h"
#include "vectors.h"

extern "C" {
struct Rays {
    const float *origins, *directions;  // [B, 3]
    const float *t_enter, *jitter;      // [B]; jitter may be null
    float step, low[3], high[3], scale[3];  // box; scale: 2 / (high - low)
    // NDC: t [S + WIDE] and distance [S] of each sample number, what a ray's distances are multiplied by [B]; else null.
    const float *t_row, *delta_row, *length;
};

// Bit dx + 2 dy + 4 dz of a cell is its corner there; see models/alpha_mask.py.
struct Mask {
    const uint8_t* cells;  // [Nz + 1, Ny + 1, Nx + 1], or null for no mask
    int64_t size[3];
    float low[3], scale[3];
    uint8_t allowed[8];
};
}

namespace {

constexpr int64_t RAYS = 1 << 7;  // of a share

// T: one number, or a vector of them.
template <class T>
inline T number_of(const Rays& rays, int64_t ray, T k) {
    return rays.jitter ? k + rays.jitter[ray] : k;
}

template <class T>
inline T t_of(const Rays& rays, int64_t ray, T number) {
    return rays.t_enter[ray] + rays.step * number;
}

// Of candidates k..k+WIDE-1 of a ray: whether they lie in the box and, if there is a mask, in an occupied cell.
inline void test_candidates(const Rays& rays, const Mask& mask, int64_t ray, int64_t k, const Wide& numbers,
                            bool* live) {
    const float *o = rays.origins + 3 * ray, *d = rays.directions + 3 * ray;
    const Wide t = rays.t_row ? load<Wide>(rays.t_row + k)
                              : t_of<Wide>(rays, ray, number_of<Wide>(rays, ray, static_cast<float>(k) + numbers));
    WideBits inside = ~WideBits{}, cell{}, between{};
    for (int i = 2; i >= 0; --i) {  // z first: it is the slowest of a cell's indices
        const Wide xyz = o[i] + d[i] * t;
        inside &= (xyz >= rays.low[i]) & (xyz <= rays.high[i]);
        if (!mask.cells) continue;
        const float size = static_cast<float>(mask.size[i]);
        const Wide normalised = (xyz - mask.low[i]) * mask.scale[i] - 1, position = ((normalised + 1) / 2) * (size - 1);
        inside &= (position >= -1) & (position < size);
        const Wide safe = where(inside, position);
        const WideBits lower = floor_of(safe);
        cell = cell * static_cast<int32_t>(mask.size[i] + 1) + lower + 1;
        between |= (safe > __builtin_convertvector(lower, Wide)) & (1 << i);
    }
    for (int64_t j = 0; j < WIDE; ++j)
        live[j] = inside[j] && (!mask.cells || (mask.cells[cell[j]] & mask.allowed[between[j]]));
}

// Loops of their own, for the compiler's vectoriser: alpha [n], and d alpha / d feature [n]. The latter has
// exp(-sigma * distance) itself: of an opaque sample, 1 - alpha has lost all digits.
template <bool SOFTPLUS>
void alphas(const float* __restrict feature, const float* __restrict delta, int64_t n, float shift, float scale,
            float* __restrict alpha) {
    for (int64_t i = 0; i < n; ++i) alpha[i] = alpha_of(feature[i], delta[i] * scale, SOFTPLUS, shift);
}

template <bool SOFTPLUS>
void slopes(const float* __restrict feature, const float* __restrict delta, int64_t n, float shift, float scale,
            float* __restrict slope) {
    for (int64_t i = 0; i < n; ++i) {
        const float x = feature[i] + shift, e = exp_of(x);
        const float distance = delta[i] * scale, left = exp_of(-sigma_of(feature[i], SOFTPLUS, shift) * distance);
        slope[i] = left * distance * (SOFTPLUS ? (x > 20 ? 1 : e / (1 + e)) : feature[i] > 0);
    }
}

// d alpha / d delta [n].
template <bool SOFTPLUS>
void distance_slopes(const float* __restrict feature, const float* __restrict delta, int64_t n, float shift,
                     float scale, float* __restrict slope) {
    for (int64_t i = 0; i < n; ++i) {
        const float sigma = sigma_of(feature[i], SOFTPLUS, shift);
        slope[i] = exp_of(-sigma * (delta[i] * scale)) * sigma * scale;
    }
}

}  // namespace

extern "C" {
// What t_row is to be longer than S.
extern const int64_t wide = WIDE;

// Which candidates of all rays live: `live` [K0], those of ray r from candidates[r] on, and counts [B].
int32_t march_count(const Rays* rays, const Mask* mask, const int64_t* candidates, int64_t n_rays,
                    uint8_t* live, int64_t* counts, int32_t threads) {
    Wide numbers;  // 0, 1, ...
    for (int j = 0; j < WIDE; ++j) numbers[j] = static_cast<float>(j);
    return share_range(n_rays, RAYS, threads, [&](int64_t first, int64_t end) {
        for (int64_t ray = first; ray < end; ++ray) {
            const int64_t n = candidates[ray + 1] - candidates[ray];
            uint8_t* flags = live + candidates[ray];
            int64_t count = 0;
            for (int64_t k = 0; k < n; k += WIDE) {
                bool lives[WIDE];
                test_candidates(*rays, *mask, ray, k, numbers, lives);
                for (int64_t j = 0; j < std::min<int64_t>(WIDE, n - k); ++j) {
                    flags[k + j] = lives[j];
                    count += lives[j];
                }
            }
            counts[ray] = count;
        }
    });
}

// The samples that `live` tells, those of ray r from offsets[r] on.
int32_t march_fill(const Rays* rays, const int64_t* candidates, const uint8_t* live, const int64_t* offsets,
                   int64_t n_samples, int64_t n_rays, int64_t* ray_of, float* t_out, float* delta,
                   float* position, int32_t threads) {
    return share_range(n_rays, RAYS, threads, [&](int64_t first, int64_t end) {
        for (int64_t ray = first; ray < end; ++ray) {
            const float *o = rays->origins + 3 * ray, *d = rays->directions + 3 * ray;
            const int64_t n = candidates[ray + 1] - candidates[ray];
            const uint8_t* flags = live + candidates[ray];
            int64_t at = offsets[ray];
            for (int64_t k = 0; k < n; ++k) {
                if (!flags[k]) continue;
                float t, distance = 0;
                if (rays->t_row) {
                    t = rays->t_row[k];
                    distance = rays->delta_row[k] * rays->length[ray];
                } else {
                    t = t_of(*rays, ray, number_of(*rays, ray, static_cast<float>(k)));
                    const float following = number_of(*rays, ray, static_cast<float>(k) + 1);
                    if (k < n_samples - 1) distance = t_of(*rays, ray, following) - t;
                }
                ray_of[at] = ray;
                t_out[at] = t;
                delta[at] = distance;
                for (int i = 0; i < 3; ++i)
                    position[3 * at + i] = (o[i] + d[i] * t - rays->low[i]) * rays->scale[i] - 1;
                ++at;
            }
        }
    });
}

// alpha [K] and weights [K] of all rays from density features [K].
int32_t weights_forward(const float* feature, const float* delta, const int64_t* offsets, int64_t n_rays,
                        int32_t softplus, float shift, float scale, float* alpha, float* weights, int32_t threads) {
    return share_range(n_rays, RAYS, threads, [&](int64_t first, int64_t end) {
        const FlushDenormals flush;
        const int64_t from = offsets[first], n = offsets[end] - from;
        (softplus ? alphas<true> : alphas<false>)(feature + from, delta + from, n, shift, scale, alpha + from);
        for (int64_t ray = first; ray < end; ++ray) {
            double transmittance = 1;
            for (int64_t i = offsets[ray]; i < offsets[ray + 1]; ++i) {
                weights[i] = static_cast<float>(alpha[i] * transmittance);
                transmittance *= 1 - alpha[i] + 1e-10f;
            }
        }
    });
}

// d loss / d feature [K] and, unless it is null, d loss / d delta [K] from d loss / d weights:
// dw_j / dalpha_i = -w_j / (1 - alpha_i + 1e-10) for j > i.
int32_t weights_backward(const float* feature, const float* delta, const int64_t* offsets, const float* alpha,
                         const float* weights, const float* upstream, int64_t n_rays, int32_t softplus,
                         float shift, float scale, float* gradient, float* to_delta, int32_t threads) {
    return share_range(n_rays, RAYS, threads, [&](int64_t first, int64_t end) {
        const FlushDenormals flush;
        const int64_t from = offsets[first], n_all = offsets[end] - from;
        (softplus ? slopes<true> : slopes<false>)(feature + from, delta + from, n_all, shift, scale, gradient + from);
        if (to_delta)
            (softplus ? distance_slopes<true> : distance_slopes<false>)(feature + from, delta + from, n_all, shift,
                                                                       scale, to_delta + from);
        std::vector<float> before;
        for (int64_t ray = first; ray < end; ++ray) {
            const int64_t begin = offsets[ray], n = offsets[ray + 1] - begin;
            before.resize(n);
            double transmittance = 1, later = 0;
            for (int64_t i = 0; i < n; ++i) {
                before[i] = static_cast<float>(transmittance);
                transmittance *= 1 - alpha[begin + i] + 1e-10f;
            }
            for (int64_t i = begin + n - 1; i >= begin; --i) {
                const float rest = 1 - alpha[i] + 1e-10f;
                const float to_alpha = upstream[i] * before[i - begin] - static_cast<float>(later) / rest;
                later += static_cast<double>(upstream[i]) * weights[i];
                gradient[i] *= to_alpha;
                if (to_delta) to_delta[i] *= to_alpha;
            }
        }
    });
}

// rgb [B, 3], opacity [B], distance [B] of all rays. coloured [Kc]: ascending.
int32_t composite_forward(const float* weights, const float* t, const int64_t* offsets, const int64_t* coloured,
                          int64_t n_coloured, const float* colour, int64_t n_rays, float* rgb,
                          float* opacity, float* distance, int32_t threads) {
    return share_range(n_rays, RAYS, threads, [&](int64_t first, int64_t end) {
        const FlushDenormals flush;
        int64_t at = std::lower_bound(coloured, coloured + n_coloured, offsets[first]) - coloured;
        for (int64_t ray = first; ray < end; ++ray) {
            float sum[3] = {0, 0, 0}, total = 0, far = 0;
            for (int64_t i = offsets[ray]; i < offsets[ray + 1]; ++i) {
                total += weights[i];
                far += weights[i] * t[i];
            }
            for (; at < n_coloured && coloured[at] < offsets[ray + 1]; ++at)
                for (int c = 0; c < 3; ++c) sum[c] += weights[coloured[at]] * colour[3 * at + c];
            for (int c = 0; c < 3; ++c) rgb[3 * ray + c] = sum[c];
            opacity[ray] = total;
            distance[ray] = far;
        }
    });
}

// d loss / d weights [K] and d loss / d colour [Kc, 3].
int32_t composite_backward(const float* weights, const int64_t* offsets, const int64_t* coloured, int64_t n_coloured,
                           const float* colour, int64_t n_rays, const float* to_rgb,
                           const float* to_opacity, float* to_weights, float* to_colour, int32_t threads) {
    return share_range(n_rays, RAYS, threads, [&](int64_t first, int64_t end) {
        const FlushDenormals flush;
        int64_t at = std::lower_bound(coloured, coloured + n_coloured, offsets[first]) - coloured;
        for (int64_t ray = first; ray < end; ++ray) {
            for (int64_t i = offsets[ray]; i < offsets[ray + 1]; ++i) to_weights[i] = to_opacity[ray];
            for (; at < n_coloured && coloured[at] < offsets[ray + 1]; ++at)
                for (int c = 0; c < 3; ++c) {
                    to_weights[coloured[at]] += to_rgb[3 * ray + c] * colour[3 * at + c];
                    to_colour[3 * at + c] = to_rgb[3 * ray + c] * weights[coloured[at]];
                }
        }
    });
}
}
