// One step of Adam for CPUs, in one pass over memory; see compiled_adam.py.
#include <cmath>
#include <cstdint>

#include "denormals.h"
#include "shares.h"

extern "C" {
// A parameter, its gradient, first and second moment [n]. step_size = lr / (1 - beta1^t), rest = 1 / sqrt(1 - beta2^t).
struct Parameter {
    float* value;
    const float* gradient;
    float *mean, *square;
    int64_t n;
    float beta1, beta2, step_size, rest, eps;
};

int32_t adam(const Parameter* parameters, int64_t n_parameters, int32_t threads) try {
    constexpr int64_t SHARE = 1 << 16;  // numbers
    std::vector<std::pair<const Parameter*, int64_t>> shares;
    for (int64_t number = 0; number < n_parameters; ++number)
        for (int64_t first = 0; first < parameters[number].n; first += SHARE) shares.emplace_back(&parameters[number], first);
    return share_out(static_cast<int64_t>(shares.size()), threads, [&](int64_t share, int32_t) {
        const FlushDenormals flush;
        const auto [p, first] = shares[share];
        const float beta1 = p->beta1, beta2 = p->beta2, step_size = p->step_size, rest = p->rest, eps = p->eps;
        float *__restrict value = p->value, *__restrict mean = p->mean, *__restrict square = p->square;
        const float* __restrict gradient = p->gradient;
        for (int64_t i = first; i < std::min(first + SHARE, p->n); ++i) {
            const float g = gradient[i];
            mean[i] += (1 - beta1) * (g - mean[i]);
            square[i] = beta2 * square[i] + (1 - beta2) * g * g;
            value[i] -= step_size * mean[i] / (std::sqrt(square[i]) * rest + eps);
        }
    });
} catch (...) {
    return OUT_OF_MEMORY;
}
}
