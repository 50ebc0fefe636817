// Colours of samples, forward and backward, for CPUs: products of lookups, the basis, and the feature network (TensoRF's
// MLP_Fea); see compiled_network.py.
//
// Letters: K samples, F features, P products, X inputs before their encoding (features, view, zeros), I inputs, H hidden
// units; P, X, I, H as stored here are padded with zeros to a multiple of UNIT. Inputs: X, then for each frequency the
// sines of all X and their cosines. Samples pass from lookups to colours a tile at a time, so that whatever lies between
// stays in the cache. All matrices are row-major; one block of a product is held in registers.
#include <cmath>

#include "denormals.h"
#include "density.h"
#include "lookups.h"
#include "shares.h"

extern "C" {
struct Colours {
    int64_t features, frequencies, products, inputs, hidden;  // F without padding, then P, X, H padded
    const float *basis, *basis_transposed;                    // [X, P], [P, X]
    const float *w1, *w1_transposed, *w2, *w2_transposed;     // [H, I], [I, H], [H, H], [H, H]
    const float *w3, *b1, *b2, *b3;                           // [3, H], [H], [H], [3]
    const float *xyz, *view;                                  // [K, 3] in [-1, 1], [B, 3]
    const int64_t* ray;                                       // [K], the row of `view`
    const Group* groups;
    int32_t n_groups, grid[3];
};
}

namespace {

using V = Wide;
using Bits = WideBits;
constexpr int LANES = WIDE;
// Of a block in registers: ROWS x 2 vectors; with fewer than 6, every sum waits for its last addition.
constexpr int ROWS = LANES == 16 ? 8 : 6;
constexpr int64_t UNIT = 2 * LANES, TILE = 64;  // samples at once
constexpr int64_t SHARE = 1 << 8;        // samples of a share of the forward pass
constexpr float LARGEST_ANGLE = 8192;    // up to which the reduction below is exact enough

inline V at(const float* from) { return load<V>(from); }

// done(i, j, sum) with sum = row i, columns j..j+LANES-1 of A B, where A(i, k) = a[i * row + k * column] over `depth`;
// m, n multiples of UNIT or TILE. `N` rows from i on and 2*LANES columns from j on are one block.
template <int N, class Done>
inline void block(const float* a, int64_t row, int64_t column, const float* b, int64_t b_row, int64_t i, int64_t j,
                  int64_t depth, const Done& done) {
    V sum[N][2];
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) sum[r][0] = sum[r][1] = V{};
    const float *left = a + i * row, *right = b + j;
    for (int64_t k = 0; k < depth; ++k, left += column, right += b_row) {
        const V first = at(right), second = at(right + LANES);
#pragma GCC unroll 8  // or some sums would stay in memory
        for (int r = 0; r < N; ++r) {
            sum[r][0] += left[r * row] * first;
            sum[r][1] += left[r * row] * second;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) {
        done(i + r, j, sum[r][0]);
        done(i + r, j + LANES, sum[r][1]);
    }
}

template <class Done>
inline void product(const float* a, int64_t row, int64_t column, const float* b, int64_t b_row, int64_t m, int64_t n,
                    int64_t depth, const Done& done) {
    const int64_t lower = (m + ROWS - 1) / ROWS * ROWS - m;  // so many blocks have a row less
    for (int64_t j = 0; j < n; j += 2 * LANES) {
        int64_t i = 0;
        for (; i < lower * (ROWS - 1); i += ROWS - 1) block<ROWS - 1>(a, row, column, b, b_row, i, j, depth, done);
        for (; i < m; i += ROWS) block<ROWS>(a, row, column, b, b_row, i, j, depth, done);
    }
}

// Writes, or adds, a product to `to`, rows of `width`. Sums over all samples are sums of tiles' sums: one long float32
// sum would lose two digits.
inline auto into(float* to, int64_t width) {
    return [=](int64_t i, int64_t j, V sum) { store(to + i * width + j, sum); };
}
inline auto onto(float* to, int64_t width) {
    return [=](int64_t i, int64_t j, V sum) { add(to + i * width + j, sum); };
}

// Sines and cosines of LANES angles below LARGEST_ANGLE: reduction by pi/2 in three parts and the polynomials of Cephes'
// sinf and cosf.
inline void sine_cosine(V x, float* sines, float* cosines) {
    const V quarters = (x * 0.636619772367581343f + 12582912.f) - 12582912.f;  // rounded
    const Bits quadrant = __builtin_convertvector(quarters, Bits);
    const V r = x - quarters * 1.5703125f - quarters * 4.837512969970703125e-4f - quarters * 7.54978995489188e-8f;
    const V z = r * r;
    const V s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
    const V c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1;
    const Bits odd = (quadrant & 1) != 0;
    const Bits sine = ((Bits)c & odd) | ((Bits)s & ~odd), cosine = ((Bits)s & odd) | ((Bits)c & ~odd);
    store(sines, (V)(sine ^ ((quadrant & 2) << 30)));
    store(cosines, (V)(cosine ^ (((quadrant + 1) & 2) << 30)));
}

inline float total(V v) {
    float lanes[LANES];
    store(lanes, v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// What a tile of samples needs; rows of samples beyond the last are never read as results.
struct Tile {
    const Colours& c;
    const int64_t P, X, H, I;
    Floats products, x, to_x, first, to_first, second, to_second, to_products;
    Block block;

    explicit Tile(const Colours& colours)
        : c(colours), P(c.products), X(c.inputs), H(c.hidden), I(X * (1 + 2 * c.frequencies)) {
        for (auto* rows : {&products, &to_products}) rows->assign(TILE * P, 0);
        for (auto* rows : {&x, &to_x}) rows->assign(TILE * I, 0);
        for (auto* rows : {&first, &to_first, &second, &to_second}) rows->assign(TILE * H, 0);
    }

    // Products of lookups of samples begin..begin+n-1.
    void look_up(int64_t begin, int64_t n) {
        block.fill(c.xyz + 3 * begin, n, c.grid);
        all_products(c.groups, c.n_groups, block, n, c.grid, products.data(), P);
    }

    // From the first X inputs of n samples all I.
    void encode(int64_t n) {
        Bits small = ~Bits{};
        const float largest = std::ldexp(LARGEST_ANGLE, static_cast<int>(1 - c.frequencies));
        for (int64_t s = 0; s < n; ++s)
            for (int64_t i = 0; i < X; i += LANES) {
                const V value = at(&x[s * I + i]);
                small &= (value < largest) & (value > -largest);
            }
        bool all_small = true;
        for (int i = 0; i < LANES; ++i) all_small &= small[i] != 0;
        for (int64_t s = 0; s < n; ++s) {
            float factor = 1;
            for (int64_t f = 0; f < c.frequencies; ++f, factor *= 2) {
                const float* from = &x[s * I];
                float *sines = &x[s * I + (1 + 2 * f) * X], *cosines = sines + X;
                if (all_small && f % 2 == 1) {  // of twice the angle; not more often, or errors would double each time
                    for (int64_t i = 0; i < X; i += LANES) {
                        const V sine = at(sines - 2 * X + i), cosine = at(sines - X + i);
                        store(sines + i, 2 * sine * cosine);
                        store(cosines + i, 1 - 2 * sine * sine);
                    }
                } else if (all_small) {
                    for (int64_t i = 0; i < X; i += LANES) sine_cosine(at(from + i) * factor, sines + i, cosines + i);
                } else {
                    for (int64_t i = 0; i < X; ++i) sines[i] = std::sin(from[i] * factor), cosines[i] = std::cos(from[i] * factor);
                }
            }
        }
    }

    // d loss / d the X inputs of a sample, from that of all I, in its place.
    void through_encoding(int64_t s) {
        const float* row = &x[s * I];
        float* to = &to_x[s * I];
        for (int64_t i = 0; i < X; i += LANES) {
            V sum = at(to + i);
            float factor = 1;
            for (int64_t f = 0; f < c.frequencies; ++f, factor *= 2) {
                const int64_t sine = (1 + 2 * f) * X + i, cosine = sine + X;
                sum += factor * (at(to + sine) * at(row + cosine) - at(to + cosine) * at(row + sine));
            }
            store(to + i, sum);
        }
    }

    // out [TILE, H] = relu(bias + in weight), weight transposed [depth, H]; NaN stays.
    void layer(float* out, const float* bias, const float* in, int64_t depth, const float* weight) const {
        product(in, depth, 1, weight, H, TILE, H, depth, [=](int64_t i, int64_t j, V sum) {
            sum += at(bias + j);
            store(out + i * H + j, where((sum > 0) | (sum != sum), sum));
        });
    }

    // Both hidden layers of samples from..from+n-1 into one, two [TILE, H]; leaves their products and inputs here.
    void hidden_layers(int64_t from, int64_t n, float* one, float* two) {
        look_up(from, n);
        product(products.data(), P, 1, c.basis_transposed, X, TILE, X, P, into(x.data(), I));
        for (int64_t s = 0; s < n; ++s) std::copy_n(c.view + 3 * c.ray[from + s], 3, &x[s * I + c.features]);
        encode(n);
        layer(one, c.b1, x.data(), I, c.w1_transposed);
        layer(two, c.b2, one, H, c.w2_transposed);
    }
};

// Where the gradients of a share lie: basis transposed [P, X], w1 [H, I], b1, w2 [H, H], b2, w3 [3, H], b3 [UNIT].
struct Gradients {
    float *basis, *w1, *b1, *w2, *b2, *w3, *b3, *end;
    Gradients(const Tile& tile, float* from) {
        basis = from;
        w1 = basis + tile.P * tile.X;
        b1 = w1 + tile.H * tile.I;
        w2 = b1 + tile.H;
        b2 = w2 + tile.H * tile.H;
        w3 = b2 + tile.H;
        b3 = w3 + 3 * tile.H;
        end = b3 + UNIT;
    }
};

void forward_share(Tile& tile, int64_t begin, int64_t end, int64_t kept, float* rgb, float* inputs, float* first,
                   float* second) {
    const Colours& c = tile.c;
    const int64_t X = tile.X, H = tile.H, I = tile.I;
    for (int64_t from = begin; from < end; from += TILE) {
        const int64_t n = std::min(TILE, end - from);
        const bool keep = from + TILE <= kept;
        float* one = keep ? first + from * H : tile.first.data();
        float* two = keep ? second + from * H : tile.second.data();
        tile.hidden_layers(from, n, one, two);
        for (int64_t s = 0; keep && s < n; ++s) std::copy_n(&tile.x[s * I], X, inputs + (from + s) * X);
        float out[3 * TILE];
        for (int64_t s = 0; s < n; ++s) {
            V sum[3] = {};
            for (int64_t k = 0; k < H; k += LANES)
                for (int o = 0; o < 3; ++o) sum[o] += at(two + s * H + k) * at(c.w3 + o * H + k);
            for (int o = 0; o < 3; ++o) out[3 * s + o] = -(c.b3[o] + total(sum[o]));
        }
        for (int64_t i = 0; i < 3 * n; ++i) rgb[3 * from + i] = 1 / (1 + exp_of(out[i]));
    }
}

// to_products [end - begin, P]: of the share's samples.
void backward_share(Tile& tile, int64_t begin, int64_t end, int64_t kept, const float* rgb, const float* inputs,
                    const float* first, const float* second, const float* to_rgb, float* to_products, float* to_view,
                    const Gradients& sums) {
    const Colours& c = tile.c;
    const int64_t P = tile.P, X = tile.X, H = tile.H, I = tile.I;
    for (int64_t from = begin; from < end; from += TILE) {
        const int64_t n = std::min(TILE, end - from);
        const float *one = tile.first.data(), *two = tile.second.data();
        if (from + TILE <= kept) {
            one = first + from * H, two = second + from * H;
            tile.look_up(from, n);
            for (int64_t s = 0; s < n; ++s) std::copy_n(inputs + (from + s) * X, X, &tile.x[s * I]);
            tile.encode(n);
        } else {
            tile.hidden_layers(from, n, tile.first.data(), tile.second.data());
        }
        float to_out[TILE][3] = {}, to_b3[3] = {};
        for (int64_t s = 0; s < n; ++s)
            for (int o = 0; o < 3; ++o) {
                const float value = rgb[(from + s) * 3 + o];
                to_out[s][o] = to_rgb[(from + s) * 3 + o] * value * (1 - value);
                to_b3[o] += to_out[s][o];
            }
        for (int o = 0; o < 3; ++o) sums.b3[o] += to_b3[o];
        float* to_second = tile.to_second.data();
        for (int64_t k = 0; k < H; k += LANES) {
            V to_weight[3] = {}, to_bias{};
            const V weight[3] = {at(c.w3 + k), at(c.w3 + H + k), at(c.w3 + 2 * H + k)};
            for (int64_t s = 0; s < TILE; ++s) {
                const V hidden = at(two + s * H + k);
                V sum{};
                for (int o = 0; o < 3; ++o) {
                    to_weight[o] += to_out[s][o] * hidden;
                    sum += to_out[s][o] * weight[o];
                }
                sum = where(hidden > 0, sum);
                to_bias += sum;
                store(to_second + s * H + k, sum);
            }
            for (int o = 0; o < 3; ++o) add(sums.w3 + o * H + k, to_weight[o]);
            add(sums.b2 + k, to_bias);
        }
        product(to_second, 1, H, one, H, H, H, TILE, onto(sums.w2, H));
        float* to_first = tile.to_first.data();
        product(to_second, H, 1, c.w2, H, TILE, H, H, [=](int64_t i, int64_t j, V sum) {
            store(to_first + i * H + j, where(at(one + i * H + j) > 0, sum));
        });
        for (int64_t k = 0; k < H; k += LANES) {
            V sum{};
            for (int64_t s = 0; s < TILE; ++s) sum += at(to_first + s * H + k);
            add(sums.b1 + k, sum);
        }
        product(to_first, 1, H, tile.x.data(), I, H, I, TILE, onto(sums.w1, I));
        product(to_first, H, 1, c.w1, I, TILE, I, H, into(tile.to_x.data(), I));
        for (int64_t s = 0; s < TILE; ++s) tile.through_encoding(s);
        product(tile.products.data(), 1, P, tile.to_x.data(), I, P, X, TILE, onto(sums.basis, X));
        float* out = n == TILE ? to_products + (from - begin) * P : tile.to_products.data();
        product(tile.to_x.data(), I, 1, c.basis, P, TILE, P, c.features, into(out, P));
        if (n < TILE) std::copy_n(out, n * P, to_products + (from - begin) * P);
        if (to_view)
            for (int64_t s = 0; s < n; ++s) std::copy_n(&tile.to_x[s * I + c.features], 3, to_view + (from + s) * 3);
    }
}

}  // namespace

extern "C" {
extern const int64_t padding = UNIT;

// rgb [K, 3] of samples 0..n-1; for the backward pass, of whole tiles among the first `kept` samples: inputs [kept, X],
// both hidden layers [kept, H].
int32_t colours_forward(const Colours* colours, int64_t n, int64_t kept, float* rgb, float* inputs, float* first,
                        float* second, int32_t threads) try {
    std::vector<Tile> tiles(threads, Tile(*colours));
    return share_out((n + SHARE - 1) / SHARE, threads, [&](int64_t share, int32_t thread) {
        const FlushDenormals flush;
        forward_share(tiles[thread], share * SHARE, std::min((share + 1) * SHARE, n), kept, rgb, inputs, first, second);
    });
} catch (...) {
    return OUT_OF_MEMORY;
}

// Of samples begin..end-1: to_products [end - begin, P], to_view [K, 3] (which may be null), and adds the gradients of
// basis and network to `own` [shares, size], as Gradients lays them out, which holds nothing yet when begin is 0. Each
// share of the samples has sums of its own: they do not depend on the number of threads.
int32_t colours_backward(const Colours* colours, int64_t begin, int64_t end, int64_t kept, const float* rgb,
                         const float* inputs, const float* first, const float* second, const float* to_rgb,
                         float* to_products, float* to_view, float* own, int64_t shares, int32_t threads) try {
    std::vector<Tile> tiles(threads, Tile(*colours));
    const int64_t size = Gradients(tiles[0], own).end - own, n_tiles = (end - begin + TILE - 1) / TILE;
    return share_out(shares, threads, [&](int64_t share, int32_t thread) {
        const FlushDenormals flush;
        const int64_t from = begin + n_tiles * share / shares * TILE;
        const int64_t to = std::min(begin + n_tiles * (share + 1) / shares * TILE, end);
        if (begin == 0) std::fill_n(own + share * size, size, 0.f);
        backward_share(tiles[thread], from, to, kept, rgb, inputs, first, second, to_rgb,
                       to_products + (from - begin) * tiles[0].P, to_view, Gradients(tiles[thread], own + share * size));
    });
} catch (...) {
    return OUT_OF_MEMORY;
}

// sums [size] of own [shares, size].
int32_t sum_shares(const float* own, int64_t shares, int64_t size, float* sums, int32_t threads) {
    return share_range(size, 1 << 12, threads, [&](int64_t low, int64_t high) {
        std::copy(own + low, own + high, sums + low);
        for (int64_t share = 1; share < shares; ++share)
            for (int64_t i = low; i < high; ++i) sums[i] += own[share * size + i];
    });
}
}
