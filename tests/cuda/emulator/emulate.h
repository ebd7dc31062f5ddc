// The part of CUDA C++ that the kernels use, for a C++17 compiler. See scheduler.h for how threads
// run.
//
// Floating point is that of the host: exact operations agree with a device, the fast approximations
// (__expf, ...) are the accurate functions here.
#pragma once

#include "scheduler.h"

#include <cassert>
#include <cmath>

#define __global__ __attribute__((used))  // the build script looks for this
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static thread_local
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

#define threadIdx (emulate::here.thread)
#define blockIdx (emulate::here.block)
#define blockDim (emulate::here.block_dim)
#define gridDim (emulate::here.grid_dim)
constexpr int warpSize = 32;

#define EMULATE_VECTORS(type, name)                                  \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
    struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };   \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATE_VECTORS(float, float)
EMULATE_VECTORS(int, int)
EMULATE_VECTORS(unsigned, uint)

// -------------------------------------------------------------------------------------------------
// bf16

// Has no conversion operators: as on a device, kernels call conversion functions.
struct __nv_bfloat16 {
    unsigned short bits;
};
inline float __uint_as_float(unsigned x) {
    float y;
    memcpy(&y, &x, sizeof y);
    return y;
}
inline unsigned __float_as_uint(float x) {
    unsigned y;
    memcpy(&y, &x, sizeof y);
    return y;
}
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return {x}; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
// Rounds to nearest, ties to even. Every NaN becomes 0x7FFF, as on a device.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) {
        return {0x7FFF};
    }
    return {(unsigned short)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

// ----------------------------------------------------------------------------------------------
// arithmetic

// Macros, because the C library declares functions of some of these names.
#define __expf(x) expf(x)
#define __exp10f(x) powf(10.0f, x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
#define rsqrtf(x) (1.0f / sqrtf(x))
#define __frsqrt_rn(x) (1.0f / sqrtf(x))

inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }

#define EMULATE_MIN_MAX(type)                                 \
    inline type min(type x, type y) { return y < x ? y : x; } \
    inline type max(type x, type y) { return x < y ? y : x; }
EMULATE_MIN_MAX(int)
EMULATE_MIN_MAX(unsigned)
EMULATE_MIN_MAX(long)
EMULATE_MIN_MAX(unsigned long)
EMULATE_MIN_MAX(long long)
EMULATE_MIN_MAX(unsigned long long)
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T>
inline T __ldg(const T* p) {
    return *p;
}
template <class T>
inline T atomicAdd(T* p, T x) {
    static_assert(!std::is_floating_point<T>::value, "float atomics add in any order");
    return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emulate::fail("trap"); }

// ----------------------------------------------------------------------------------------------
// barriers, shuffles, votes

namespace emulate {

inline unsigned char* dynamic_shared() { return here.worker->shared; }

inline void check_aligned(const void* p, size_t to) {
    if (reinterpret_cast<size_t>(p) % to != 0) {
        fail("address %p is not aligned to %zu bytes", p, to);
    }
}

struct Shuffle {
    unsigned source;
    uint64_t value;
};
inline void exchange(void* const* arguments, unsigned mask) {
    uint64_t values[WARP];
    memset(values, POISON, sizeof values);  // for lanes outside the mask
    for (unsigned set = mask; set != 0; set &= set - 1) {
        const unsigned lane = __builtin_ctz(set);
        values[lane] = static_cast<Shuffle*>(arguments[lane])->value;
    }
    for (unsigned set = mask; set != 0; set &= set - 1) {
        auto* shuffle = static_cast<Shuffle*>(arguments[__builtin_ctz(set)]);
        shuffle->value = values[shuffle->source];
    }
}
inline void vote(void* const* arguments, unsigned mask) {
    unsigned result = 0;
    for (unsigned set = mask; set != 0; set &= set - 1) {
        const unsigned lane = __builtin_ctz(set);
        result |= unsigned(*static_cast<unsigned*>(arguments[lane]) != 0) << lane;
    }
    for (unsigned set = mask; set != 0; set &= set - 1) {
        *static_cast<unsigned*>(arguments[__builtin_ctz(set)]) = result;
    }
}
template <class T>
T shuffle(const char* operation, unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
    Shuffle shuffle{source, 0};
    memcpy(&shuffle.value, &value, sizeof value);
    here.worker->wait_in_warp(&exchange, operation, mask, &shuffle);
    memcpy(&value, &shuffle.value, sizeof value);
    return value;
}
inline int lane() { return int(here.worker->number() % WARP); }

}  // namespace emulate

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulate::here.worker->wait_in_block(0, {file, line});
}
inline int __syncthreads_count(int x, const char* file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
    return emulate::here.worker->wait_in_block(x != 0, {file, line});
}
inline int __syncthreads_or(int x, const char* file = __builtin_FILE(),
                            int line = __builtin_LINE()) {
    return emulate::here.worker->wait_in_block(x != 0, {file, line}) > 0;
}
inline int __syncthreads_and(int x, const char* file = __builtin_FILE(),
                             int line = __builtin_LINE()) {
    return emulate::here.worker->wait_in_block(x == 0, {file, line}) == 0;
}

inline void __syncwarp(unsigned mask = ~0u) {
    emulate::here.worker->wait_in_warp(&emulate::nothing, "__syncwarp", mask, nullptr);
}
inline unsigned __ballot_sync(unsigned mask, int x) {
    unsigned value = x != 0;
    emulate::here.worker->wait_in_warp(&emulate::vote, "a vote", mask, &value);
    return value;
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, x == 0) == 0; }

// `width` (a power of two) splits the warp in segments; a source outside the caller's segment is
// the caller itself.
template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
    const int first = emulate::lane() & ~(width - 1);
    return emulate::shuffle("__shfl_sync", mask, x, unsigned(first | (source & (width - 1))));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int flip, int width = 32) {
    const int lane = emulate::lane(), end = (lane & ~(width - 1)) + width;
    return emulate::shuffle("__shfl_xor_sync", mask, x,
                            unsigned((lane ^ flip) < end ? lane ^ flip : lane));
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32) {
    const int lane = emulate::lane(), end = (lane & ~(width - 1)) + width;
    return emulate::shuffle("__shfl_down_sync", mask, x,
                            unsigned(lane + int(delta) < end ? lane + int(delta) : lane));
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32) {
    const int lane = emulate::lane(), first = lane & ~(width - 1);
    return emulate::shuffle("__shfl_up_sync", mask, x,
                            unsigned(lane - int(delta) >= first ? lane - int(delta) : lane));
}

#include "tensor.h"
