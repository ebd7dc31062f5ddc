// Tests of the search for races in shared memory: tests/cuda/run races
#include "common.cuh"

#include "aborts.h"

// Each thread reads what its neighbour wrote.
template <bool BARRIER>
__device__ void neighbours(int* out) {
    __shared__ int values[64];
    values[threadIdx.x] = int(threadIdx.x);
    if (BARRIER) __syncthreads();
    out[threadIdx.x] = values[(threadIdx.x + 32) % 64];
}
KERNEL void with_barrier(int* out) { neighbours<true>(out); }
KERNEL void without_barrier(int* out) { neighbours<false>(out); }

// All threads read, then overwrite: without the second barrier this is a race.
KERNEL void overwritten(int* out, int barrier) {
    SHARED(int, values);
    values[threadIdx.x] = int(threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = values[63 - threadIdx.x];
    if (barrier) __syncthreads();
    values[threadIdx.x] = 1;
}

// Within a warp __syncwarp is enough, across warps it is not, and a shuffle orders nothing.
KERNEL void in_a_warp(int* out, int how) {
    __shared__ int values[64];
    const unsigned t = threadIdx.x, other = how == 1 ? (t + 32) % 64 : t ^ 1;
    values[t] = int(t);
    if (how == 2)
        __shfl_sync(FULL_WARP, int(t), 0);
    else
        __syncwarp();
    out[t] = values[other];
}

// Two threads write the same value to the same place.
KERNEL void same_place(int* out) {
    __shared__ int value;
    if (threadIdx.x % 40 == 0) value = 7;
    __syncthreads();
    out[threadIdx.x] = value;
}

// Asynchronous copies: other threads may read the bytes after the wait and a barrier.
KERNEL void copied(const int* from, int* out, int barrier) {
    SHARED(int, values);
    if (threadIdx.x < 16) cp_async_16(values + threadIdx.x * 4, from + threadIdx.x * 4, true);
    cp_async_commit();
    cp_async_wait<0>();
    if (barrier) __syncthreads();
    out[threadIdx.x] = values[63 - threadIdx.x];
}

int main() {
    int* out = static_cast<int*>(aligned_alloc(16, 256));
    int* from = static_cast<int*>(aligned_alloc(16, 256));
    for (int i = 0; i < 64; i++) from[i] = i;
    const dim3 one(1), threads(64);
    emulate::launch(with_barrier, one, threads, 0, out);
    CHECK(out[0] == 32 && out[40] == 8);
    CHECK(aborts_with("race: ", [&] { emulate::launch(without_barrier, one, threads, 0, out); }));
    emulate::launch(overwritten, one, threads, 256, out, 1);
    CHECK(aborts_with("race: ", [&] { emulate::launch(overwritten, one, threads, 256, out, 0); }));
    emulate::launch(in_a_warp, one, threads, 0, out, 0);
    CHECK(aborts_with("race: ", [&] { emulate::launch(in_a_warp, one, threads, 0, out, 1); }));
    CHECK(aborts_with("race: ", [&] { emulate::launch(in_a_warp, one, threads, 0, out, 2); }));
    CHECK(aborts_with("race: ", [&] { emulate::launch(same_place, one, threads, 0, out); }));
    emulate::launch(copied, one, threads, 256, from, out, 1);
    CHECK(out[0] == 63 && out[63] == 0);
    CHECK(aborts_with("race: ", [&] { emulate::launch(copied, one, threads, 256, from, out, 0); }));
    printf("races: %s\n", failures == 0 ? "ok" : "FAILED");
    return failures != 0;
}
