// Access to rows as floats, W elements at a time: 16 bytes per access if the addresses are aligned,
// otherwise single elements.
#pragma once

#include "common.cuh"

// A width that is known at compile time.
template <int N>
struct Width {
    static constexpr int value = N;
};

// Calls body(Width<W>()). W is the number of T in 16 bytes if `wide`, otherwise 1. `wide` must be
// the same for all threads. Floats beside bf16 are accessed as two times 16 bytes.
template <class T, class Body>
__device__ __forceinline__ void by_width(bool wide, Body body) {
    if (wide) {
        body(Width<Vector<T>::N>());
    } else {
        body(Width<1>());
    }
}

// Loads W elements from `from` on. For W > 1, `from` must be 16-byte aligned.
template <int W, class T>
__device__ __forceinline__ void load(float (&to)[W], const T* from) {
    if constexpr (W == 1) {
        to[0] = to_float(*from);
    } else {
        constexpr int N = Vector<T>::N;
#pragma unroll
        for (int k = 0; k < W / N; ++k) {
            const Vector<T> part = load_16(from + k * N);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                to[k * N + j] = to_float(part.v[j]);
            }
        }
    }
}

// Stores W elements at `to`, rounded to T. For W > 1, `to` must be 16-byte aligned.
template <int W, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[W]) {
    if constexpr (W == 1) {
        *to = from_float<T>(from[0]);
    } else {
        constexpr int N = Vector<T>::N;
#pragma unroll
        for (int k = 0; k < W / N; ++k) {
            Vector<T> part;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                part.v[j] = from_float<T>(from[k * N + j]);
            }
            store_16(to + k * N, part);
        }
    }
}

// Index of this thread in a one-dimensional grid, and the number of all threads in the grid.
__device__ __forceinline__ long long grid_thread() {
    return (long long)blockIdx.x * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ long long grid_threads() { return (long long)gridDim.x * blockDim.x; }

// Grid-stride loop over the cells of a table with `width` columns, one cell per thread and step.
// Any grid covers the table, and neighbouring lanes of a warp get neighbouring cells. Only the
// constructor divides.
//     for (Cells at(columns); at.row < rows; at.next()) { ... at.row, at.column ... }
struct Cells {
    long long row;
    int column;

    __device__ __forceinline__ explicit Cells(int width) : columns(width) {
        const unsigned long long first = grid_thread(), step = grid_threads();
        const unsigned long long n = width;
        row = first / n;
        column = int(first % n);
        row_step = step / n;
        column_step = int(step % n);
    }

    __device__ __forceinline__ void next() {
        row += row_step;
        // Tests column + column_step ≥ columns without overflow.
        if (column >= columns - column_step) {
            column -= columns - column_step;
            ++row;
        } else {
            column += column_step;
        }
    }

  private:
    int columns;
    long long row_step;
    int column_step;
};
