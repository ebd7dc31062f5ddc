// Attention as in attention.cu, for bf16 and D = 64 or 128, on tensor cores (mma.m16n8k16), after
// FlashAttention-2 (arXiv:2307.08691).
//
// Each of the 4 warps owns 16 of the block's 64 rows. The next tile of the other side is copied to
// shared memory while the current one is processed. The result of a GEMM stays in registers and,
// rounded to bf16, is the left operand of the next one.
//
// Fragments of a warp, lane = 4·g + t (PTX ISA, mma.m16n8k16):
//   result c (16 × 8)   c0 c1: row g, columns 2t 2t+1;  c2 c3: row g + 8
//   left a (16 × 16)    a0: row g, columns 2t 2t+1;  a1: row g + 8;
//                       a2 a3: the same rows, columns 8+2t 9+2t
//   right b (16 × 8)    b0: rows 2t 2t+1, column g;  b1: rows 8+2t 9+2t
// Two neighbouring results therefore form a left fragment without moving values between lanes.
#include "attention_mma.cuh"
#include "elements.cuh"

namespace attn {

// Masks the scores of a warp's 16 queries, from `row` on, with key tile n: -∞ if a key comes
// later, is outside the window or is beyond the end of the tile.
template <int N>
__device__ __forceinline__ void mask_scores(Sums<N>& s, const Queries& queries, int n,
                                            const unsigned* positions, int row, int lane,
                                            int window) {
    const Range keys = queries.keys.tile(n);
    const int start = queries.tile.start,
              position_shift = shift(positions, start) - shift(positions, keys.start);
    if (all_seen(queries.tile, keys, position_shift, window)) return;
#pragma unroll
    for (int b = 0; b < N; b++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int i = start + row + lane / 4 + e / 2 * 8,
                      j = keys.start + b * 8 + lane % 4 * 2 + e % 2;
            if (j >= keys.end || j > i || i - j + position_shift >= window) s[b][e] = -INFINITY;
        }
}

// Replaces the dot products of a warp's rows by scores with the soft-cap.
template <int N>
__device__ __forceinline__ void cap_scores(Sums<N>& s, float scale, float softcap) {
#pragma unroll
    for (int b = 0; b < N; b++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[b][e] = scaled_score<true>(s[b][e], scale, softcap);
}

// Computes the output and the log-sum-exps of a tile of queries for one head.
template <int D, bool CAPPED = false>
__device__ __forceinline__ void forward_mma(bf16* out, float* lse, const bf16* qkv,
                                            const int* tiles, const unsigned* positions,
                                            Shape shape, int window, float scale,
                                            float softcap = 0.0f) {
    constexpr int N = TILE / 8;
    SHARED(bf16, shared);
    // Shared memory: two tiles of keys, two of values.
    const Queries queries(tiles + 5 * blockIdx.y, positions, window);
    const int head = blockIdx.x, kv = head / shape.group(), start = queries.tile.start,
              count = queries.tile.size();
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    const size_t stride = shape.row();
    const auto fetch = [&](int n) {
        const Range keys = queries.keys.tile(n);
        const bf16* from = qkv + keys.start * stride;
        Tile<D>(shared, n % 2).fetch(from + shape.key_column(kv), stride, keys.size());
        Tile<D>(shared, 2 + n % 2).fetch(from + shape.value_column(kv), stride, keys.size());
    };

    // Q is loaded to registers through the tile that will be needed last.
    const Tile<D> passing(shared, 3);
    passing.fetch(qkv + start * stride + size_t(head) * D, stride, count);
    fetch(0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t q[D / 16][4];
#pragma unroll
    for (int d = 0; d < D / 16; d++) passing.left(q[d], row, d * 16);

    const float scale2 = (CAPPED ? 1.0f : scale) * LOG2E;
    Sums<D / 8> sum;
    clear_sums<D / 8>(sum);
    // Of the two rows of a lane. The maximum is that of the scores times log2(e).
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    for (int n = 0; n < queries.keys.tiles; n++) {
        // After this barrier, tile n has arrived and all warps have finished with the previous
        // tile, or with Q.
        cp_async_wait<0>();
        __syncthreads();
        if (n + 1 < queries.keys.tiles) fetch(n + 1);
        cp_async_commit();
        const Tile<D> k(shared, n % 2), v(shared, 2 + n % 2);
        Sums<N> s;
        clear_sums<N>(s);
#pragma unroll
        for (int d = 0; d < D / 16; d++)
#pragma unroll
            for (int j = 0; j < N; j += 2) {
                uint32_t one[2], two[2];
                k.right_transposed(one, two, j * 8, d * 16);
                mma_m16n8k16_bf16(s[j], q[d], one);
                mma_m16n8k16_bf16(s[j + 1], q[d], two);
            }
        if constexpr (CAPPED) cap_scores<N>(s, scale, softcap);
        mask_scores<N>(s, queries, n, positions, row, lane, window);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = -INFINITY;
#pragma unroll
            for (int b = 0; b < N; b++)
                highest = fmaxf(highest, fmaxf(s[b][half * 2], s[b][half * 2 + 1]));
            highest = fmaxf(top[half], row_max(highest) * scale2);
            // All keys of a row's first tiles may be masked.
            const float base = highest == -INFINITY ? 0.0f : highest,
                        factor = power_of_2(top[half] - base);
            top[half] = highest;
            float sum_of_tile = 0.0f;
#pragma unroll
            for (int b = 0; b < N; b++)
#pragma unroll
                for (int e = half * 2; e < half * 2 + 2; e++) {
                    s[b][e] = power_of_2(s[b][e] * scale2 - base);
                    sum_of_tile += s[b][e];
                }
            // Each lane accumulates the sum of its own columns.
            total[half] = total[half] * factor + sum_of_tile;
#pragma unroll
            for (int b = 0; b < D / 8; b++)
                sum[b][half * 2] *= factor, sum[b][half * 2 + 1] *= factor;
        }
        uint32_t p[N / 2][4];
        pack<N>(p, s);
        accumulate<D, N / 2>(sum, p, v, 0);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        total[half] = row_sum(total[half]);
        const int i = row + lane / 4 + half * 8;
        if (lane % 4 == 0 && i < count)
            lse[size_t(start + i) * shape.heads + head] = top[half] * LN2 + logf(total[half]);
    }
    store<D>(out + start * shape.width() + size_t(head) * D, shape.width(), row, count, sum,
             1.0f / total[0], 1.0f / total[1]);
}

// Computes the gradients of a tile of queries for one head.
template <int D, bool CAPPED = false>
__device__ __forceinline__ void backward_queries_mma(bf16* dqkv, const bf16* qkv, const bf16* dout,
                                                     const float* lse, const float* delta,
                                                     const int* tiles, const unsigned* positions,
                                                     Shape shape, int window, float scale,
                                                     float softcap = 0.0f) {
    constexpr int N = TILE / 8;
    SHARED(bf16, shared);
    // Shared memory: Q, dO, V, two tiles of keys.
    const Tile<D> q(shared, 0), g(shared, 1), v(shared, 2);
    const Queries queries(tiles + 5 * blockIdx.y, positions, window);
    const int head = blockIdx.x, kv = head / shape.group(), start = queries.tile.start,
              count = queries.tile.size();
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    const size_t stride = shape.row();
    const auto fetch_keys = [&](int n) {
        const Range keys = queries.keys.tile(n);
        Tile<D>(shared, 3 + n % 2)
            .fetch(qkv + keys.start * stride + shape.key_column(kv), stride, keys.size());
    };
    const auto fetch_values = [&](int n) {
        const Range keys = queries.keys.tile(n);
        v.fetch(qkv + keys.start * stride + shape.value_column(kv), stride, keys.size());
    };
    q.fetch(qkv + start * stride + size_t(head) * D, stride, count);
    g.fetch(dout + start * shape.width() + size_t(head) * D, shape.width(), count);
    fetch_keys(0);
    fetch_values(0);
    cp_async_commit();

    float own_lse[2], own_delta[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = row + lane / 4 + half * 8;
        const size_t at = size_t(start + i) * shape.heads + head;
        own_lse[half] = i < count ? lse[at] * LOG2E : INFINITY;
        own_delta[half] = i < count ? delta[at] : 0.0f;
    }
    const float scale2 = (CAPPED ? 1.0f : scale) * LOG2E;
    Sums<D / 8> sum;
    clear_sums<D / 8>(sum);
    for (int n = 0; n < queries.keys.tiles; n++) {
        // After this barrier, tile n has arrived and all warps have finished with the keys of the
        // previous tile.
        cp_async_wait<0>();
        __syncthreads();
        if (n + 1 < queries.keys.tiles) fetch_keys(n + 1);
        cp_async_commit();
        const Tile<D> k(shared, 3 + n % 2);
        Sums<N> s, dp;
        scores<D, N>(s, q, row, k, 0);
        scores<D, N>(dp, g, row, v, 0);
        // After this barrier, all warps have finished with the values.
        __syncthreads();
        if (n + 1 < queries.keys.tiles) fetch_values(n + 1);
        cp_async_commit();
        if constexpr (CAPPED) cap_scores<N>(s, scale, softcap);
        mask_scores<N>(s, queries, n, positions, row, lane, window);
#pragma unroll
        for (int b = 0; b < N; b++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float score = s[b][e];
                s[b][e] =
                    power_of_2(score * scale2 - own_lse[e / 2]) * (dp[b][e] - own_delta[e / 2]);
                if constexpr (CAPPED) s[b][e] *= soft_cap_slope(score, softcap);
            }
        uint32_t ds[N / 2][4];
        pack<N>(ds, s);
        accumulate<D, N / 2>(sum, ds, k, 0);
    }
    store<D>(dqkv + start * stride + size_t(head) * D, stride, row, count, sum, scale, scale);
}

// Computes the gradients of a tile of keys and values from one query head. If several query heads
// share these keys and values, the result goes to `parts` [T, 2K, H/K, D], from which attention_sum
// computes the gradients.
template <int D, bool CAPPED = false>
__device__ __forceinline__ void backward_keys_mma(bf16* dqkv, const bf16* qkv, const bf16* dout,
                                                  const float* lse, const float* delta,
                                                  const int* tiles, const unsigned* positions,
                                                  Shape shape, int window, float scale,
                                                  float* parts, float softcap = 0.0f) {
    constexpr int N = TILE / 8;
    // Values of a tile of queries. Those of the next tile are written while the current delta is
    // still read.
    __shared__ float other_lse[TILE], other_delta[2][TILE];
    __shared__ int other_position[TILE];
    SHARED(bf16, shared);
    // Shared memory: K, V, dO, two tiles of queries.
    const Tile<D> k(shared, 0), v(shared, 1), g(shared, 2);
    const Keys keys(tiles + 5 * blockIdx.y, positions, window);
    const int head = blockIdx.x, kv = head / shape.group();
    const int start = keys.tile.start, count = keys.tile.size(),
              own_shift = shift(positions, start);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    const size_t stride = shape.row();
    const float scale2 = (CAPPED ? 1.0f : scale) * LOG2E;
    const auto fetch_queries = [&](int n, int buffer) {
        const Range others = keys.queries.tile(n);
        Tile<D>(shared, 3 + buffer)
            .fetch(qkv + others.start * stride + size_t(head) * D, stride, others.size());
    };
    const auto fetch_upstream = [&](int n) {
        const Range others = keys.queries.tile(n);
        g.fetch(dout + others.start * shape.width() + size_t(head) * D, shape.width(),
                others.size());
    };
    // Half of the threads load a tile's lse and positions, the others its delta.
    const int carried_row = threadIdx.x % TILE;
    const bool carries_lse = threadIdx.x < TILE;
    float number = 0.0f;
    int position = 0;
    const auto read_row_values = [&](int n) {
        const Range others = keys.queries.tile(n);
        const int i = others.start + carried_row;
        const bool inside = i < others.end;
        const size_t at = size_t(i) * shape.heads + head;
        // A row that does not exist gets P = 0.
        number = carries_lse ? (inside ? lse[at] * LOG2E : INFINITY) : (inside ? delta[at] : 0.0f);
        position = inside ? int(positions[i]) : 0;
    };
    const auto write_row_values = [&](int buffer) {
        (carries_lse ? other_lse : other_delta[buffer])[carried_row] = number;
        if (carries_lse) other_position[carried_row] = position;
    };

    // The first tile is never masked completely: it contains the queries of these keys.
    int n = 0;
    k.fetch(qkv + start * stride + shape.key_column(kv), stride, count);
    v.fetch(qkv + start * stride + shape.value_column(kv), stride, count);
    fetch_queries(n, 0);
    fetch_upstream(n);
    cp_async_commit();
    read_row_values(n);
    write_row_values(0);
    Sums<D / 8> dk, dv;
    clear_sums<D / 8>(dk);
    clear_sums<D / 8>(dv);
    for (int buffer = 0; n < keys.queries.tiles; buffer ^= 1) {
        const int following = keys.next(n + 1, positions, window);
        const bool more = following < keys.queries.tiles;
        // After this barrier, the tiles have arrived and all warps have finished with the previous
        // queries.
        cp_async_wait<0>();
        __syncthreads();
        if (more) fetch_queries(following, buffer ^ 1);
        cp_async_commit();
        const Tile<D> q(shared, 3 + buffer);
        const Range others = keys.queries.tile(n);
        const bool all = window == NO_WINDOW && others.start >= keys.tile.end - 1;
        Sums<N> s;
        scores<D, N>(s, k, row, q, 0);
        if constexpr (CAPPED) cap_scores<N>(s, scale, softcap);
        if (!all) {
#pragma unroll
            for (int b = 0; b < N; b++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int column = b * 8 + lane % 4 * 2 + e % 2,
                              j = start + row + lane / 4 + e / 2 * 8;
                    const int distance = other_position[column] - (j + own_shift);
                    if ((j > others.start + column) | (distance >= window)) s[b][e] = -INFINITY;
                }
        }
        // With a soft-cap, `sloped` is P times the slope.
        Sums<N> sloped;
#pragma unroll
        for (int b = 0; b < N; b++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float score = s[b][e];
                s[b][e] = power_of_2(score * scale2 - other_lse[b * 8 + lane % 4 * 2 + e % 2]);
                if constexpr (CAPPED) sloped[b][e] = s[b][e] * soft_cap_slope(score, softcap);
            }
        uint32_t weights[N / 2][4];
        pack<N>(weights, s);
        accumulate<D, N / 2>(dv, weights, g, 0);
        Sums<N> dp;
        scores<D, N>(dp, v, row, g, 0);
        // After this barrier, all warps have finished with the upstream gradient and with this
        // tile's lse and positions.
        __syncthreads();
        if (more) fetch_upstream(following), read_row_values(following);
        cp_async_commit();
#pragma unroll
        for (int b = 0; b < N; b++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float weight = CAPPED ? sloped[b][e] : s[b][e];
                s[b][e] = weight * (dp[b][e] - other_delta[buffer][b * 8 + lane % 4 * 2 + e % 2]);
            }
        pack<N>(weights, s);
        accumulate<D, N / 2>(dk, weights, q, 0);
        if (more) write_row_values(buffer ^ 1);
        n = following;
    }
    if (parts == nullptr) {
        bf16* to = dqkv + start * stride;
        store<D>(to + shape.key_column(kv), stride, row, count, dk, scale, scale);
        store<D>(to + shape.value_column(kv), stride, row, count, dv, 1.0f, 1.0f);
    } else {
        const size_t width = 2 * shape.width();
        float* to = parts + start * width + size_t(head) * D;
        store<D>(to, width, row, count, dk, scale, scale);
        store<D>(to + shape.width(), width, row, count, dv, 1.0f, 1.0f);
    }
}

}  // namespace attn

// The head is the fast dimension of the grid, so all heads of a tile run before the next tile. The
// host lists the longest tiles first, so that only short ones are left at the end. The backward
// kernels for D = 64 are limited to the registers of 3 blocks per multiprocessor. If dynamic shared
// memory exceeds 48 KiB, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES must be set.

// Forward pass [(H, tiles); 128]. Dynamic shared memory: 4 tiles, i.e. 32768 bytes for D = 64,
// 65536 for D = 128.
KERNEL void attention_mma_64(bf16* out, float* lse, const bf16* qkv, const int* tiles,
                             const unsigned* positions, int heads, int kv_heads, int /*dim*/,
                             int window, float scale) {
    attn::forward_mma<64>(out, lse, qkv, tiles, positions, {heads, kv_heads, 64},
                          attn::limit(window), scale);
}

KERNEL void attention_mma_128(bf16* out, float* lse, const bf16* qkv, const int* tiles,
                              const unsigned* positions, int heads, int kv_heads, int /*dim*/,
                              int window, float scale) {
    attn::forward_mma<128>(out, lse, qkv, tiles, positions, {heads, kv_heads, 128},
                           attn::limit(window), scale);
}

// Gradients of the queries [(H, tiles); 128]. Dynamic shared memory: 5 tiles, i.e. 40960 bytes for
// D = 64, 81920 for D = 128.
KERNEL __launch_bounds__(128, 3) void attention_dq_mma_64(bf16* dqkv, const bf16* qkv,
                                                          const bf16* dout, const float* lse,
                                                          const float* delta, const int* tiles,
                                                          const unsigned* positions, int heads,
                                                          int kv_heads, int /*dim*/, int window,
                                                          float scale) {
    attn::backward_queries_mma<64>(dqkv, qkv, dout, lse, delta, tiles, positions,
                                   {heads, kv_heads, 64}, attn::limit(window), scale);
}

KERNEL void attention_dq_mma_128(bf16* dqkv, const bf16* qkv, const bf16* dout, const float* lse,
                                 const float* delta, const int* tiles, const unsigned* positions,
                                 int heads, int kv_heads, int /*dim*/, int window, float scale) {
    attn::backward_queries_mma<128>(dqkv, qkv, dout, lse, delta, tiles, positions,
                                    {heads, kv_heads, 128}, attn::limit(window), scale);
}

// Gradients of keys and values [(H, key tiles); 128]. Dynamic shared memory: 5 tiles, i.e. 40960
// bytes for D = 64, 81920 for D = 128; with 1024 bytes of static shared memory, two blocks fit the
// 164 KiB of an A100. With H = K, `parts` is null and dqkv is written; otherwise `parts` is
// written, for attention_sum.
KERNEL __launch_bounds__(128, 3) void attention_dkv_mma_64(bf16* dqkv, const bf16* qkv,
                                                           const bf16* dout, const float* lse,
                                                           const float* delta, const int* key_tiles,
                                                           const unsigned* positions, int heads,
                                                           int kv_heads, int /*dim*/, int window,
                                                           float scale, float* parts) {
    attn::backward_keys_mma<64>(dqkv, qkv, dout, lse, delta, key_tiles, positions,
                                {heads, kv_heads, 64}, attn::limit(window), scale, parts);
}

KERNEL void attention_dkv_mma_128(bf16* dqkv, const bf16* qkv, const bf16* dout, const float* lse,
                                  const float* delta, const int* key_tiles,
                                  const unsigned* positions, int heads, int kv_heads, int /*dim*/,
                                  int window, float scale, float* parts) {
    attn::backward_keys_mma<128>(dqkv, qkv, dout, lse, delta, key_tiles, positions,
                                 {heads, kv_heads, 128}, attn::limit(window), scale, parts);
}

// The same three kernels with a soft-cap. They need more registers, so their number is not limited.
#define CAPPED_KERNELS(D)                                                                         \
    KERNEL void attention_mma_##D##_capped(                                                       \
        bf16* out, float* lse, const bf16* qkv, const int* tiles, const unsigned* positions,      \
        int heads, int kv_heads, int /*dim*/, int window, float scale, float softcap) {           \
        attn::forward_mma<D, true>(out, lse, qkv, tiles, positions, {heads, kv_heads, D},         \
                                   attn::limit(window), scale, softcap);                          \
    }                                                                                             \
    KERNEL void attention_dq_mma_##D##_capped(                                                    \
        bf16* dqkv, const bf16* qkv, const bf16* dout, const float* lse, const float* delta,      \
        const int* tiles, const unsigned* positions, int heads, int kv_heads, int /*dim*/,        \
        int window, float scale, float softcap) {                                                 \
        attn::backward_queries_mma<D, true>(dqkv, qkv, dout, lse, delta, tiles, positions,        \
                                            {heads, kv_heads, D}, attn::limit(window), scale,     \
                                            softcap);                                             \
    }                                                                                             \
    KERNEL void attention_dkv_mma_##D##_capped(                                                   \
        bf16* dqkv, const bf16* qkv, const bf16* dout, const float* lse, const float* delta,      \
        const int* key_tiles, const unsigned* positions, int heads, int kv_heads, int /*dim*/,    \
        int window, float scale, float* parts, float softcap) {                                   \
        attn::backward_keys_mma<D, true>(dqkv, qkv, dout, lse, delta, key_tiles, positions,       \
                                         {heads, kv_heads, D}, attn::limit(window), scale, parts, \
                                         softcap);                                                \
    }
CAPPED_KERNELS(64)
CAPPED_KERNELS(128)

// [T; 256] Writes the k and v columns of dqkv: `parts` [T, 2K, H/K, D] summed over the query heads
// of a group, in order. D is a multiple of 8.
KERNEL void attention_sum(bf16* dqkv, const float* parts, int heads, int kv_heads, int dim) {
    const attn::Shape shape{heads, kv_heads, dim};
    const int group = shape.group(), chunks = dim / 8;
    bf16* to = dqkv + blockIdx.x * shape.row() + shape.key_column(0);
    const float* from = parts + blockIdx.x * 2 * shape.width();
    for (int i = threadIdx.x; i < 2 * kv_heads * chunks; i += blockDim.x) {
        const float* part = from + size_t(i / chunks) * group * dim + i % chunks * 8;
        float sum[8];
        load<8>(sum, part);
#pragma unroll 4
        for (int n = 1; n < group; n++) {
            float next[8];
            load<8>(next, part + size_t(n) * dim);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += next[j];
        }
        store<8>(to + i * 8, sum);
    }
}
