// Shared by the tensor-core attention kernels: tiles in shared memory, GEMMs of a warp, the
// exponential.
#pragma once

#include "attention.cuh"

namespace attn {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// Returns 2^x for x ≤ 0; denormal results become 0.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef BRADLEY_EMULATE
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// Accumulators of 16 rows by N · 8 columns.
template <int N>
using Sums = float[N][4];

template <int N>
__device__ __forceinline__ void clear_sums(Sums<N>& sums) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
}

// A tile is 64 rows of D elements in shared memory. The 16-byte chunks of a row are permuted by the
// row number, so that the same chunk of 8 consecutive rows lies in 8 different groups of banks.
template <int D>
struct Tile {
    bf16* shared;
    int start;

    __device__ __forceinline__ Tile(bf16* shared, int number)
        : shared(shared), start(number * TILE * D) {}

    // Starts copying `count` rows; the other rows become zero.
    __device__ __forceinline__ void fetch(const bf16* from, size_t stride, int count) const {
        constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS;
        const int c = threadIdx.x % CHUNKS;
#pragma unroll
        for (int step = 0; step < TILE; step += STEP) {
            const int row = step + threadIdx.x / CHUNKS;
            const bool inside = row < count;
            cp_async_16(shared + start + row * D + (c ^ (row & 7)) * 8,
                        from + (inside ? row : 0) * stride + c * 8, inside);
        }
    }

    // Address of 8 elements of a row: from `column` (a multiple of 16) on, or the 8 after them with
    // `second` = 1. The lane-dependent part is separate from `column` and costs one bitwise
    // operation; the compiler knows the rest of the address.
    __device__ __forceinline__ const bf16* chunk(int row, int second, int column) const {
        const int at = start + row * D + (second ^ (row & 7)) * 8;
        return shared + column / 64 * 64 + (at ^ column % 64);
    }

    // Loads a fragment as the left operand: rows `row`…+15, columns `column`…+15 of D.
    __device__ __forceinline__ void left(uint32_t (&a)[4], int row, int column) const {
        const int lane = threadIdx.x % 32;
        ldmatrix_x4(a, chunk(row + lane % 16, lane / 16, column));
    }

    // Loads two fragments of the transpose [D, 64] as a right operand: its rows `column`…+15 with
    // columns `row`…+7, and with columns `row` + 8…+15.
    __device__ __forceinline__ void right_transposed(uint32_t (&one)[2], uint32_t (&two)[2],
                                                     int row, int column) const {
        const int lane = threadIdx.x % 32;
        uint32_t r[4];
        ldmatrix_x4(r, chunk(lane % 8 + lane / 16 * 8, lane / 8 % 2, column) + row * D);
        one[0] = r[0], one[1] = r[1], two[0] = r[2], two[1] = r[3];
    }

    // Loads two fragments as a right operand [64, D]: rows `row`…+15 with columns `column`…+7,
    // and with columns `column` + 8…+15.
    __device__ __forceinline__ void right(uint32_t (&one)[2], uint32_t (&two)[2], int row,
                                          int column) const {
        const int lane = threadIdx.x % 32;
        uint32_t r[4];
        ldmatrix_x4_trans(r, chunk(lane % 16, lane / 16, column) + row * D);
        one[0] = r[0], one[1] = r[1], two[0] = r[2], two[1] = r[3];
    }
};

// Computes sums[own, other] = own·otherᵀ over D, for 16 own rows and 8N rows of the other tile
// from `first` on.
template <int D, int N>
__device__ __forceinline__ void scores(Sums<N>& sums, const Tile<D>& own, int row,
                                       const Tile<D>& other, int first) {
    clear_sums<N>(sums);
#pragma unroll
    for (int column = 0; column < D; column += 16) {
        uint32_t a[4];
        own.left(a, row, column);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t one[2], two[2];
            other.right_transposed(one, two, first + n * 8, column);
            mma_m16n8k16_bf16(sums[n], a, one);
            mma_m16n8k16_bf16(sums[n + 1], a, two);
        }
    }
}

// Computes sums[own, d] += Σ_other weights[own, other]·other[d], over 16N rows of the other tile
// from `first` on.
template <int D, int N>
__device__ __forceinline__ void accumulate(Sums<D / 8>& sums, const uint32_t (&weights)[N][4],
                                           const Tile<D>& other, int first) {
#pragma unroll
    for (int k = 0; k < N; k++)
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t one[2], two[2];
            other.right(one, two, first + k * 16, n * 8);
            mma_m16n8k16_bf16(sums[n], weights[k], one);
            mma_m16n8k16_bf16(sums[n + 1], weights[k], two);
        }
}

// Rounds results of 8N columns to left operands.
template <int N>
__device__ __forceinline__ void pack(uint32_t (&to)[N / 2][4], const Sums<N>& from) {
#pragma unroll
    for (int k = 0; k < N / 2; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* pair = &from[2 * k + i / 2][i % 2 * 2];
            to[k][i] = pack_bf16(pair[0], pair[1]);
        }
}

struct alignas(8) Pair {
    float one, two;
};

__device__ __forceinline__ void store_pair(bf16* to, float one, float two) {
    *reinterpret_cast<uint32_t*>(to) = pack_bf16(one, two);
}
__device__ __forceinline__ void store_pair(float* to, float one, float two) {
    *reinterpret_cast<Pair*>(to) = {one, two};
}

// Writes the 16 rows of a warp. Only rows below `count` exist.
template <int D, class T>
__device__ __forceinline__ void store(T* to, size_t stride, int row, int count,
                                      const Sums<D / 8>& sums, float factor_low,
                                      float factor_high) {
    const int lane = threadIdx.x % 32, low = row + lane / 4, high = low + 8;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        const int column = n * 8 + lane % 4 * 2;
        if (low < count)
            store_pair(to + low * stride + column, sums[n][0] * factor_low,
                       sums[n][1] * factor_low);
        if (high < count)
            store_pair(to + high * stride + column, sums[n][2] * factor_high,
                       sums[n][3] * factor_high);
    }
}

// Reductions over the 4 lanes that share a row of a result.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

// True if every query of the block attends to every key of the tile.
__device__ __forceinline__ bool all_seen(Range queries, Range keys, int position_shift,
                                         int window) {
    return keys.size() == TILE && keys.end - 1 <= queries.start &&
           queries.end - 1 - keys.start + position_shift < window;
}

}  // namespace attn
