// Sums of absolute values and their gradients for CPUs, one pass over memory each; see compiled_l1.py.
#include <cmath>
#include <cstdint>

#include "shares.h"

extern "C" {
struct Array {
    const float* values;  // [n]
    float* gradient;      // [n], where a backward pass writes
    int64_t n;
    float scale;  // of the gradient
};
}

namespace {

constexpr int64_t SHARE = 1 << 16, RUN = 1 << 10, LANES = 16;  // numbers; those of a run are summed in single precision

struct Part {
    int64_t array, first, end;
    double sum;
};

std::vector<Part> parts_of(const Array* arrays, int64_t n_arrays) {
    std::vector<Part> parts;
    for (int64_t array = 0; array < n_arrays; ++array)
        for (int64_t first = 0; first < arrays[array].n; first += SHARE)
            parts.push_back({array, first, std::min(first + SHARE, arrays[array].n), 0});
    return parts;
}

double absolute_sum(const float* values, int64_t n) {
    double sum = 0;
    for (int64_t first = 0; first < n; first += RUN) {
        const int64_t end = std::min(first + RUN, n);
        float lanes[LANES] = {};
        int64_t i = first;
        for (; i + LANES <= end; i += LANES)
            for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += std::fabs(values[i + lane]);
        for (; i < end; ++i) lanes[0] += std::fabs(values[i]);
        for (const float lane : lanes) sum += lane;
    }
    return sum;
}

}  // namespace

extern "C" {
// sums [n_arrays]: of the absolute values of each.
int32_t l1_forward(const Array* arrays, int64_t n_arrays, double* sums, int32_t threads) try {
    auto parts = parts_of(arrays, n_arrays);
    const int32_t status = share_out(static_cast<int64_t>(parts.size()), threads, [&](int64_t share, int32_t) {
        Part& part = parts[share];
        part.sum = absolute_sum(arrays[part.array].values + part.first, part.end - part.first);
    });
    std::fill_n(sums, n_arrays, 0.0);
    for (const Part& part : parts) sums[part.array] += part.sum;
    return status;
} catch (...) {
    return OUT_OF_MEMORY;
}

// Each gradient: scale * sign of the values, 0 of zeros.
int32_t l1_backward(const Array* arrays, int64_t n_arrays, int32_t threads) try {
    const auto parts = parts_of(arrays, n_arrays);
    return share_out(static_cast<int64_t>(parts.size()), threads, [&](int64_t share, int32_t) {
        const Array& array = arrays[parts[share].array];
        const float *__restrict values = array.values, scale = array.scale;
        float* __restrict gradient = array.gradient;
        for (int64_t i = parts[share].first; i < parts[share].end; ++i)
            gradient[i] = scale * static_cast<float>((values[i] > 0) - (values[i] < 0));
    });
} catch (...) {
    return OUT_OF_MEMORY;
}
}
