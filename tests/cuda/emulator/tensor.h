// Tensor-core operations and asynchronous copies, with the fragment layouts of the PTX manual.
// Lane l of a warp: g = l / 4, t = l % 4; a register holds two 16-bit values, the lower half first.
#pragma once

namespace emulate {

inline float half_of(uint32_t pair, unsigned upper) {
    return __uint_as_float(upper ? pair & 0xffff0000u : pair << 16);
}
inline void check_whole_warp(const char* operation, unsigned mask) {
    if (mask != ~0u) {
        fail("%s needs a whole warp, not %08x", operation, mask);
    }
}

struct Mma {
    float* d;
    const uint32_t *a, *b;
};
inline void mma_of_warp(void* const* arguments, unsigned mask) {
    check_whole_warp("mma", mask);
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const auto* of = static_cast<const Mma*>(arguments[lane]);
        const unsigned g = lane / 4, t = lane % 4;
        // Value i is in register i / 2: odd registers 8 rows down, the last two 8 columns right.
        for (unsigned i = 0; i < 8; ++i) {
            a[g + i / 2 % 2 * 8][t * 2 + i % 2 + i / 4 * 8] = half_of(of->a[i / 2], i % 2);
        }
        for (unsigned i = 0; i < 4; ++i) {
            b[t * 2 + i % 2 + i / 2 * 8][g] = half_of(of->b[i / 2], i % 2);
        }
    }
    for (unsigned row = 0; row < 16; ++row) {
        float sum[8] = {};
        for (unsigned k = 0; k < 16; ++k) {
            for (unsigned col = 0; col < 8; ++col) {
                sum[col] += a[row][k] * b[k][col];
            }
        }
        for (unsigned col = 0; col < 8; ++col) {
            static_cast<const Mma*>(arguments[row % 8 * 4 + col / 2])->d[row / 8 * 2 + col % 2] +=
                sum[col];
        }
    }
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Mma argument{d, a, b};
    here.worker->wait_in_warp(&mma_of_warp, "mma", ~0u, &argument);
}

struct Ldmatrix {
    uint32_t* r;
    const void* address;
};
template <bool TRANSPOSED>
void ldmatrix_of_warp(void* const* arguments, unsigned mask) {
    check_whole_warp("ldmatrix", mask);
    for (unsigned m = 0; m < 4; ++m) {
        uint16_t matrix[8][8];
        for (unsigned row = 0; row < 8; ++row) {
            memcpy(matrix[row], static_cast<const Ldmatrix*>(arguments[m * 8 + row])->address, 16);
        }
        for (unsigned lane = 0; lane < WARP; ++lane) {
            const unsigned g = lane / 4, t = lane % 4;
            const uint32_t low = TRANSPOSED ? matrix[t * 2][g] : matrix[g][t * 2];
            const uint32_t high = TRANSPOSED ? matrix[t * 2 + 1][g] : matrix[g][t * 2 + 1];
            static_cast<const Ldmatrix*>(arguments[lane])->r[m] = low | high << 16;
        }
    }
}
template <bool TRANSPOSED>
void ldmatrix_x4(uint32_t (&r)[4], const void* address) {
    check_aligned(address, 16);
    note_access(address, 16, false);
    Ldmatrix argument{r, address};
    here.worker->wait_in_warp(&ldmatrix_of_warp<TRANSPOSED>, "ldmatrix", ~0u, &argument);
}

// Moves the bytes as late as possible: when the thread waits for them. Until then the target holds
// NaN. A read without a wait, and a copy to a target that others still read, therefore give NaN.
inline void cp_async_16(void* to, const void* from, bool valid) {
    check_aligned(to, 16);
    check_aligned(from, 16);
    note_access(to, 16, true);
    memset(to, POISON, 16);
    Fiber& fiber = *here.worker->current;
    fiber.copies.push_back(Copy{to, valid ? from : nullptr, fiber.group});
}
inline void cp_async_commit() { here.worker->current->group += 1; }
inline void cp_async_wait(unsigned newest) {
    Fiber& fiber = *here.worker->current;
    size_t done = 0;
    for (; done < fiber.copies.size() && fiber.copies[done].group + newest < fiber.group; ++done) {
        const Copy& copy = fiber.copies[done];
        note_access(copy.to, 16, true);
        if (copy.from == nullptr) {
            memset(copy.to, 0, 16);
        } else {
            memcpy(copy.to, copy.from, 16);
        }
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + long(done));
}

}  // namespace emulate
