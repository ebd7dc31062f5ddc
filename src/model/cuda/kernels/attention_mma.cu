// Attention as in attention.cu for bf16 and D = 64 or 128 on tensor cores (mma.m16n8k16), after FlashAttention-2 (arXiv:2307.08691).
//
// Each of the 4 warps owns 16 of the block's 64 rows. Tiles of the other side pass through shared memory while the tile before is being worked on.
// A product's result stays in registers and, rounded to bf16, is the left operand of the next one.
//
// Fragments of a warp, lane = 4·g + t (PTX ISA, mma.m16n8k16):
//   result c (16 × 8)   c0 c1: row g, columns 2t 2t+1;  c2 c3: row g + 8
//   left a (16 × 16)    a0: row g, columns 2t 2t+1;  a1: row g + 8;  a2, a3: the same for columns 8 + 2t
//   right b (16 × 8)    b0: rows 2t 2t+1, column g;  b1: rows 8 + 2t
// so two neighbouring results make a left fragment without moving a value between lanes.
#include "attention.cuh"

namespace attn {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// 2^x for x ≤ 0; what would be denormal is 0.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef BRADLEY_EMULATE
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// Results of 16 rows by N · 8 columns.
template <int N>
using Sums = float[N][4];

template <int N>
__device__ __forceinline__ void clear_sums(Sums<N>& sums) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[n][i] = 0.0f;
}

// A tile is 64 rows of D in shared memory. The 16-byte chunks of a row are permuted by its number, so that the same chunk of 8 rows lies in 8
// different groups of banks.
template <int D>
struct Tile {
    bf16* at;

    __device__ __forceinline__ Tile(bf16* shared, int number) : at(shared + number * TILE * D) {}

    __device__ __forceinline__ bf16* chunk(int row, int number) const { return at + row * D + (number ^ (row & 7)) * 8; }

    // Starts copying `count` rows; the rest becomes zero.
    __device__ __forceinline__ void fetch(const bf16* from, size_t stride, int count) const {
        constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS;
        const int c = threadIdx.x % CHUNKS;
#pragma unroll
        for (int step = 0; step < TILE; step += STEP) {
            const int row = step + threadIdx.x / CHUNKS;
            const bool inside = row < count;
            cp_async_16(chunk(row, c), from + (inside ? row : 0) * stride + c * 8, inside);
        }
    }

    // The left operand's fragment: rows `row`…+15, columns of D `column`…+15.
    __device__ __forceinline__ void left(uint32_t (&a)[4], int row, int column) const {
        const int lane = threadIdx.x % 32;
        ldmatrix_x4(a, chunk(row + lane % 16, column / 8 + lane / 16));
    }

    // Of the transpose [D, 64] as a right operand, two fragments: its rows `column`…+15 and columns `row`…+7, and columns `row` + 8…+15.
    __device__ __forceinline__ void right_transposed(uint32_t (&one)[2], uint32_t (&two)[2], int row, int column) const {
        const int lane = threadIdx.x % 32;
        uint32_t r[4];
        ldmatrix_x4(r, chunk(row + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2));
        one[0] = r[0], one[1] = r[1], two[0] = r[2], two[1] = r[3];
    }

    // As a right operand [64, D], two fragments: rows `row`…+15, columns `column`…+7 and `column` + 8…+15.
    __device__ __forceinline__ void right(uint32_t (&one)[2], uint32_t (&two)[2], int row, int column) const {
        const int lane = threadIdx.x % 32;
        uint32_t r[4];
        ldmatrix_x4_trans(r, chunk(row + lane % 16, column / 8 + lane / 16));
        one[0] = r[0], one[1] = r[1], two[0] = r[2], two[1] = r[3];
    }
};

// sums[own, other] = own·otherᵀ over D, for 16 own rows and 8N rows of the other tile from `first` on.
template <int D, int N>
__device__ __forceinline__ void scores(Sums<N>& sums, const Tile<D>& own, int row, const Tile<D>& other, int first) {
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

// sums[own, d] += Σ_other weights[own, other]·other[d], over 16N rows of the other tile from `first` on.
template <int D, int N>
__device__ __forceinline__ void accumulate(Sums<D / 8>& sums, const uint32_t (&weights)[N][4], const Tile<D>& other, int first) {
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

// Results of 8N columns as left operands, rounded.
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

// Writes the 16 rows of a warp, of which those below `count` exist.
template <int D>
__device__ __forceinline__ void store(bf16* to, size_t stride, int row, int count, const Sums<D / 8>& sums, float factor_low, float factor_high) {
    const int lane = threadIdx.x % 32, low = row + lane / 4, high = low + 8;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        const int column = n * 8 + lane % 4 * 2;
        if (low < count)
            *reinterpret_cast<uint32_t*>(to + low * stride + column) = pack_bf16(sums[n][0] * factor_low, sums[n][1] * factor_low);
        if (high < count)
            *reinterpret_cast<uint32_t*>(to + high * stride + column) = pack_bf16(sums[n][2] * factor_high, sums[n][3] * factor_high);
    }
}

// Over the 4 lanes that share a row of a result.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

// Whether every query of the block sees every key of the tile.
__device__ __forceinline__ bool all_seen(Range queries, Range keys, int apart, int window) {
    return keys.size() == TILE && keys.end - 1 <= queries.start && queries.end - 1 - keys.start + apart < window;
}

template <int D>
__device__ __forceinline__ void forward_mma(bf16* out, float* lse, const bf16* qkv, const int* tiles, const unsigned* positions, Shape shape,
                                            int window, float scale) {
    constexpr int N = TILE / 8;
    SHARED(bf16, shared);
    // In shared memory: two tiles of keys, two of values.
    const Queries queries(tiles + 5 * blockIdx.x, positions, window);
    const int head = blockIdx.y, kv = head / shape.group(), start = queries.tile.start, count = queries.tile.size();
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    const size_t stride = shape.row();
    const auto fetch = [&](int n) {
        const Range keys = queries.keys.tile(n);
        const bf16* from = qkv + keys.start * stride;
        Tile<D>(shared, n % 2).fetch(from + shape.key_column(kv), stride, keys.size());
        Tile<D>(shared, 2 + n % 2).fetch(from + shape.value_column(kv), stride, keys.size());
    };

    // Q goes to registers by way of the tile that will be needed last.
    const Tile<D> passing(shared, 3);
    passing.fetch(qkv + start * stride + size_t(head) * D, stride, count);
    fetch(0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    uint32_t q[D / 16][4];
#pragma unroll
    for (int d = 0; d < D / 16; d++) passing.left(q[d], row, d * 16);

    const float scale2 = scale * LOG2E;
    Sums<D / 8> sum;
    clear_sums<D / 8>(sum);
    // Of the two rows of a lane; the maximum in units of log 2.
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    for (int n = 0; n < queries.keys.tiles; n++) {
        // Tile n has come, and all warps are done with the one before it, or with Q.
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
        const Range keys = queries.keys.tile(n);
        const int apart = shift(positions, start) - shift(positions, keys.start);
        if (!all_seen(queries.tile, keys, apart, window)) {
#pragma unroll
            for (int b = 0; b < N; b++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int i = start + row + lane / 4 + e / 2 * 8, j = keys.start + b * 8 + lane % 4 * 2 + e % 2;
                    if (j >= keys.end || j > i || i - j + apart >= window) s[b][e] = -INFINITY;
                }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = -INFINITY;
#pragma unroll
            for (int b = 0; b < N; b++) highest = fmaxf(highest, fmaxf(s[b][half * 2], s[b][half * 2 + 1]));
            highest = fmaxf(top[half], row_max(highest) * scale2);
            // A row may see nothing of its first tiles.
            const float base = highest == -INFINITY ? 0.0f : highest, factor = power_of_2(top[half] - base);
            top[half] = highest;
            float sum_of_tile = 0.0f;
#pragma unroll
            for (int b = 0; b < N; b++)
#pragma unroll
                for (int e = half * 2; e < half * 2 + 2; e++) {
                    s[b][e] = power_of_2(s[b][e] * scale2 - base);
                    sum_of_tile += s[b][e];
                }
            // Each lane keeps the sum of its own columns.
            total[half] = total[half] * factor + sum_of_tile;
#pragma unroll
            for (int b = 0; b < D / 8; b++) sum[b][half * 2] *= factor, sum[b][half * 2 + 1] *= factor;
        }
        uint32_t p[N / 2][4];
        pack<N>(p, s);
        accumulate<D, N / 2>(sum, p, v, 0);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        total[half] = row_sum(total[half]);
        const int i = row + lane / 4 + half * 8;
        if (lane % 4 == 0 && i < count) lse[size_t(start + i) * shape.heads + head] = top[half] * LN2 + logf(total[half]);
    }
    store<D>(out + start * shape.width() + size_t(head) * D, shape.width(), row, count, sum, 1.0f / total[0], 1.0f / total[1]);
}

template <int D>
__device__ __forceinline__ void backward_queries_mma(bf16* dqkv, const bf16* qkv, const bf16* dout, const float* lse, const float* delta,
                                                     const int* tiles, const unsigned* positions, Shape shape, int window, float scale) {
    constexpr int N = TILE / 8;
    SHARED(bf16, shared);
    // In shared memory: Q, dO, V, two tiles of keys.
    const Tile<D> q(shared, 0), g(shared, 1), v(shared, 2);
    const Queries queries(tiles + 5 * blockIdx.x, positions, window);
    const int head = blockIdx.y, kv = head / shape.group(), start = queries.tile.start, count = queries.tile.size();
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    const size_t stride = shape.row();
    const auto fetch_keys = [&](int n) {
        const Range keys = queries.keys.tile(n);
        Tile<D>(shared, 3 + n % 2).fetch(qkv + keys.start * stride + shape.key_column(kv), stride, keys.size());
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
    const float scale2 = scale * LOG2E;
    Sums<D / 8> sum;
    clear_sums<D / 8>(sum);
    for (int n = 0; n < queries.keys.tiles; n++) {
        // Tile n has come, and all warps are done with the keys of the one before it.
        cp_async_wait<0>();
        __syncthreads();
        if (n + 1 < queries.keys.tiles) fetch_keys(n + 1);
        cp_async_commit();
        const Tile<D> k(shared, 3 + n % 2);
        Sums<N> s, dp;
        scores<D, N>(s, q, row, k, 0);
        scores<D, N>(dp, g, row, v, 0);
        // All warps are done with the values.
        __syncthreads();
        if (n + 1 < queries.keys.tiles) fetch_values(n + 1);
        cp_async_commit();
        const Range keys = queries.keys.tile(n);
        const int apart = shift(positions, start) - shift(positions, keys.start);
        const bool all = all_seen(queries.tile, keys, apart, window);
#pragma unroll
        for (int b = 0; b < N; b++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int i = start + row + lane / 4 + e / 2 * 8, j = keys.start + b * 8 + lane % 4 * 2 + e % 2;
                const bool seen = all || (j < keys.end && j <= i && i - j + apart < window);
                const float p = seen ? power_of_2(s[b][e] * scale2 - own_lse[e / 2]) : 0.0f;
                s[b][e] = p * (dp[b][e] - own_delta[e / 2]) * scale;
            }
        uint32_t ds[N / 2][4];
        pack<N>(ds, s);
        accumulate<D, N / 2>(sum, ds, k, 0);
    }
    store<D>(dqkv + start * stride + size_t(head) * D, stride, row, count, sum, 1.0f, 1.0f);
}

template <int D>
__device__ __forceinline__ void backward_keys_mma(bf16* dqkv, const bf16* qkv, const bf16* dout, const float* lse, const float* delta,
                                                  const int* tiles, const unsigned* positions, Shape shape, int window, float scale) {
    // Queries are done 32 at a time: all 64 would not fit the registers beside dK and dV.
    constexpr int HALF = TILE / 2, N = HALF / 8;
    __shared__ float other_lse[2][TILE], other_delta[2][TILE];
    __shared__ int other_position[2][TILE];
    SHARED(bf16, shared);
    // In shared memory: K, V, dO, two tiles of queries.
    const Tile<D> k(shared, 0), v(shared, 1), g(shared, 2);
    const Keys keys(tiles + 5 * blockIdx.x, positions, window);
    const int kv = blockIdx.y, start = keys.tile.start, count = keys.tile.size(), own_shift = shift(positions, start);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
    const size_t stride = shape.row();
    const float scale2 = scale * LOG2E;

    // What is to be done: tile n of queries with one of the group's heads, all tiles of a head before the next head.
    struct Item {
        int head, n;
    };
    const int end = (kv + 1) * shape.group();
    const auto next = [&](Item item) {
        item.n = keys.next(item.n, positions, window);
        // The first tile is never hidden: it holds these keys' own queries.
        if (item.n >= keys.queries.tiles) item.n = 0, item.head++;
        return item;
    };
    const auto fetch_queries = [&](Item item, int buffer) {
        const Range others = keys.queries.tile(item.n);
        Tile<D>(shared, 3 + buffer).fetch(qkv + others.start * stride + size_t(item.head) * D, stride, others.size());
    };
    const auto fetch_upstream = [&](Item item) {
        const Range others = keys.queries.tile(item.n);
        g.fetch(dout + others.start * shape.width() + size_t(item.head) * D, shape.width(), others.size());
    };
    // Half of the threads carry a tile's lse and positions, the others its delta.
    const int carried = threadIdx.x % TILE;
    const bool carries_lse = threadIdx.x < TILE;
    float number = 0.0f;
    int position = 0;
    const auto read = [&](Item item) {
        const Range others = keys.queries.tile(item.n);
        const int i = others.start + carried;
        const bool inside = i < others.end;
        const size_t at = size_t(i) * shape.heads + item.head;
        // A row that does not exist gets P = 0.
        number = carries_lse ? (inside ? lse[at] * LOG2E : INFINITY) : (inside ? delta[at] : 0.0f);
        position = inside ? int(positions[i]) : 0;
    };
    const auto leave = [&](int buffer) {
        (carries_lse ? other_lse : other_delta)[buffer][carried] = number;
        if (carries_lse) other_position[buffer][carried] = position;
    };

    Item item = next({kv * shape.group(), 0});
    k.fetch(qkv + start * stride + shape.key_column(kv), stride, count);
    v.fetch(qkv + start * stride + shape.value_column(kv), stride, count);
    fetch_queries(item, 0);
    fetch_upstream(item);
    cp_async_commit();
    read(item);
    leave(0);
    Sums<D / 8> dk, dv;
    clear_sums<D / 8>(dk);
    clear_sums<D / 8>(dv);
    for (int buffer = 0; item.head < end; buffer ^= 1) {
        const Item following = next({item.head, item.n + 1});
        const bool more = following.head < end;
        // The item's tiles have come, and all warps are done with the queries before.
        cp_async_wait<0>();
        __syncthreads();
        if (more) fetch_queries(following, buffer ^ 1), read(following);
        cp_async_commit();
        const Tile<D> q(shared, 3 + buffer);
        const Range others = keys.queries.tile(item.n);
        const bool all = window == NO_WINDOW && others.start >= keys.tile.end - 1;
        uint32_t ds[2][N / 2][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Sums<N> s, dp;
            scores<D, N>(s, k, row, q, half * HALF);
            scores<D, N>(dp, v, row, g, half * HALF);
#pragma unroll
            for (int b = 0; b < N; b++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int column = half * HALF + b * 8 + lane % 4 * 2 + e % 2, i = others.start + column;
                    const int j = start + row + lane / 4 + e / 2 * 8;
                    const bool seen = all || (j <= i && other_position[buffer][column] - (j + own_shift) < window);
                    s[b][e] = seen ? power_of_2(s[b][e] * scale2 - other_lse[buffer][column]) : 0.0f;
                    dp[b][e] = s[b][e] * (dp[b][e] - other_delta[buffer][column]) * scale;
                }
            uint32_t p[N / 2][4];
            pack<N>(p, s);
            pack<N>(ds[half], dp);
            accumulate<D, N / 2>(dv, p, g, half * HALF);
        }
        // All warps are done with the upstream gradient.
        __syncthreads();
        if (more) fetch_upstream(following);
        cp_async_commit();
#pragma unroll
        for (int half = 0; half < 2; half++) accumulate<D, N / 2>(dk, ds[half], q, half * HALF);
        if (more) leave(buffer ^ 1);
        item = following;
    }
    store<D>(dqkv + start * stride + shape.key_column(kv), stride, row, count, dk, 1.0f, 1.0f);
    store<D>(dqkv + start * stride + shape.value_column(kv), stride, row, count, dv, 1.0f, 1.0f);
}

}  // namespace attn

// Forward [(tiles, H); 128]; dynamic shared memory: 4 tiles, i.e. 32768 bytes for D = 64, 65536 for D = 128, where
// CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES must be set.
KERNEL void attention_mma_64(bf16* out, float* lse, const bf16* qkv, const int* tiles, const unsigned* positions, int heads, int kv_heads,
                             int /*dim*/, int window, float scale) {
    attn::forward_mma<64>(out, lse, qkv, tiles, positions, {heads, kv_heads, 64}, attn::limit(window), scale);
}

KERNEL void attention_mma_128(bf16* out, float* lse, const bf16* qkv, const int* tiles, const unsigned* positions, int heads, int kv_heads,
                              int /*dim*/, int window, float scale) {
    attn::forward_mma<128>(out, lse, qkv, tiles, positions, {heads, kv_heads, 128}, attn::limit(window), scale);
}

// Gradient of the queries [(tiles, H); 128]; dynamic shared memory: 5 tiles, i.e. 40960 bytes for D = 64, 81920 for D = 128, where
// CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES must be set.
KERNEL void attention_dq_mma_64(bf16* dqkv, const bf16* qkv, const bf16* dout, const float* lse, const float* delta, const int* tiles,
                                const unsigned* positions, int heads, int kv_heads, int /*dim*/, int window, float scale) {
    attn::backward_queries_mma<64>(dqkv, qkv, dout, lse, delta, tiles, positions, {heads, kv_heads, 64}, attn::limit(window), scale);
}

KERNEL void attention_dq_mma_128(bf16* dqkv, const bf16* qkv, const bf16* dout, const float* lse, const float* delta, const int* tiles,
                                 const unsigned* positions, int heads, int kv_heads, int /*dim*/, int window, float scale) {
    attn::backward_queries_mma<128>(dqkv, qkv, dout, lse, delta, tiles, positions, {heads, kv_heads, 128}, attn::limit(window), scale);
}

// Gradients of keys and values [(key tiles, K); 128]; dynamic shared memory: 5 tiles, i.e. 40960 bytes for D = 64, 81920 for D = 128, where
// CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES must be set; 1536 bytes are static.
KERNEL void attention_dkv_mma_64(bf16* dqkv, const bf16* qkv, const bf16* dout, const float* lse, const float* delta, const int* key_tiles,
                                 const unsigned* positions, int heads, int kv_heads, int /*dim*/, int window, float scale) {
    attn::backward_keys_mma<64>(dqkv, qkv, dout, lse, delta, key_tiles, positions, {heads, kv_heads, 64}, attn::limit(window), scale);
}

KERNEL void attention_dkv_mma_128(bf16* dqkv, const bf16* qkv, const bf16* dout, const float* lse, const float* delta, const int* key_tiles,
                                  const unsigned* positions, int heads, int kv_heads, int /*dim*/, int window, float scale) {
    attn::backward_keys_mma<128>(dqkv, qkv, dout, lse, delta, key_tiles, positions, {heads, kv_heads, 128}, attn::limit(window), scale);
}
