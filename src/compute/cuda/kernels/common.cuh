// Shared by all kernels: number types, reductions in a fixed order, 16-byte accesses and wrappers
// of tensor-core instructions.
//
// The kernels compile in two ways: with nvcc for a GPU (sm_80 features only), and, with
// BRADLEY_EMULATE defined, as plain C++17 against emulate.h, which runs them on a CPU.
#pragma once

#ifdef BRADLEY_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#endif
#include <math.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;

// An entry point with an unmangled name: KERNEL void name(...) { ... }
#define KERNEL extern "C" __global__

// Entry points name_f32 and name_bf16 of a device function `template <class T> void name(...)`:
//     INSTANTIATE(swiglu, (T* y, const T* gate_up, int tokens, int width),
//                 (y, gate_up, tokens, width))
#define INSTANTIATE_ONE(name, suffix, type, parameters, arguments)    \
    namespace name##_in_##suffix {                                    \
        using T = type;                                               \
        KERNEL void name##_##suffix parameters { name<T> arguments; } \
    }                                                                 \
    using name##_in_##suffix::name##_##suffix;
#define INSTANTIATE(name, parameters, arguments)             \
    INSTANTIATE_ONE(name, f32, float, parameters, arguments) \
    INSTANTIATE_ONE(name, bf16, bf16, parameters, arguments)

// Entry points name_capped_f32 and name_capped_bf16 of name<T, true>, the variant with a soft-cap.
#define INSTANTIATE_CAPPED_ONE(name, suffix, type, parameters, arguments)          \
    namespace name##_capped_in_##suffix {                                          \
        using T = type;                                                            \
        KERNEL void name##_capped_##suffix parameters { name<T, true> arguments; } \
    }                                                                              \
    using name##_capped_in_##suffix::name##_capped_##suffix;
#define INSTANTIATE_CAPPED(name, parameters, arguments)             \
    INSTANTIATE_CAPPED_ONE(name, f32, float, parameters, arguments) \
    INSTANTIATE_CAPPED_ONE(name, bf16, bf16, parameters, arguments)

// The block's dynamic shared memory, 16-byte aligned, as `type* name`.
#ifdef BRADLEY_EMULATE
#define SHARED(type, name) type* name = reinterpret_cast<type*>(emulate::dynamic_shared())
#else
#define SHARED(type, name)                                          \
    extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared)
#endif

// ----------------------------------------------------------------------------------------------
// numbers

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

// Rounds to the nearest value of T, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// Packs two bf16 into one register, with `low` in the lower half (the lower address, the lower
// column of a fragment).
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifdef BRADLEY_EMULATE
    const uint32_t l = __bfloat16_as_ushort(__float2bfloat16_rn(low));
    const uint32_t h = __bfloat16_as_ushort(__float2bfloat16_rn(high));
    return l | (h << 16);
#else
    // This compiles to one instruction.
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
#endif
}
// Unpack one half of a pair. A bf16 is the upper half of a float.
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

// -------------------------------------------------------------------------------------------
// soft-cap
//
// Kernels with a template parameter CAPPED exist twice, so that the variant without a soft-cap has
// no instruction for it. The cap is the last parameter of the other variant.

// Returns cap·tanh(x / cap), which is between -cap and cap (arXiv:2408.00118, section 2).
__device__ __forceinline__ float soft_cap(float x, float cap) { return cap * tanhf(x / cap); }

// Returns the derivative of soft_cap, given its result y: 1 − (y / cap)². For −∞, the value
// of masked scores, it is 0.
__device__ __forceinline__ float soft_cap_slope(float y, float cap) {
    const float t = fmaxf(y / cap, -1.0f);
    return 1.0f - t * t;
}

// -------------------------------------------------------------------------------------------
// reductions

constexpr unsigned FULL_WARP = 0xffffffffu;

struct Sum {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Butterfly reduction: every lane ends with the same bits, because op is commutative.
template <class Op>
__device__ __forceinline__ float warp_reduce(float x, Op op) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        x = op(x, __shfl_xor_sync(FULL_WARP, x, offset));
    }
    return x;
}

__device__ __forceinline__ int flat_thread() {
    return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
__device__ __forceinline__ int flat_threads() { return int(blockDim.x * blockDim.y * blockDim.z); }

// Reduces over a whole block. The block must be a multiple of 32 threads, and all of them must
// call. Every thread gets the result. The warps' values are combined from warp 0 up. The first
// barrier makes it safe to call the function again at once.
template <class Op>
__device__ __forceinline__ float block_reduce(float x, Op op) {
    __shared__ float of_warp[32];
    x = warp_reduce(x, op);
    __syncthreads();
    if (flat_thread() % 32 == 0) {
        of_warp[flat_thread() / 32] = x;
    }
    __syncthreads();
    float all = of_warp[0];
    for (int w = 1; w < flat_threads() / 32; ++w) {
        all = op(all, of_warp[w]);
    }
    return all;
}

__device__ __forceinline__ float warp_sum(float x) { return warp_reduce(x, Sum()); }
__device__ __forceinline__ float warp_max(float x) { return warp_reduce(x, Max()); }
__device__ __forceinline__ float block_sum(float x) { return block_reduce(x, Sum()); }
__device__ __forceinline__ float block_max(float x) { return block_reduce(x, Max()); }

// ----------------------------------------------------------------------------------------------
// 16-byte accesses

// 16 bytes of T: N = 4 floats or N = 8 bf16.
template <class T>
struct alignas(16) Vector {
    static constexpr int N = 16 / int(sizeof(T));
    T v[N];
};

__device__ __forceinline__ bool is_aligned_16(const void* p) {
    return (reinterpret_cast<size_t>(p) & 15) == 0;
}

// True if rows of `stride` elements, starting at p, are all 16-byte aligned.
template <class T>
__device__ __forceinline__ bool rows_aligned_16(const T* p, long long stride) {
    return is_aligned_16(p) && stride * (long long)sizeof(T) % 16 == 0;
}

// The address must be 16-byte aligned. A misaligned one faults on a GPU and in the emulator.
template <class T>
__device__ __forceinline__ Vector<T> load_16(const T* p) {
#ifdef BRADLEY_EMULATE
    emulate::check_aligned(p, 16);
#endif
    return *reinterpret_cast<const Vector<T>*>(p);
}
template <class T>
__device__ __forceinline__ void store_16(T* p, const Vector<T>& x) {
#ifdef BRADLEY_EMULATE
    emulate::check_aligned(p, 16);
#endif
    *reinterpret_cast<Vector<T>*>(p) = x;
}

// ----------------------------------------------------------------------------------------------
// tensor cores, async copies
//
// In the layouts below, l is the lane of a warp, g = l / 4, t = l % 4. A register holds two bf16,
// the lower half first.

// d += a · b of a 16×16 by a 16×8 matrix of bf16, summed in f32.
//   a[0]: A[g, 2t..2t+1]   a[1]: A[g+8, 2t..]   a[2]: A[g, 2t+8..]   a[3]: A[g+8, 2t+8..]
//   b[0]: B[2t..2t+1, g]   b[1]: B[2t+8.., g]
//   d[0], d[1]: D[g, 2t..2t+1]   d[2], d[3]: D[g+8, 2t..2t+1]
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
#ifdef BRADLEY_EMULATE
    emulate::mma_m16n8k16_bf16(d, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

#ifndef BRADLEY_EMULATE
__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// Loads four 8×8 matrices of 16-bit values from shared memory. Lane l passes the address of row l %
// 8 of matrix l / 8 (16 bytes, 16-byte aligned) and receives in r[m] the values M_m[g, 2t..2t+1].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* smem) {
#ifdef BRADLEY_EMULATE
    emulate::ldmatrix_x4<false>(r, smem);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem))
                 : "memory");
#endif
}
// The same with every matrix transposed: r[m] = M_m[2t..2t+1, g].
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem) {
#ifdef BRADLEY_EMULATE
    emulate::ldmatrix_x4<true>(r, smem);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(smem))
                 : "memory");
#endif
}

// Starts an asynchronous copy of 16 aligned bytes from global to shared memory. If not `valid`,
// reads nothing and writes zeros. This thread may read the bytes after cp_async_wait, other threads
// after a barrier that follows it.
__device__ __forceinline__ void cp_async_16(void* smem, const void* global, bool valid) {
#ifdef BRADLEY_EMULATE
    emulate::cp_async_16(smem, global, valid);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(smem)),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
#endif
}
// Closes a group of asynchronous copies.
__device__ __forceinline__ void cp_async_commit() {
#ifdef BRADLEY_EMULATE
    emulate::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
// Waits until at most the newest N groups of this thread are still in flight.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#ifdef BRADLEY_EMULATE
    emulate::cp_async_wait(N);
#else
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#endif
}
