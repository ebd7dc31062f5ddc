// Shared by the attention kernels: the tiles that a block processes, and the mask.
//
// A query i attends to a key j of the listed ranges if j ≤ i and position(i) − position(j) <
// window. Positions are consecutive within a segment; those of a completion continue from the end
// of its prompt. For a tile of queries the host lists the ranges of keys that may be attended to;
// for a tile of keys, the ranges of queries that may attend to them. There are two ranges each.
#pragma once

#include "common.cuh"

namespace attn {

constexpr int TILE = 64;
constexpr int THREADS = 128;
// Value of `window` for "no window": no two positions are this far apart.
constexpr int NO_WINDOW = 1 << 30;

// Converts the kernels' window argument, where 0 means no window. The result is at most NO_WINDOW,
// so that adding a position does not overflow.
__device__ __forceinline__ int limit(int window) {
    return window <= 0 || window > NO_WINDOW ? NO_WINDOW : window;
}

struct Range {
    int start, end;

    __device__ __forceinline__ int size() const { return end - start; }
};

// Two ranges of tokens, processed in tiles of 64: first `one`, then `two`.
struct Walk {
    Range one, two;
    int tiles_of_one, tiles;

    __device__ Walk(Range one, Range two) : one(one), two(two) {
        tiles_of_one = (one.size() + TILE - 1) / TILE;
        tiles = tiles_of_one + (two.size() + TILE - 1) / TILE;
    }

    __device__ Range tile(int n) const {
        const bool in_one = n < tiles_of_one;
        const int start = in_one ? one.start + n * TILE : two.start + (n - tiles_of_one) * TILE;
        const int end = in_one ? one.end : two.end;
        return {start, min(start + TILE, end)};
    }
};

// Position minus index of a token. It is the same for all tokens of a segment.
__device__ __forceinline__ int shift(const unsigned* positions, int token) {
    return int(positions[token]) - token;
}

// The part of `keys` (of one segment) that is inside the window of a query at `position` or of
// later queries.
__device__ __forceinline__ Range within_window(Range keys, int position, const unsigned* positions,
                                               int window) {
    if (keys.size() <= 0) return {keys.start, keys.start};
    const int first = position - window + 1 - shift(positions, keys.start);
    return {min(max(first, keys.start), keys.end), keys.end};
}

// The queries [start, end) of a block, and the keys that they attend to: those of the prompt, then
// those of their own segment.
struct Queries {
    Range tile;
    Walk keys;

    // `entry`: start, end, start of the segment, start and end of the prefix.
    __device__ Queries(const int* entry, const unsigned* positions, int window)
        : tile{entry[0], entry[1]},
          keys(within_window({entry[3], entry[4]}, int(positions[entry[0]]), positions, window),
               within_window({entry[2], entry[1]}, int(positions[entry[0]]), positions, window)) {}
};

// The keys [start, end) of a block, and the queries that attend to them: those of their own
// segment, then those of the completions of a prompt.
struct Keys {
    Range tile;
    int last_position;
    Walk queries;

    // `entry`: start, end, end of the segment, start and end of the queries that depend on the
    // segment.
    __device__ Keys(const int* entry, const unsigned* positions, int window)
        : tile{entry[0], entry[1]},
          last_position(int(positions[entry[1] - 1])),
          queries({entry[0], min(entry[2], entry[1] - 1 + window)},
                  dependent(entry, positions, window)) {}

    // All completions start at the same position, so either each first query attends to the tile's
    // last key or none does.
    __device__ static Range dependent(const int* entry, const unsigned* positions, int window) {
        const bool none = entry[3] >= entry[4] ||
                          int(positions[entry[3]]) - int(positions[entry[1] - 1]) >= window;
        return none ? Range{entry[3], entry[3]} : Range{entry[3], entry[4]};
    }

    // Returns the next tile of queries, from the n-th on, that the window does not mask completely.
    // A tile of the second range may span several completions with restarting positions, so all its
    // positions are read. Every warp of the block computes the same result.
    __device__ int next(int n, const unsigned* positions, int window) const {
        if (window == NO_WINDOW) return n;
        for (; n < queries.tiles; n++) {
            const Range q = queries.tile(n);
            int nearest = NO_WINDOW;
            for (int i = q.start + int(threadIdx.x % 32); i < q.end; i += 32)
                nearest = min(nearest, int(positions[i]));
            for (int offset = 16; offset > 0; offset /= 2)
                nearest = min(nearest, __shfl_xor_sync(FULL_WARP, nearest, offset));
            if (nearest - last_position < window) break;
        }
        return n;
    }
};

// Score of a query and a key, given their dot product.
template <bool CAPPED>
__device__ __forceinline__ float scaled_score(float product, float scale, float softcap) {
    if constexpr (CAPPED)
        return soft_cap(product * scale, softcap);
    else
        return product * scale;
}

// Sizes of the packed rows [q | k | v] and of the outputs.
struct Shape {
    int heads, kv_heads, dim;

    __device__ size_t row() const { return size_t(heads + 2 * kv_heads) * dim; }
    __device__ size_t width() const { return size_t(heads) * dim; }
    __device__ int group() const { return heads / kv_heads; }
    __device__ size_t key_column(int kv) const { return size_t(heads + kv) * dim; }
    __device__ size_t value_column(int kv) const { return size_t(heads + kv_heads + kv) * dim; }
};

}  // namespace attn
