// From a density feature to a sample's alpha; components/compositing.py.
#pragma once
#include <cmath>

// log(1 + e^x), as accurate as log1p and several times faster (Kahan's correction of 1 + e's rounding).
inline float softplus_of(float x) {
    const float e = std::exp(x), u = 1 + e;
    return u == 1 ? e : std::log(u) * (e / (u - 1));
}

inline float alpha_of(float feature, float distance, bool softplus, float shift) {
    const float x = softplus ? feature + shift : feature;
    const float relu = x > 0 ? x : (x == x ? 0 : x);  // NaN stays
    const float sigma = softplus ? (x > 20 ? x : softplus_of(x)) : relu;
    return 1 - std::exp(-sigma * distance);
}
