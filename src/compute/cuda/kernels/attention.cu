// Attention over the segments of a packed row on CUDA cores, for any even head dimension up to 256.
// Accumulation is in f32. No T×T matrix exists.
//
// Forward pass, per tile of 64 queries and head: S = scale·Q·Kᵀ one tile of keys at a time, P =
// softmax(S) as an online softmax (running maximum and sum of each row), O = P·V. The backward
// pass recomputes P = e^(S − lse): dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P ⊙ (dP − delta), dQ =
// scale·dS·K, dK = scale·dSᵀ·Q. The kernels with CAPPED apply a soft-cap c to S, S' =
// c·tanh(S / c), and multiply dS by its slope, 1 − (S' / c)².
//
// A block has 128 threads, thread (ty, tx) of 8 × 16. "Own" are the 64 rows that the block writes,
// "others" the 64 rows of the tile that it processes. For a 64 × 64 GEMM each thread computes 8
// own rows and 4 columns. A result of up to 128 columns consists of two of these. A wider one is
// computed in several rounds of 128 columns, because the registers hold no more.
//
// The start of a kernel's comment gives its launch as [blocks; threads].
#include "attention.cuh"

namespace attn {

// Number of columns of D that are in shared memory at a time while S is computed.
constexpr int DEPTH = 32;
// Row stride in shared memory. It keeps rows 16-byte aligned.
constexpr int PITCH = TILE + 4;
// Number of 64-wide accumulators that a thread has for a result.
constexpr int PARTS = 2;
constexpr int COLUMNS = PARTS * TILE;
constexpr float MASKED = -INFINITY;

// 64 rows of 64 values in shared memory.
struct alignas(16) Panel {
    float at[TILE][PITCH];
};

// One thread's part of a 64 × 64 result: 8 own rows by 4 columns, in registers.
using Block = float[8][4];

__device__ __forceinline__ int thread_row() { return threadIdx.x / 16 * 8; }
__device__ __forceinline__ int thread_column() { return threadIdx.x % 16 * 4; }

// Up to 64 rows of a matrix in global memory, `stride` elements apart.
template <class T>
struct Rows {
    const T* at;
    size_t stride;
    int count;
};

__device__ __forceinline__ void clear(Block& block) {
#pragma unroll
    for (int r = 0; r < 8; r++)
#pragma unroll
        for (int c = 0; c < 4; c++) block[r][c] = 0.0f;
}

// One thread's part of a result of COLUMNS columns.
using Result = Block[PARTS];

__device__ __forceinline__ void clear(Result& result) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) clear(result[part]);
}

// sum[own, column] += Σ_k a[k][own]·b[k][column] over k < N.
template <int N>
__device__ __forceinline__ void multiply(Block& sum, const float (*a)[PITCH],
                                         const float (*b)[PITCH]) {
    const int row = thread_row(), column = thread_column();
#pragma unroll 4
    for (int k = 0; k < N; k++) {
        const Vector<float> low = load_16(&a[k][row]), high = load_16(&a[k][row + 4]),
                            right = load_16(&b[k][column]);
#pragma unroll
        for (int r = 0; r < 8; r++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                sum[r][c] += (r < 4 ? low.v[r % 4] : high.v[r % 4]) * right.v[c];
    }
}

// Loads 64 rows and DEPTH columns, transposed: to[d][i] = column `first` + d of row i, zero
// outside.
template <class T>
__device__ void load_transposed(float (*to)[PITCH], const Rows<T>& rows, int first, int dim) {
    for (int e = threadIdx.x; e < TILE * DEPTH; e += THREADS) {
        const int i = e / DEPTH, d = e % DEPTH;
        to[d][i] = i < rows.count && first + d < dim
                       ? to_float(rows.at[i * rows.stride + first + d])
                       : 0.0f;
    }
}

// Loads 64 rows and 64 columns: to[i][d] = column `first` + d of row i, zero outside.
template <class T>
__device__ void load_rows(float (*to)[PITCH], const Rows<T>& rows, int first, int dim) {
    for (int e = threadIdx.x; e < TILE * TILE; e += THREADS) {
        const int i = e / TILE, d = e % TILE;
        to[i][d] = i < rows.count && first + d < dim
                       ? to_float(rows.at[i * rows.stride + first + d])
                       : 0.0f;
    }
}

// product[own, other] = own·otherᵀ over all of D.
template <class T>
__device__ __forceinline__ void scores(Block& product, Panel& work, const Rows<T>& own,
                                       const Rows<T>& other, int dim) {
    clear(product);
    for (int first = 0; first < dim; first += DEPTH) {
        __syncthreads();
        load_transposed(work.at, own, first, dim);
        load_transposed(work.at + DEPTH, other, first, dim);
        __syncthreads();
        multiply<DEPTH>(product, work.at, work.at + DEPTH);
    }
}

// Writes a result to shared memory for `accumulate`: to[other][own].
__device__ __forceinline__ void store_transposed(Panel& to, const Block& product) {
    const int row = thread_row(), column = thread_column();
#pragma unroll
    for (int c = 0; c < 4; c++)
#pragma unroll
        for (int r = 0; r < 8; r++) to.at[column + c][row + r] = product[r][c];
}

// sum[own, d] += Σ_other weights[other][own]·other[d] for the columns d from `first` on.
template <class T>
__device__ __forceinline__ void accumulate(Result& sum, const Panel& weights, Panel& work,
                                           const Rows<T>& other, int first, int dim) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const int column = first + part * TILE;
        if (column < dim) {
            __syncthreads();
            load_rows(work.at, other, column, dim);
            __syncthreads();
            multiply<TILE>(sum[part], weights.at, work.at);
        }
    }
}

// Writes a result to the columns from `first` on of the `count` own rows, `stride` elements apart.
template <class T>
__device__ __forceinline__ void store(T* to, size_t stride, int count, const Result& sum, int first,
                                      int dim) {
    const int row = thread_row();
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int r = 0; r < 8; r++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int d = first + part * TILE + thread_column() + c;
                if (row + r < count && d < dim)
                    to[(row + r) * stride + d] = from_float<T>(sum[part][r][c]);
            }
}

// Reductions over the 16 threads that share their own rows.
template <class Op>
__device__ __forceinline__ float over_columns(float x, Op op) {
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

// [(tiles, H); 128] 34 KiB static shared memory. out is [T, H·D]; lse is [T, H], the natural
// logarithm of Σ_j e^(S_j), or of Σ_j e^(S'_j) with a soft-cap.
template <class T, bool CAPPED = false>
__device__ void attention(T* out, float* lse, const T* qkv, const int* tiles,
                          const unsigned* positions, Shape shape, int window, float scale,
                          float softcap = 0.0f) {
    __shared__ Panel work, weights;
    const Queries queries(tiles + 5 * blockIdx.x, positions, window);
    const int head = blockIdx.y, kv = head / shape.group(), dim = shape.dim;
    const int start = queries.tile.start, count = queries.tile.size(), row = thread_row(),
              column = thread_column();
    const Rows<T> q{qkv + start * shape.row() + size_t(head) * dim, shape.row(), count};
    for (int first = 0; first < dim; first += COLUMNS) {
        float top[8], total[8];
        Result sum;
        clear(sum);
#pragma unroll
        for (int r = 0; r < 8; r++) top[r] = MASKED, total[r] = 0.0f;
        for (int n = 0; n < queries.keys.tiles; n++) {
            const Range keys = queries.keys.tile(n);
            const int position_shift = shift(positions, start) - shift(positions, keys.start);
            const Rows<T> k{qkv + keys.start * shape.row() + shape.key_column(kv), shape.row(),
                            keys.size()};
            const Rows<T> v{qkv + keys.start * shape.row() + shape.value_column(kv), shape.row(),
                            keys.size()};
            Block s;
            scores(s, work, q, k, dim);
#pragma unroll
            for (int r = 0; r < 8; r++) {
                float highest = top[r];
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const int i = start + row + r, j = keys.start + column + c;
                    const bool seen = j < keys.end && j <= i && i - j + position_shift < window;
                    s[r][c] = seen ? scaled_score<CAPPED>(s[r][c], scale, softcap) : MASKED;
                    highest = fmaxf(highest, s[r][c]);
                }
                highest = over_columns(highest, Max());
                // All keys of a row's first tiles may be masked.
                const float base = highest == MASKED ? 0.0f : highest, factor = expf(top[r] - base);
                float sum_of_tile = 0.0f;
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    s[r][c] = expf(s[r][c] - base);
                    sum_of_tile += s[r][c];
                }
                sum_of_tile = over_columns(sum_of_tile, Sum());
                total[r] = total[r] * factor + sum_of_tile;
                top[r] = highest;
#pragma unroll
                for (int part = 0; part < PARTS; part++)
#pragma unroll
                    for (int c = 0; c < 4; c++) sum[part][r][c] *= factor;
            }
            store_transposed(weights, s);
            accumulate(sum, weights, work, v, first, dim);
        }
#pragma unroll
        for (int r = 0; r < 8; r++) {
            const float inverse = 1.0f / total[r];
#pragma unroll
            for (int part = 0; part < PARTS; part++)
#pragma unroll
                for (int c = 0; c < 4; c++) sum[part][r][c] *= inverse;
            if (first == 0 && column == 0 && row + r < count)
                lse[size_t(start + row + r) * shape.heads + head] = top[r] + logf(total[r]);
        }
        store(out + start * shape.width() + size_t(head) * dim, shape.width(), count, sum, first,
              dim);
    }
}

INSTANTIATE(attention,
            (T * out, float* lse, const T* qkv, const int* tiles, const unsigned* positions,
             int heads, int kv_heads, int dim, int window, float scale),
            (out, lse, qkv, tiles, positions, {heads, kv_heads, dim}, limit(window), scale))
INSTANTIATE_CAPPED(attention,
                   (T * out, float* lse, const T* qkv, const int* tiles, const unsigned* positions,
                    int heads, int kv_heads, int dim, int window, float scale, float softcap),
                   (out, lse, qkv, tiles, positions, {heads, kv_heads, dim}, limit(window), scale,
                    softcap))

// [⌈T·H/4⌉; 128] delta[t, h] = Σ_d out·dout, one warp per token and head.
template <class T>
__device__ void attention_delta(float* delta, const T* out, const T* dout, int tokens, int heads,
                                int dim) {
    const size_t item = size_t(blockIdx.x) * 4 + threadIdx.x / 32;
    if (item >= size_t(tokens) * heads) return;
    float sum = 0.0f;
    for (int d = threadIdx.x % 32; d < dim; d += 32)
        sum += to_float(out[item * dim + d]) * to_float(dout[item * dim + d]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) delta[item] = sum;
}

INSTANTIATE(attention_delta,
            (float* delta, const T* out, const T* dout, int tokens, int heads, int dim),
            (delta, out, dout, tokens, heads, dim))

// [(tiles, H); 128] 34 KiB static shared memory. Writes the q columns of dqkv.
template <class T, bool CAPPED = false>
__device__ void attention_dq(T* dqkv, const T* qkv, const T* dout, const float* lse,
                             const float* delta, const int* tiles, const unsigned* positions,
                             Shape shape, int window, float scale, float softcap = 0.0f) {
    __shared__ Panel work, weights;
    const Queries queries(tiles + 5 * blockIdx.x, positions, window);
    const int head = blockIdx.y, kv = head / shape.group(), dim = shape.dim;
    const int start = queries.tile.start, count = queries.tile.size(), row = thread_row(),
              column = thread_column();
    const Rows<T> q{qkv + start * shape.row() + size_t(head) * dim, shape.row(), count};
    const Rows<T> g{dout + start * shape.width() + size_t(head) * dim, shape.width(), count};
    float own_lse[8], own_delta[8];
#pragma unroll
    for (int r = 0; r < 8; r++) {
        const size_t at = size_t(start + row + r) * shape.heads + head;
        own_lse[r] = row + r < count ? lse[at] : INFINITY;
        own_delta[r] = row + r < count ? delta[at] : 0.0f;
    }
    for (int first = 0; first < dim; first += COLUMNS) {
        Result sum;
        clear(sum);
        for (int n = 0; n < queries.keys.tiles; n++) {
            const Range keys = queries.keys.tile(n);
            const int position_shift = shift(positions, start) - shift(positions, keys.start);
            const Rows<T> k{qkv + keys.start * shape.row() + shape.key_column(kv), shape.row(),
                            keys.size()};
            const Rows<T> v{qkv + keys.start * shape.row() + shape.value_column(kv), shape.row(),
                            keys.size()};
            Block s, dp;
            scores(s, work, q, k, dim);
            scores(dp, work, g, v, dim);
#pragma unroll
            for (int r = 0; r < 8; r++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    const int i = start + row + r, j = keys.start + column + c;
                    const bool seen = j < keys.end && j <= i && i - j + position_shift < window;
                    const float score = scaled_score<CAPPED>(s[r][c], scale, softcap);
                    const float p = seen ? expf(score - own_lse[r]) : 0.0f;
                    s[r][c] = p * (dp[r][c] - own_delta[r]) * scale;
                    if constexpr (CAPPED) s[r][c] *= soft_cap_slope(score, softcap);
                }
            store_transposed(weights, s);
            accumulate(sum, weights, work, k, first, dim);
        }
        store(dqkv + start * shape.row() + size_t(head) * dim, shape.row(), count, sum, first, dim);
    }
}

INSTANTIATE(attention_dq,
            (T * dqkv, const T* qkv, const T* dout, const float* lse, const float* delta,
             const int* tiles, const unsigned* positions, int heads, int kv_heads, int dim,
             int window, float scale),
            (dqkv, qkv, dout, lse, delta, tiles, positions, {heads, kv_heads, dim}, limit(window),
             scale))
INSTANTIATE_CAPPED(attention_dq,
                   (T * dqkv, const T* qkv, const T* dout, const float* lse, const float* delta,
                    const int* tiles, const unsigned* positions, int heads, int kv_heads, int dim,
                    int window, float scale, float softcap),
                   (dqkv, qkv, dout, lse, delta, tiles, positions, {heads, kv_heads, dim},
                    limit(window), scale, softcap))

// [(key tiles, K); 128] 34.75 KiB static shared memory. Writes the k and v columns of dqkv, summed
// over the query heads of the group, in order.
template <class T, bool CAPPED = false>
__device__ void attention_dkv(T* dqkv, const T* qkv, const T* dout, const float* lse,
                              const float* delta, const int* tiles, const unsigned* positions,
                              Shape shape, int window, float scale, float softcap = 0.0f) {
    __shared__ Panel work, weights;
    __shared__ float other_lse[TILE], other_delta[TILE];
    __shared__ int other_position[TILE];
    const Keys keys(tiles + 5 * blockIdx.x, positions, window);
    const int kv = blockIdx.y, dim = shape.dim;
    const int start = keys.tile.start, count = keys.tile.size(), row = thread_row(),
              column = thread_column();
    const int own_shift = shift(positions, start);
    const Rows<T> k{qkv + start * shape.row() + shape.key_column(kv), shape.row(), count};
    const Rows<T> v{qkv + start * shape.row() + shape.value_column(kv), shape.row(), count};
    for (int first = 0; first < dim; first += COLUMNS) {
        Result dk, dv;
        clear(dk);
        clear(dv);
        for (int head = kv * shape.group(); head < (kv + 1) * shape.group(); head++) {
            for (int n = 0; (n = keys.next(n, positions, window)) < keys.queries.tiles; n++) {
                const Range others = keys.queries.tile(n);
                const Rows<T> q{qkv + others.start * shape.row() + size_t(head) * dim, shape.row(),
                                others.size()};
                const Rows<T> g{dout + others.start * shape.width() + size_t(head) * dim,
                                shape.width(), others.size()};
                // The last GEMM of the previous tile reads none of these. A row that does not exist
                // gets P = 0.
                if (threadIdx.x < TILE) {
                    const int i = others.start + threadIdx.x;
                    const bool inside = i < others.end;
                    other_lse[threadIdx.x] =
                        inside ? lse[size_t(i) * shape.heads + head] : INFINITY;
                    other_delta[threadIdx.x] =
                        inside ? delta[size_t(i) * shape.heads + head] : 0.0f;
                    other_position[threadIdx.x] = inside ? int(positions[i]) : 0;
                }
                // With a soft-cap, `sloped` is P times the slope.
                Block p, ds, sloped;
                scores(p, work, k, q, dim);
#pragma unroll
                for (int r = 0; r < 8; r++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const int i = others.start + column + c, j = start + row + r;
                        const bool seen =
                            j <= i && other_position[column + c] - (j + own_shift) < window;
                        const float score = scaled_score<CAPPED>(p[r][c], scale, softcap);
                        p[r][c] = seen ? expf(score - other_lse[column + c]) : 0.0f;
                        if constexpr (CAPPED)
                            sloped[r][c] = p[r][c] * soft_cap_slope(score, softcap);
                    }
                store_transposed(weights, p);
                accumulate(dv, weights, work, g, first, dim);
                scores(ds, work, v, g, dim);
#pragma unroll
                for (int r = 0; r < 8; r++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const float weight = CAPPED ? sloped[r][c] : p[r][c];
                        ds[r][c] = weight * (ds[r][c] - other_delta[column + c]) * scale;
                    }
                store_transposed(weights, ds);
                accumulate(dk, weights, work, q, first, dim);
            }
        }
        store(dqkv + start * shape.row() + shape.key_column(kv), shape.row(), count, dk, first,
              dim);
        store(dqkv + start * shape.row() + shape.value_column(kv), shape.row(), count, dv, first,
              dim);
    }
}

INSTANTIATE(attention_dkv,
            (T * dqkv, const T* qkv, const T* dout, const float* lse, const float* delta,
             const int* key_tiles, const unsigned* positions, int heads, int kv_heads, int dim,
             int window, float scale),
            (dqkv, qkv, dout, lse, delta, key_tiles, positions, {heads, kv_heads, dim},
             limit(window), scale))
INSTANTIATE_CAPPED(attention_dkv,
                   (T * dqkv, const T* qkv, const T* dout, const float* lse, const float* delta,
                    const int* key_tiles, const unsigned* positions, int heads, int kv_heads,
                    int dim, int window, float scale, float softcap),
                   (dqkv, qkv, dout, lse, delta, key_tiles, positions, {heads, kv_heads, dim},
                    limit(window), scale, softcap))

}  // namespace attn

using attn::attention_bf16;
using attn::attention_capped_bf16;
using attn::attention_capped_f32;
using attn::attention_delta_bf16;
using attn::attention_delta_f32;
using attn::attention_dkv_bf16;
using attn::attention_dkv_capped_bf16;
using attn::attention_dkv_capped_f32;
using attn::attention_dkv_f32;
using attn::attention_dq_bf16;
using attn::attention_dq_capped_bf16;
using attn::attention_dq_capped_f32;
using attn::attention_dq_f32;
using attn::attention_f32;
