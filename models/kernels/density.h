// From a density feature to a sample's alpha; components/compositing.py. Without branches, so that compilers compute
// several samples side by side.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// e^x: reduction by ln 2 in two parts and the polynomial of Cephes' expf. Below -87 it stays at 1e-38. NaN stays.
inline float exp_of(float x) {
    x = x < -87 ? -87 : x;
    x = x > 88 ? 88 : x;
    // 1.5 * 2^23: the sum is rounded, and its last bits are the whole number.
    const float shifted = x * 1.44269504088896341f + 12582912.f, whole = shifted - 12582912.f;
    const float r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
    float y = ((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f;
    y = ((y * r + 1.6666665459e-1f) * r + 5.0000001201e-1f) * r * r + r + 1;
    uint32_t bits;  // without signs: NaN, whose bits mean nothing, must not overflow
    std::memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4b400000u + 127u) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return y * power;
}

// log x of normal x > 0: Cephes' logf. NaN stays.
inline float log_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    const int32_t shifted = bits - 0x3f3504f3;  // sqrt(1/2): mantissas from there to sqrt(2)
    const int32_t exponent = shifted >> 23, mantissa_bits = (shifted & 0x7fffff) + 0x3f3504f3;
    float m;
    std::memcpy(&m, &mantissa_bits, 4);
    m -= 1;
    float y = ((7.0376836292e-2f * m - 1.1514610310e-1f) * m + 1.1676998740e-1f) * m - 1.2420140846e-1f;
    y = ((y * m + 1.4249322787e-1f) * m - 1.6668057665e-1f) * m + 2.0000714765e-1f;
    y = (y * m - 2.4999993993e-1f) * m + 3.3333331174e-1f;
    const float e = static_cast<float>(exponent), z = m * m;
    return m + (y * m * z + e * -2.12194440e-4f - 0.5f * z) + e * 0.693359375f;
}

// log(1 + e^x), as accurate as log1p (Kahan's correction of 1 + e's rounding).
inline float softplus_of(float x) {
    const float e = exp_of(x), u = 1 + e;
    return u == 1 ? e : log_of(u) * (e / (u - 1));
}

inline float sigma_of(float feature, bool softplus, float shift) {
    const float x = softplus ? feature + shift : feature;
    const float relu = x > 0 ? x : (x == x ? 0 : x);  // NaN stays
    return softplus ? (x > 20 ? x : softplus_of(x)) : relu;
}

inline float alpha_of(float feature, float distance, bool softplus, float shift) {
    return 1 - exp_of(-sigma_of(feature, softplus, shift) * distance);
}
