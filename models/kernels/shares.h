// Shares of a step's work, side by side.
//
// Threads live as long as a call: starting one takes some 20 microseconds, which is less than waking one through
// Python, none of them ever waits by spinning (see threads.py), and a process may fork between calls.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <new>
#include <thread>
#include <vector>

// Numbers that begin with a cache line, so that no vector of them spans two; their values are not set unless given.
template <class T>
struct Aligned {
    using value_type = T;
    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* at, size_t) { ::operator delete(at, std::align_val_t(64)); }
    template <class U>
    void construct(U*) {}
    template <class U>
    void construct(U* at, const U& value) { *at = value; }
    friend bool operator==(const Aligned&, const Aligned&) { return true; }
    friend bool operator!=(const Aligned&, const Aligned&) { return false; }
};
using Floats = std::vector<float, Aligned<float>>;

// What functions that Python calls return: no exception may leave them, nor a thread, or the process would end. All that
// is thrown here is for want of memory.
constexpr int32_t GOOD = 0, OUT_OF_MEMORY = 1;

// body(share, thread) for shares 0..n-1, each as soon as one of `threads` threads is free; `thread` is its number. After
// a share that failed no other is begun.
template <class Body>
[[nodiscard]] int32_t share_out(int64_t n, int32_t threads, const Body& body) {
    std::atomic<int64_t> next{0};
    std::atomic<int32_t> status{GOOD};
    const auto work = [&](int32_t thread) {
        try {
            for (int64_t share; (share = next.fetch_add(1)) < n;) body(share, thread);
        } catch (...) {
            status = OUT_OF_MEMORY;
            next = n;
        }
    };
    std::vector<std::thread> helpers;
    try {
        for (int32_t thread = 1; thread < std::min<int64_t>(threads, n); ++thread) helpers.emplace_back(work, thread);
    } catch (const std::exception&) {  // no more threads, or no memory for them: those there are do everything
    }
    work(0);
    for (auto& helper : helpers) helper.join();
    return status;
}

// body(first, end) for 0..n-1, `size` at a time.
template <class Body>
[[nodiscard]] int32_t share_range(int64_t n, int64_t size, int32_t threads, const Body& body) {
    return share_out((n + size - 1) / size, threads,
                     [&](int64_t share, int32_t) { body(share * size, std::min((share + 1) * size, n)); });
}
