// Tests of the emulator itself and of what common.cuh adds. Build and run:
//     tests/cuda/run emulator
#include "common.cuh"
#include "memory.h"

#include "aborts.h"

#include <random>

static std::mt19937 generator(7);
static float uniform() { return std::uniform_real_distribution<float>(-1, 1)(generator); }

// -------------------------------------------------------------------------------------------------
// shuffles, votes

KERNEL void shuffles(int* out) {
    const int lane = int(threadIdx.x);
    int* mine = out + lane * 10;
    mine[0] = __shfl_sync(FULL_WARP, lane, 5);
    mine[1] = __shfl_xor_sync(FULL_WARP, lane, 3);
    mine[2] = __shfl_down_sync(FULL_WARP, lane, 4);
    mine[3] = __shfl_up_sync(FULL_WARP, lane, 4);
    mine[4] = __shfl_sync(FULL_WARP, lane, 1, 8);
    mine[5] = __shfl_down_sync(FULL_WARP, lane, 2, 4);
    mine[6] = int(__ballot_sync(FULL_WARP, lane % 3 == 0));
    mine[7] = __any_sync(FULL_WARP, lane == 9) + 2 * __all_sync(FULL_WARP, lane < 31);
    // The halves of a warp take different branches, with doubles.
    const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    if (lane < 16) {
        mine[8] = int(__shfl_xor_sync(half, lane + 0.5, 8) * 2);
    } else {
        mine[8] = int(__shfl_xor_sync(half, lane + 0.25, 1) * 4);
    }
    mine[9] = __syncthreads_count(lane % 2) * 4 + (__syncthreads_or(lane == 3) != 0) * 2 +
              (__syncthreads_and(lane > 0) != 0);
}
static void test_shuffles() {
    std::vector<int> out(320);
    emulate::launch(shuffles, 1, 32, 0, out.data());
    for (int l = 0; l < 32; ++l) {
        const int* mine = &out[size_t(l) * 10];
        CHECK(mine[0] == 5);
        CHECK(mine[1] == (l ^ 3));
        CHECK(mine[2] == (l + 4 < 32 ? l + 4 : l));
        CHECK(mine[3] == (l >= 4 ? l - 4 : l));
        CHECK(mine[4] == l / 8 * 8 + 1);
        CHECK(mine[5] == (l % 4 < 2 ? l + 2 : l));
        CHECK(unsigned(mine[6]) == 0x49249249u);
        CHECK(mine[7] == 1);
        CHECK(mine[8] == (l < 16 ? (l ^ 8) * 2 + 1 : (l ^ 1) * 4 + 1));
        CHECK(mine[9] == 16 * 4 + 2);
    }
}

// -------------------------------------------------------------------------------------------
// reductions

KERNEL void reductions(float* out, const float* in) {
    const int i = flat_thread();
    const float x = in[size_t(blockIdx.x) * size_t(flat_threads()) + size_t(i)];
    const float sum = block_sum(x), most = block_max(x);
    const float again = block_sum(x * x);
    float* mine = out + (size_t(blockIdx.x) * size_t(flat_threads()) + size_t(i)) * 3;
    mine[0] = sum;
    mine[1] = most;
    mine[2] = again;
}
static void test_reductions() {
    const unsigned blocks = 5, threads = 256;
    std::vector<float> in(blocks * threads), out(in.size() * 3);
    for (float& x : in) {
        x = uniform();
    }
    emulate::launch(reductions, blocks, dim3(32, 8), 0, out.data(), in.data());
    for (unsigned b = 0; b < blocks; ++b) {
        double sum = 0, most = -9, squares = 0;
        for (unsigned i = 0; i < threads; ++i) {
            const double x = in[b * threads + i];
            sum += x;
            squares += x * x;
            most = std::max(most, x);
        }
        for (unsigned i = 0; i < threads; ++i) {
            const float *mine = &out[(b * threads + i) * 3], *first = &out[b * threads * 3];
            CHECK(std::fabs(mine[0] - sum) < 1e-4 && mine[0] == first[0]);
            CHECK(mine[1] == float(most));
            CHECK(std::fabs(mine[2] - squares) < 1e-4 && mine[2] == first[2]);
        }
    }
}

// -------------------------------------------------------------------------------------------------
// bf16, fragments, ldmatrix, copies

static void test_bf16() {
    CHECK(__bfloat16_as_ushort(from_float<bf16>(1.0f)) == 0x3F80);
    CHECK(__bfloat16_as_ushort(from_float<bf16>(__uint_as_float(0x3F808000))) ==
          0x3F80);  // ties to even
    CHECK(__bfloat16_as_ushort(from_float<bf16>(__uint_as_float(0x3F818000))) == 0x3F82);
    CHECK(__bfloat16_as_ushort(from_float<bf16>(__uint_as_float(0x3F808001))) == 0x3F81);
    CHECK(__bfloat16_as_ushort(from_float<bf16>(3.4e38f)) == 0x7F80);  // overflow: infinity
    CHECK(std::isnan(to_float(from_float<bf16>(NAN))));
    CHECK(low_bf16(pack_bf16(1.5f, -2.0f)) == 1.5f && high_bf16(pack_bf16(1.5f, -2.0f)) == -2.0f);
}

// D = 1 + A · B, A and B row-major in global memory, through shared memory as a real kernel does
// it: A by ldmatrix, B (k × n) by ldmatrix.trans.
KERNEL void product(float* d, const bf16* a, const bf16* b) {
    SHARED(bf16, shared);
    bf16 *a_tile = shared, *b_tile = shared + 256;  // each 16 × 16; mma takes half of B
    const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
    cp_async_16(a_tile + lane * 8, a + lane * 8, true);
    cp_async_16(b_tile + lane * 8, b + lane * 8, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    uint32_t a_part[4], b_part[4];
    ldmatrix_x4(a_part, a_tile + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix_x4_trans(b_part, b_tile + lane % 16 * 16 + lane / 16 * 8);
    for (int n = 0; n < 2; ++n) {
        float sum[4] = {1, 1, 1, 1};
        const uint32_t b_half[2] = {b_part[n * 2], b_part[n * 2 + 1]};
        mma_m16n8k16_bf16(sum, a_part, b_half);
        for (int i = 0; i < 4; ++i) {
            d[(g + i / 2 * 8) * 16 + n * 8 + t * 2 + i % 2] = sum[i];
        }
    }
}
// The same product from fragments that are read element by element, as the PTX manual describes
// them.
KERNEL void product_by_layout(float* d, const bf16* a, const bf16* b) {
    const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
    for (int n = 0; n < 2; ++n) {
        uint32_t a_part[4], b_part[2];
        for (int i = 0; i < 4; ++i) {
            const bf16* from = a + (g + i % 2 * 8) * 16 + t * 2 + i / 2 * 8;
            a_part[i] = pack_bf16(to_float(from[0]), to_float(from[1]));
        }
        for (int i = 0; i < 2; ++i) {
            const bf16* from = b + (t * 2 + i * 8) * 16 + n * 8 + g;
            b_part[i] = pack_bf16(to_float(from[0]), to_float(from[16]));
        }
        float sum[4] = {1, 1, 1, 1};
        mma_m16n8k16_bf16(sum, a_part, b_part);
        for (int i = 0; i < 4; ++i) {
            d[(g + i / 2 * 8) * 16 + n * 8 + t * 2 + i % 2] = sum[i];
        }
    }
}
static void test_product() {
    alignas(16) bf16 a[256], b[256];
    for (int i = 0; i < 256; ++i) {
        a[i] = from_float<bf16>(uniform());
        b[i] = from_float<bf16>(uniform());
    }
    float d[256], by_layout[256];
    emulate::launch(product, 1, 32, 1024, d, a, b);
    emulate::launch(product_by_layout, 1, 32, 0, by_layout, a, b);
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) {
            double sum = 1;
            for (int k = 0; k < 16; ++k) {
                sum += double(to_float(a[i * 16 + k])) * to_float(b[k * 16 + j]);
            }
            CHECK(std::fabs(d[i * 16 + j] - sum) < 1e-5);
            CHECK(by_layout[i * 16 + j] == d[i * 16 + j]);
        }
    }
}

KERNEL void matrices(uint32_t* out) {
    SHARED(uint16_t, shared);
    const int lane = int(threadIdx.x);
    for (int i = 0; i < 8; ++i) {
        shared[lane * 8 + i] = uint16_t(lane * 8 + i);  // matrix lane / 8, row lane % 8, column i
    }
    __syncwarp();
    uint32_t r[4];
    ldmatrix_x4(r, shared + lane * 8);
    for (int m = 0; m < 4; ++m) {
        out[m * 32 + lane] = r[m];
    }
    ldmatrix_x4_trans(r, shared + lane * 8);
    for (int m = 0; m < 4; ++m) {
        out[128 + m * 32 + lane] = r[m];
    }
}
static void test_ldmatrix() {
    std::vector<uint32_t> out(256);
    emulate::launch(matrices, 1, 32, 512, out.data());
    for (unsigned m = 0; m < 4; ++m) {
        for (unsigned l = 0; l < 32; ++l) {
            const unsigned g = l / 4, t = l % 4, first = m * 64;
            CHECK(out[m * 32 + l] == ((first + g * 8 + t * 2) | (first + g * 8 + t * 2 + 1) << 16));
            CHECK(out[128 + m * 32 + l] == ((first + t * 16 + g) | (first + t * 16 + 8 + g) << 16));
        }
    }
}

// Bytes arrive at the wait for their group, not before; an invalid copy writes zeros.
KERNEL void copies(float* out, const float* in) {
    SHARED(float, shared);
    const int at = int(threadIdx.x) * 4;
    for (int stage = 0; stage < 3; ++stage) {
        cp_async_16(shared + stage * 128 + at, in + stage * 128 + at, stage != 1);
        cp_async_commit();
    }
    out[at] = shared[at];  // not waited for: NaN
    cp_async_wait<1>();
    out[at + 1] = shared[at] + shared[128 + at];
    out[at + 2] = shared[256 + at];  // still NaN
    cp_async_wait<0>();
    out[at + 3] = shared[256 + at];
}
static void test_copies() {
    alignas(16) float in[384], out[128];
    for (int i = 0; i < 384; ++i) {
        in[i] = float(i);
    }
    emulate::launch(copies, 1, 32, sizeof in, out, in);
    for (int at = 0; at < 128; at += 4) {
        CHECK(std::isnan(out[at]) && std::isnan(out[at + 2]));
        CHECK(out[at + 1] == in[at] && out[at + 3] == in[256 + at]);
    }
}

// -------------------------------------------------------------------------------------------------
// poison, order, reports

KERNEL void stale(float* out) {
    __shared__ float fixed[4];
    SHARED(float, dynamic);
    if (threadIdx.x == 0) {
        out[blockIdx.x * 2] = fixed[1];
        out[blockIdx.x * 2 + 1] = dynamic[1];
        fixed[1] = dynamic[1] = 5;
    }
}
static void test_poison() {
    float out[6] = {};
    emulate::launch(stale, 3, 32, 64, out);
    for (float x : out) {
        CHECK(std::isnan(x));
    }
    auto* memory = static_cast<float*>(emulate::memory().allocate(40));
    for (int i = 0; i < 10; ++i) {
        CHECK(std::isnan(memory[i]));
    }
    CHECK(emulate::memory().contains(memory + 5, 20) &&
          !emulate::memory().contains(memory + 5, 21));
    CHECK(emulate::memory().release(memory) && !emulate::memory().release(memory));
    setenv("EMULATE_MEMORY", "1000", 1);
    CHECK(emulate::memory().allocate(2000) == nullptr);
    unsetenv("EMULATE_MEMORY");
}

// The writer of the last value depends on the order: a race, between lanes, warps and blocks.
KERNEL void race(unsigned* out) {
    out[0] = threadIdx.x % 32;
    out[1] = threadIdx.x / 32;
    out[2] = blockIdx.x;
}
static void test_order() {
    unsigned out[3];
    const auto run = [&](const char* order) {
        setenv("EMULATE_ORDER", order, 1);
        emulate::launch(race, 4, 128, 0, out);
        return out[0] * 100 + out[1] * 10 + out[2];
    };
    CHECK(run("forward") == 31 * 100 + 3 * 10 + 3);
    CHECK(run("reverse") == 0);
    bool differs = false;
    const unsigned first = run("random:1");
    CHECK(run("random:1") == first);
    for (const char* seed : {"random:2", "random:3", "random:4"}) {
        differs = differs || run(seed) != first;
    }
    CHECK(differs);
    unsetenv("EMULATE_ORDER");
}

KERNEL void diverges(float* out, int kind) {
    SHARED(float, shared);
    const int i = int(threadIdx.x);
    float x = float(i);
    if (kind == 0 && i < 40) {
        __syncthreads();  // the others end
    } else if (kind == 1) {
        if (i % 2 == 0) {
            __syncthreads();
        } else {
            __syncthreads();  // another barrier
        }
    } else if (kind == 2 && i < 8) {
        x = __shfl_xor_sync(FULL_WARP, x, 1);
    } else if (kind == 3 && i % 32 == 0) {
        __syncthreads();
    } else if (kind == 3) {
        __syncwarp();
    } else if (kind == 4) {
        shared[16 + i / 63] = x;  // 64 bytes
    } else if (kind == 5) {
        store_16(shared + 1, Vector<float>{});
    } else if (kind == 6) {
        x = __shfl_sync(0xfffffffeu, x, 0);
    }
    out[i] = x;
}
static void test_reports() {
    static float out[64];
    const char* texts[] = {"divergent barrier", "divergent barrier", "has ended",
                           "divergent barrier", "past the 64 bytes", "not aligned",
                           "calls with mask"};
    for (int kind = 0; kind < 7; ++kind) {
        CHECK(aborts_with(texts[kind],
                          [=] { emulate::launch("diverges", diverges, 1, 64, 64, out, kind); }));
    }
    CHECK(aborts_with("in kernel diverges", [] { emulate::launch(diverges, 1, 64, 64, out, 0); }));
    const auto damage = [](int at) {
        auto* memory = static_cast<char*>(emulate::memory().allocate(100));
        memory[at] = 1;
        emulate::memory().check_after("some_kernel");
    };
    CHECK(aborts_with("0 bytes past the end; last operations: some_kernel", [=] { damage(100); }));
    CHECK(aborts_with("3 bytes before the start", [=] { damage(-3); }));
    CHECK(aborts_with("1025 threads", [] { emulate::launch(race, 1, 1025, 0, nullptr); }));
}

int main() {
    test_bf16();
    test_reports();
    test_order();
    test_poison();
    for (const char* threads : {"1", "2"}) {
        setenv("EMULATE_THREADS", threads, 1);
        for (const char* order : {"forward", "reverse", "random:1", "random:2"}) {
            setenv("EMULATE_ORDER", order, 1);
            test_shuffles();
            test_reductions();
            test_product();
            test_ldmatrix();
            test_copies();
        }
    }
    printf(failures == 0 ? "emulator: all tests passed\n" : "emulator: %d failures\n", failures);
    return failures != 0;
}
