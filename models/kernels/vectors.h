// What a CPU computes side by side: WIDE numbers, as many as one of its registers holds.
#pragma once
#include <cstdint>
#include <cstring>

namespace {

// Compilers take wider vectors apart through memory, five times slower. Tuned on x86-64 with AVX-512 and with AVX2.
// Elsewhere (ARM, SSE2) the compiler makes of 8 numbers what it can, two registers of 4 as a rule: neither tuned nor
// timed, but with SSE2 all tests against the definitions hold.
#if defined(__AVX512F__)
constexpr int WIDE = 16;
#else
constexpr int WIDE = 8;
#endif
typedef float Wide __attribute__((vector_size(4 * WIDE)));
typedef int32_t WideBits __attribute__((vector_size(4 * WIDE)));

// By memcpy, which compilers turn into one unaligned move: channels begin anywhere.
template <class V>
inline V load(const float* from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
}

template <class V, class T>
inline void store(T* to, V value) {
    std::memcpy(to, &value, sizeof(V));
}

inline Wide where(WideBits mask, Wide value) { return (Wide)((WideBits)value & mask); }

// The largest whole numbers that are not above x, |x| < 2^31.
inline WideBits floor_of(Wide x) {
    const WideBits towards_zero = __builtin_convertvector(x, WideBits);
    return towards_zero + (x < __builtin_convertvector(towards_zero, Wide));  // a comparison's true is -1
}

}  // namespace
