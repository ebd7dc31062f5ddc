// What the attention kernels share: which tiles a block walks, and the mask.
//
// A query i sees a key j of the listed ranges if j ≤ i and position(i) − position(j) < window. Positions are consecutive within a segment; a
// completion's continue from the end of its prompt. The host lists, for a tile of queries, the keys (and for a tile of keys, the queries) that
// may matter: two ranges each.
#pragma once

#include "common.cuh"

namespace attn {

constexpr int TILE = 64;
constexpr int THREADS = 128;
// In place of "no window": no two positions are that far apart.
constexpr int NO_WINDOW = 1 << 30;

// The kernels' argument, where 0 is no limit. A position is added to the window: beyond NO_WINDOW the sum might overflow.
__device__ __forceinline__ int limit(int window) { return window <= 0 || window > NO_WINDOW ? NO_WINDOW : window; }

struct Range {
    int start, end;

    __device__ __forceinline__ int size() const { return end - start; }
};

// Two ranges of tokens walked in tiles of 64: first the one, then the other.
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

// Position minus index: the same for all tokens of a segment.
__device__ __forceinline__ int shift(const unsigned* positions, int token) { return int(positions[token]) - token; }

// The part of `keys` (of one segment) that the window leaves to a query at `position` and to later ones.
__device__ __forceinline__ Range within_window(Range keys, int position, const unsigned* positions, int window) {
    if (keys.size() <= 0) return {keys.start, keys.start};
    const int first = position - window + 1 - shift(positions, keys.start);
    return {min(max(first, keys.start), keys.end), keys.end};
}

// The queries of a block, [start, end), and the keys that they see: those of the prompt, then those of their own segment.
struct Queries {
    Range tile;
    Walk keys;

    // `entry`: start, end, start of the segment, prefix start, prefix end.
    __device__ Queries(const int* entry, const unsigned* positions, int window)
        : tile{entry[0], entry[1]},
          keys(within_window({entry[3], entry[4]}, int(positions[entry[0]]), positions, window),
               within_window({entry[2], entry[1]}, int(positions[entry[0]]), positions, window)) {}
};

// The keys of a block, [start, end), and the queries that see them: those of their own segment, then those of the completions of a prompt.
struct Keys {
    Range tile;
    int last_position;
    Walk queries;

    // `entry`: start, end, end of the segment, first query that depends on the segment, end of these.
    __device__ Keys(const int* entry, const unsigned* positions, int window)
        : tile{entry[0], entry[1]},
          last_position(int(positions[entry[1] - 1])),
          queries({entry[0], min(entry[2], entry[1] - 1 + window)}, dependent(entry, positions, window)) {}

    // All completions start at the same position, so either the first one sees the last key of the tile or none does.
    __device__ static Range dependent(const int* entry, const unsigned* positions, int window) {
        const bool none = entry[3] >= entry[4] || int(positions[entry[3]]) - int(positions[entry[1] - 1]) >= window;
        return none ? Range{entry[3], entry[3]} : Range{entry[3], entry[4]};
    }

    // The next tile of queries from the n-th on that is not wholly hidden by the window. A tile of the second range may span several completions,
    // whose positions start anew, so all its positions are looked at; every warp of the block finds the same.
    __device__ int next(int n, const unsigned* positions, int window) const {
        if (window == NO_WINDOW) return n;
        for (; n < queries.tiles; n++) {
            const Range q = queries.tile(n);
            int nearest = NO_WINDOW;
            for (int i = q.start + int(threadIdx.x % 32); i < q.end; i += 32) nearest = min(nearest, int(positions[i]));
            for (int offset = 16; offset > 0; offset /= 2) nearest = min(nearest, __shfl_xor_sync(FULL_WARP, nearest, offset));
            if (nearest - last_position < window) break;
        }
        return n;
    }
};

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
