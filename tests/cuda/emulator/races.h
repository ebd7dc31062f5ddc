// Finds races in shared memory: two threads of a block access the same bytes without a barrier in
// between, and one of them writes. With EMULATE_RACES defined and the kernels compiled with
// -fsanitize=thread, every access calls a function of races.cpp, which replaces the sanitizer's
// library. Asynchronous copies and matrix loads are recorded where they are emulated.
// __syncthreads orders the threads of a block, __syncwarp those of a warp. Shuffles, votes and
// tensor-core operations order nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulate {

#ifdef EMULATE_RACES

class Races {
  public:
    // Starts a block of `warps` warps with `bytes` bytes of shared memory.
    void begin(size_t bytes, unsigned warps) {
        warps_ = warps;
        cells_.assign((bytes + GRANULE - 1) / GRANULE * warps, Cell{});
        between_syncwarps_.assign(warps, 0);
        between_barriers_ = 1;
    }
    void block_barrier() { between_barriers_ += 1; }
    void warp_barrier(unsigned warp) { between_syncwarps_[warp] += 1; }

    // Records that a thread reads or writes bytes from `at` on. Returns another thread whose access
    // it races with, or -1.
    int access(unsigned thread, size_t at, size_t bytes, bool write) {
        const unsigned own = thread / 32, lane = 1u << thread % 32;
        current_ = own;
        int other = -1;
        for (size_t g = at / GRANULE; g * GRANULE < at + bytes && (g + 1) * warps_ <= cells_.size();
             ++g) {
            Cell* of_warps = &cells_[g * warps_];
            for (unsigned w = 0; w < warps_; ++w) {
                unsigned lanes = lanes_of(of_warps[w].writes, w);
                if (write) lanes |= lanes_of(of_warps[w].reads, w);
                if (w == own) lanes &= ~lane;
                if (lanes != 0) other = int(w * 32 + unsigned(__builtin_ctz(lanes)));
            }
            Accesses& mine = write ? of_warps[own].writes : of_warps[own].reads;
            if (mine.between_barriers != between_barriers_ ||
                mine.between_syncwarps != between_syncwarps_[own]) {
                // The warp's accesses before its last __syncwarp are ordered before this one for
                // the warp itself, but not for other warps.
                const unsigned before =
                    mine.between_barriers == between_barriers_ ? mine.earlier | mine.lanes : 0;
                mine = Accesses{between_barriers_, between_syncwarps_[own], 0, before};
            }
            mine.lanes |= lane;
        }
        return other;
    }

  private:
    static constexpr size_t GRANULE = 2;  // bytes; the kernels have nothing smaller
    // The accesses of a warp to a granule. The numbers of the block's __syncthreads and of the
    // warp's __syncwarp that came before say when they happened. Accesses before the last
    // __syncthreads no longer count; those before the last __syncwarp count for other warps only.
    struct Accesses {
        unsigned between_barriers = 0, between_syncwarps = 0;
        unsigned lanes = 0, earlier = 0;  // since the last __syncwarp, and before it
    };
    struct Cell {
        Accesses reads, writes;
    };

    // The lanes of warp w whose accesses are not ordered before the current one, of warp `current`.
    unsigned lanes_of(const Accesses& of, unsigned w) const {
        if (of.between_barriers != between_barriers_) return 0;
        return w != current_                                   ? of.lanes | of.earlier
               : of.between_syncwarps == between_syncwarps_[w] ? of.lanes
                                                               : 0;
    }

    unsigned warps_ = 0, between_barriers_ = 1, current_ = 0;
    std::vector<unsigned> between_syncwarps_;
    std::vector<Cell> cells_;
};

// Records an access of the calling fiber and aborts if it is a race. Only shared memory is checked.
void note_access(const void* address, size_t bytes, bool write);

#else

inline void note_access(const void*, size_t, bool) {}

#endif

}  // namespace emulate
