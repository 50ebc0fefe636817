// One step of Adam for CPUs, in one pass over memory; see compiled_adam.py.
#include <cmath>
#include <cstdint>

#include "denormals.h"

// Updates parameter, first and second moment at first..end-1. step_size = lr / (1 - beta1^t), rest = 1 / sqrt(1 - beta2^t).
extern "C" void adam(float* parameter, const float* gradient, float* mean, float* square, int64_t first, int64_t end,
                     float beta1, float beta2, float step_size, float rest, float eps) {
    const FlushDenormals flush;
    for (int64_t i = first; i < end; ++i) {
        const float g = gradient[i];
        mean[i] += (1 - beta1) * (g - mean[i]);
        square[i] = beta2 * square[i] + (1 - beta2) * g * g;
        parameter[i] -= step_size * mean[i] / (std::sqrt(square[i]) * rest + eps);
    }
}
