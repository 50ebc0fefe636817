// The feature network (TensoRF's MLP_Fea), forward and backward, for CPUs; see compiled_network.py.
//
// Letters: K samples, F features, I inputs, H hidden units; I and H as stored here are padded with zeros to a multiple
// of UNIT. Samples pass through all layers a tile at a time, so that whatever lies between input and output stays in
// the cache. All matrices are row-major; one block of a product, C += A B, is held in registers. Nothing here starts a
// thread: callers share out samples.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "denormals.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;  // of a block in registers: ROWS x 2 vectors
#else
constexpr int LANES = 8, ROWS = 4;
#endif
constexpr int64_t UNIT = 32, TILE = 64;  // samples at once
constexpr float LARGEST_ANGLE = 8192;    // up to which the reduction below is exact enough

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));

inline V load(const float* from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
}

inline void store(float* to, V value) { std::memcpy(to, &value, sizeof(V)); }

// Sums over all samples are sums of tiles' sums, here and below: one long float32 sum would lose two digits.
// C[m, n] += A B over `depth`, where A(i, k) = a[i * row + k * column]; n a multiple of UNIT, m of ROWS.
void product(float* c, int64_t c_row, const float* a, int64_t row, int64_t column, const float* b, int64_t b_row,
             int64_t m, int64_t n, int64_t depth) {
    for (int64_t j = 0; j < n; j += 2 * LANES)
        for (int64_t i = 0; i < m; i += ROWS) {
            V sum[ROWS][2] = {};
            const float *left = a + i * row, *right = b + j;
            for (int64_t k = 0; k < depth; ++k, left += column, right += b_row) {
                const V first = load(right), second = load(right + LANES);
                for (int r = 0; r < ROWS; ++r) {
                    sum[r][0] += left[r * row] * first;
                    sum[r][1] += left[r * row] * second;
                }
            }
            for (int r = 0; r < ROWS; ++r)
                for (int h = 0; h < 2; ++h) {
                    float* to = c + (i + r) * c_row + j + h * LANES;
                    store(to, load(to) + sum[r][h]);
                }
        }
}

// Sine and cosine of LANES angles: reduction by pi/2 in three parts and the polynomials of Cephes' sinf and cosf.
inline void sine_cosine(const float* angles, float* sines, float* cosines) {
    const V x = load(angles);
    const V quarters = (x * 0.636619772367581343f + 12582912.f) - 12582912.f;  // rounded
    const I quadrant = __builtin_convertvector(quarters, I);
    const V r = x - quarters * 1.5703125f - quarters * 4.837512969970703125e-4f - quarters * 7.54978995489188e-8f;
    const V z = r * r;
    const V s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
    const V c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1;
    const I odd = (quadrant & 1) != 0;
    const I sine = ((I)c & odd) | ((I)s & ~odd), cosine = ((I)s & odd) | ((I)c & ~odd);
    store(sines, (V)(sine ^ ((quadrant & 2) << 30)));
    store(cosines, (V)(cosine ^ (((quadrant + 1) & 2) << 30)));
    for (int i = 0; i < LANES; ++i)
        if (!(std::fabs(angles[i]) < LARGEST_ANGLE)) {
            sines[i] = std::sin(angles[i]);
            cosines[i] = std::cos(angles[i]);
        }
}

inline float total(V v) {
    float lanes[LANES];
    store(lanes, v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

inline int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

extern "C" {
struct Network {
    int64_t n_features, fea_pe, view_pe, hidden;           // H without padding
    const float *w1, *w1_transposed, *w2, *w2_transposed;  // [H, I], [I, H], [H, H], [H, H], padded
    const float *w3, *b1, *b2, *b3;                        // [3, H], [H], [H], [3]; padded, but for the 3
};
}

namespace {

// What a tile of samples needs.
struct Tile {
    const Network& net;
    const int64_t F, n_fea, n_view, H, I;
    std::vector<float> x, to_x, first, to_first, second, to_second;
    // Of each encoded angle: the input column that it is a multiple of, and the factor; features', then the view's.
    std::vector<int32_t> source;
    std::vector<float> factor, angles, sines, cosines;

    explicit Tile(const Network& network)
        : net(network),
          F(net.n_features),
          n_fea(F * net.fea_pe),
          n_view(3 * net.view_pe),
          H(padded(net.hidden, UNIT)),
          I(padded(F + 3 + 2 * n_fea + 2 * n_view, UNIT)) {
        for (auto* rows : {&x, &to_x}) rows->assign(TILE * I, 0);
        for (auto* rows : {&first, &to_first, &second, &to_second}) rows->assign(TILE * H, 0);
        for (auto* row : {&factor, &angles, &sines, &cosines}) row->assign(padded(n_fea + n_view, LANES), 0);
        source.assign(factor.size(), 0);
        for (int64_t i = 0; i < n_fea + n_view; ++i) {
            const bool of_view = i >= n_fea;
            const int64_t pe = of_view ? net.view_pe : net.fea_pe, number = of_view ? i - n_fea : i;
            source[i] = static_cast<int32_t>((of_view ? F : 0) + number / pe);
            factor[i] = std::ldexp(1.f, static_cast<int>(number % pe));
        }
    }

    // Columns of the input: features, view, sines and cosines of the features, of the view; frequencies fastest.
    void inputs(const float* features, const float* view, int64_t n) {
        for (int64_t s = 0; s < n; ++s) {
            float* row = x.data() + s * I;
            std::copy_n(features + s * F, F, row);
            std::copy_n(view + s * 3, 3, row + F);
            for (size_t i = 0; i < factor.size(); ++i) angles[i] = row[source[i]] * factor[i];
            for (size_t i = 0; i < factor.size(); i += LANES) sine_cosine(&angles[i], &sines[i], &cosines[i]);
            float* to = row + F + 3;
            to = std::copy_n(sines.data(), n_fea, to);
            to = std::copy_n(cosines.data(), n_fea, to);
            to = std::copy_n(sines.data() + n_fea, n_view, to);
            std::copy_n(cosines.data() + n_fea, n_view, to);
        }
    }

    // d loss / d (features, view) of a sample; either may be null.
    void through_inputs(int64_t s, float* to_features, float* to_view) {
        const float *row = x.data() + s * I, *to_row = to_x.data() + s * I;
        const auto encoded = [&](int64_t column, int64_t first_angle, int64_t width, int64_t own, int64_t count, float* to) {
            const float *sine = row + column, *cosine = sine + width;
            const float *to_sine = to_row + column, *to_cosine = to_sine + width;
            for (int64_t i = 0; i < width; ++i)
                angles[i] = factor[first_angle + i] * (to_sine[i] * cosine[i] - to_cosine[i] * sine[i]);
            std::copy_n(to_row + own, count, to);
            for (int64_t i = 0; i < width; ++i) to[source[first_angle + i] - own] += angles[i];
        };
        if (to_features) encoded(F + 3, 0, n_fea, 0, F, to_features);
        if (to_view) encoded(F + 3 + 2 * n_fea, n_fea, n_view, F, 3, to_view);
    }

    // out [TILE, H] = relu(bias + in weight), weight transposed [depth, H].
    void layer(float* out, const float* bias, const float* in, int64_t in_row, const float* weight,
               int64_t depth) const {
        for (int64_t s = 0; s < TILE; ++s) std::copy_n(bias, H, out + s * H);
        product(out, H, in, in_row, 1, weight, H, TILE, H, depth);
        for (int64_t i = 0; i < TILE * H; ++i) out[i] = out[i] > 0 ? out[i] : (out[i] == out[i] ? 0 : out[i]);  // NaN stays
    }
};

// gradient *= activation > 0
inline void stop_at_zero(std::vector<float>& gradient, const float* activation) {
    for (size_t i = 0; i < gradient.size(); ++i) gradient[i] = activation[i] > 0 ? gradient[i] : 0;
}

inline void add_rows(float* to, const std::vector<float>& rows, int64_t width) {
    for (int64_t c = 0; c < width; c += LANES) {
        V sum{};
        for (int64_t s = 0; s < TILE; ++s) sum += load(&rows[s * width + c]);
        store(to + c, load(to + c) + sum);
    }
}

}  // namespace

extern "C" {
// rgb [K, 3] of samples begin..end-1; hidden layers to first, second [K, H padded], unless null.
void network_forward(const Network* net, const float* features, const float* view, int64_t begin, int64_t end,
                     float* rgb, float* first, float* second) {
    const FlushDenormals flush;
    Tile tile(*net);
    const int64_t H = tile.H;
    for (int64_t at = begin; at < end; at += TILE) {
        const int64_t n = std::min(TILE, end - at);
        tile.inputs(features + at * net->n_features, view + at * 3, n);
        // A whole tile goes where it is kept.
        float *one = first && n == TILE ? first + at * H : tile.first.data();
        float *two = second && n == TILE ? second + at * H : tile.second.data();
        tile.layer(one, net->b1, tile.x.data(), tile.I, net->w1_transposed, tile.I);
        tile.layer(two, net->b2, one, H, net->w2_transposed, H);
        for (int64_t s = 0; s < n; ++s)
            for (int o = 0; o < 3; ++o) {
                V sum{};
                for (int64_t k = 0; k < H; k += LANES) sum += load(two + s * H + k) * load(net->w3 + o * H + k);
                rgb[(at + s) * 3 + o] = 1 / (1 + std::exp(-(net->b3[o] + total(sum))));
            }
        if (first && n < TILE) std::copy_n(one, n * H, first + at * H);
        if (second && n < TILE) std::copy_n(two, n * H, second + at * H);
    }
}

// Adds to the gradients of the parameters (padded as these) and writes those of features and view (which may be null).
void network_backward(const Network* net, const float* features, const float* view, int64_t begin, int64_t end,
                      const float* rgb, const float* first, const float* second, const float* to_rgb,
                      float* to_features, float* to_view, float* to_w1, float* to_b1, float* to_w2, float* to_b2,
                      float* to_w3, float* to_b3) {
    const FlushDenormals flush;
    Tile tile(*net);
    const int64_t H = tile.H, I = tile.I;
    for (int64_t at = begin; at < end; at += TILE) {
        const int64_t n = std::min(TILE, end - at);
        tile.inputs(features + at * net->n_features, view + at * 3, n);
        const float *one = first + at * H, *two = second + at * H;
        if (n < TILE) {  // what is beyond the last sample is read, times zero
            std::copy_n(one, n * H, tile.first.data());
            std::copy_n(two, n * H, tile.second.data());
            one = tile.first.data(), two = tile.second.data();
        }
        std::fill(tile.to_second.begin(), tile.to_second.end(), 0);  // also for samples beyond the last
        for (int o = 0; o < 3; ++o) {
            float to_out[TILE], sum = 0;
            for (int64_t s = 0; s < n; ++s) {
                const float value = rgb[(at + s) * 3 + o];
                to_out[s] = to_rgb[(at + s) * 3 + o] * value * (1 - value);
                sum += to_out[s];
            }
            to_b3[o] += sum;
            for (int64_t k = 0; k < H; k += LANES) {
                const V weight = load(net->w3 + o * H + k);
                V to_weight{};
                for (int64_t s = 0; s < n; ++s) {
                    float* to_hidden = &tile.to_second[s * H + k];
                    to_weight += to_out[s] * load(two + s * H + k);
                    store(to_hidden, load(to_hidden) + to_out[s] * weight);
                }
                store(to_w3 + o * H + k, load(to_w3 + o * H + k) + to_weight);
            }
        }
        stop_at_zero(tile.to_second, two);
        product(to_w2, H, tile.to_second.data(), 1, H, one, H, H, H, TILE);
        add_rows(to_b2, tile.to_second, H);
        std::fill(tile.to_first.begin(), tile.to_first.end(), 0);
        product(tile.to_first.data(), H, tile.to_second.data(), H, 1, net->w2, H, TILE, H, H);
        stop_at_zero(tile.to_first, one);
        product(to_w1, I, tile.to_first.data(), 1, H, tile.x.data(), I, H, I, TILE);
        add_rows(to_b1, tile.to_first, H);
        if (!to_features && !to_view) continue;
        std::fill(tile.to_x.begin(), tile.to_x.end(), 0);
        product(tile.to_x.data(), I, tile.to_first.data(), H, 1, net->w1, I, TILE, I, H);
        for (int64_t s = 0; s < n; ++s)
            tile.through_inputs(s, to_features ? to_features + (at + s) * net->n_features : nullptr,
                                to_view ? to_view + (at + s) * 3 : nullptr);
    }
}
}
