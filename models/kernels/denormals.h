// While one of these exists, numbers below 1.2e-38 count as zero in this thread. With them the trailing samples behind
// a surface, which nobody sees, would take most of the time: CPUs compute them a hundred times slower.
#pragma once
#if defined(__SSE__)
#include <xmmintrin.h>

struct FlushDenormals {
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
};
#else
struct FlushDenormals {
    FlushDenormals() {}  // other CPUs compute them at full speed
};
#endif
