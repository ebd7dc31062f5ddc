// Kernels without a reduction over a row: moving rows, rotary embedding, gated linear units (SwiGLU
// and GEGLU), biases, casts; and column sums.
//
// The end of a kernel's comment gives its launch as [blocks; threads]. With "any" blocks, the
// threads run a grid-stride loop, so that every grid is correct. It is fastest with one thread per
// cell of 16 bytes; threads without a cell exit at once.
#include "elements.cuh"

// -------------------------------------------------------------------------------------------
// moving rows

// x[t, :] = table[ids[t], :].   [any, e.g. tokens; 256]
template <class T>
__device__ __forceinline__ void embed(float* x, const T* table, const unsigned* ids, int tokens,
                                      int width) {
    by_width<T>(rows_aligned_16(x, width) && rows_aligned_16(table, width), [&](auto w) {
        constexpr int W = decltype(w)::value;
        for (Cells at(width / W); at.row < tokens; at.next()) {
            float v[W];
            load(v, table + (long long)ids[at.row] * width + at.column * W);
            store(x + at.row * width + at.column * W, v);
        }
    });
}
INSTANTIATE(embed, (float* x, const T* table, const unsigned* ids, int tokens, int width),
            (x, table, ids, tokens, width))

// to[i, :] = from[index[i], :].   [any, e.g. n; 256]
KERNEL void gather_rows(float* to, const float* from, const unsigned* index, int n, int width) {
    embed<float>(to, from, index, n, width);
}

// to[rows[i], :] += Σ from[order[k], :] over k in offsets[i]..offsets[i+1], added in this order.
// The rows are distinct, so no two threads share an element.   [any, e.g. unique; 256]
KERNEL void scatter_rows(float* to, const float* from, const unsigned* rows,
                         const unsigned* offsets, const unsigned* order, int unique, int width) {
    by_width<float>(rows_aligned_16(to, width) && rows_aligned_16(from, width), [&](auto w) {
        constexpr int W = decltype(w)::value;
        for (Cells at(width / W); at.row < unique; at.next()) {
            float* const target = to + (long long)rows[at.row] * width + at.column * W;
            float sum[W];
            load(sum, target);
            const unsigned end = offsets[at.row + 1];
            // Unrolled, so that several loads are in flight at once.
#pragma unroll 4
            for (unsigned k = offsets[at.row]; k < end; ++k) {
                float v[W];
                load(v, from + (long long)order[k] * width + at.column * W);
#pragma unroll
                for (int j = 0; j < W; ++j) {
                    sum[j] += v[j];
                }
            }
            store(target, sum);
        }
    });
}

// to[i, :] = g[i] · from[i, :].   [any, e.g. rows; 256]
template <class T>
__device__ __forceinline__ void scale_rows(T* to, const float* from, const float* g, int rows,
                                           int width) {
    by_width<T>(rows_aligned_16(to, width) && rows_aligned_16(from, width), [&](auto w) {
        constexpr int W = decltype(w)::value;
        for (Cells at(width / W); at.row < rows; at.next()) {
            const long long start = at.row * width + at.column * W;
            float v[W];
            load(v, from + start);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                v[j] *= g[at.row];
            }
            store(to + start, v);
        }
    });
}
INSTANTIATE(scale_rows, (T * to, const float* from, const float* g, int rows, int width),
            (to, from, g, rows, width))

// -------------------------------------------------------------------------------------------------
// casts

// to[i] = from[i], rounded to To. `Narrow` is the narrower of the two types; 16 bytes of it are
// processed at a time.
template <class Narrow, class To, class From>
__device__ __forceinline__ void cast(To* to, const From* from, long long n) {
    by_width<Narrow>(is_aligned_16(to) && is_aligned_16(from), [&](auto w) {
        constexpr int W = decltype(w)::value;
        for (long long i = grid_thread(); i < n / W; i += grid_threads()) {
            float v[W];
            load(v, from + i * W);
            store(to + i * W, v);
        }
        for (long long i = n / W * W + grid_thread(); i < n; i += grid_threads()) {
            to[i] = from_float<To>(to_float(from[i]));
        }
    });
}
// [any; 256]
KERNEL void cast_bf16(bf16* to, const float* from, long long n) { cast<bf16>(to, from, n); }
// [any; 256]
KERNEL void cast_f32(float* to, const bf16* from, long long n) { cast<bf16>(to, from, n); }

// -------------------------------------------------------------------------------------------------
// rotary positions

// Rotates the first 2·half dimensions of the first `heads` heads of every row in place, i in
// 0..half, with n = half:
//     (x_i, x_{i+n}) = (x_i·cos_i − x_{i+n}·s_i, x_{i+n}·cos_i + x_i·s_i),  s = sign·sin,
// with cos and sin [tokens, half]. sign = −1 rotates back, which maps the gradient of the output
// to that of the input.   [any, e.g. tokens; 256]
template <class T>
__device__ __forceinline__ void rope(T* qkv, const float* cos, const float* sin, int tokens,
                                     int stride, int heads, int dim, int half, float sign) {
    const bool wide = rows_aligned_16(qkv, stride) && rows_aligned_16(qkv, dim) &&
                      rows_aligned_16(qkv, half) && rows_aligned_16(cos, half) &&
                      rows_aligned_16(sin, half);
    by_width<T>(wide, [&](auto w) {
        constexpr int W = decltype(w)::value;
        const int per_head = half / W;
        for (Cells at(heads * per_head); at.row < tokens; at.next()) {
            const int head = at.column / per_head, i = (at.column - head * per_head) * W;
            T* const x = qkv + at.row * stride + (long long)head * dim + i;
            float a[W], b[W], c[W], s[W];
            load(a, x);
            load(b, x + half);
            load(c, cos + at.row * half + i);
            load(s, sin + at.row * half + i);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                const float turned = sign * s[j], old = a[j];
                a[j] = old * c[j] - b[j] * turned;
                b[j] = b[j] * c[j] + old * turned;
            }
            store(x, a);
            store(x + half, b);
        }
    });
}
INSTANTIATE(rope,
            (T * qkv, const float* cos, const float* sin, int tokens, int stride, int heads,
             int dim, int half, float sign),
            (qkv, cos, sin, tokens, stride, heads, dim, half, sign))

// As rope, but rotates the dimensions 2i and 2i + 1 together.   [any, e.g. tokens; 256]
template <class T>
__device__ __forceinline__ void rope_interleaved(T* qkv, const float* cos, const float* sin,
                                                 int tokens, int stride, int heads, int dim,
                                                 int half, float sign) {
    for (Cells at(heads * half); at.row < tokens; at.next()) {
        const int head = at.column / half, i = at.column - head * half;
        T* const x = qkv + at.row * stride + (long long)head * dim + 2 * i;
        const float a = to_float(x[0]), b = to_float(x[1]);
        const float c = cos[at.row * half + i], s = sign * sin[at.row * half + i];
        x[0] = from_float<T>(a * c - b * s);
        x[1] = from_float<T>(b * c + a * s);
    }
}
INSTANTIATE(rope_interleaved,
            (T * qkv, const float* cos, const float* sin, int tokens, int stride, int heads,
             int dim, int half, float sign),
            (qkv, cos, sin, tokens, stride, heads, dim, half, sign))

// -------------------------------------------------------------------------------------------------
// gated linear units

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Activations x·σ(u(x)). `sigma` is σ(u). `derivative` is that of the activation divided by
// s = σ(u): 1 + x·u'·(1 − s).
struct Silu {
    static __device__ __forceinline__ float sigma(float x) { return sigmoid(x); }
    static __device__ __forceinline__ float derivative(float x, float s) {
        return 1.0f + x * (1.0f - s);
    }
};
// GELU with its tanh approximation: u = 2·√(2/π)·(x + 0.044715·x³).
struct GeluTanh {
    static constexpr float SCALE = 1.5957692f, CUBE = 0.044715f;
    static __device__ __forceinline__ float sigma(float x) {
        return sigmoid(SCALE * (x + CUBE * x * x * x));
    }
    static __device__ __forceinline__ float derivative(float x, float s) {
        return 1.0f + x * (1.0f - s) * (SCALE * (1.0f + 3.0f * CUBE * x * x));
    }
};

// y[t, f] = activation(gate)·up, with gate_up [tokens, 2·width] = [gate | up].   [any; 256]
template <class Activation, class T>
__device__ __forceinline__ void gated(T* y, const T* gate_up, int tokens, int width) {
    by_width<T>(rows_aligned_16(y, width) && rows_aligned_16(gate_up, width), [&](auto w) {
        constexpr int W = decltype(w)::value;
        for (Cells at(width / W); at.row < tokens; at.next()) {
            const T* const gate = gate_up + at.row * 2 * width + at.column * W;
            float a[W], b[W];
            load(a, gate);
            load(b, gate + width);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                a[j] = a[j] * Activation::sigma(a[j]) * b[j];
            }
            store(y + at.row * width + at.column * W, a);
        }
    });
}
template <class T>
__device__ __forceinline__ void swiglu(T* y, const T* gate_up, int tokens, int width) {
    gated<Silu>(y, gate_up, tokens, width);
}
template <class T>
__device__ __forceinline__ void geglu(T* y, const T* gate_up, int tokens, int width) {
    gated<GeluTanh>(y, gate_up, tokens, width);
}
INSTANTIATE(swiglu, (T * y, const T* gate_up, int tokens, int width), (y, gate_up, tokens, width))
INSTANTIATE(geglu, (T * y, const T* gate_up, int tokens, int width), (y, gate_up, tokens, width))

// Replaces [gate | up] by its gradient for the upstream gradient gy; with s = σ(u(gate)):
//     ∂gate = gy·up·s·(1 + gate·u'·(1 − s)),  ∂up = gy·gate·s.   [any; 256]
template <class Activation, class T>
__device__ __forceinline__ void gated_backward(T* gate_up, const T* gy, int tokens, int width) {
    by_width<T>(rows_aligned_16(gate_up, width) && rows_aligned_16(gy, width), [&](auto w) {
        constexpr int W = decltype(w)::value;
        for (Cells at(width / W); at.row < tokens; at.next()) {
            T* const gate = gate_up + at.row * 2 * width + at.column * W;
            float a[W], b[W], g[W];
            load(a, gate);
            load(b, gate + width);
            load(g, gy + at.row * width + at.column * W);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                const float s = Activation::sigma(a[j]), gs = g[j] * s, old = a[j];
                a[j] = gs * b[j] * Activation::derivative(old, s);
                b[j] = gs * old;
            }
            store(gate, a);
            store(gate + width, b);
        }
    });
}
template <class T>
__device__ __forceinline__ void swiglu_backward(T* gate_up, const T* gy, int tokens, int width) {
    gated_backward<Silu>(gate_up, gy, tokens, width);
}
template <class T>
__device__ __forceinline__ void geglu_backward(T* gate_up, const T* gy, int tokens, int width) {
    gated_backward<GeluTanh>(gate_up, gy, tokens, width);
}
INSTANTIATE(swiglu_backward, (T * gate_up, const T* gy, int tokens, int width),
            (gate_up, gy, tokens, width))
INSTANTIATE(geglu_backward, (T * gate_up, const T* gy, int tokens, int width),
            (gate_up, gy, tokens, width))

// -------------------------------------------------------------------------------------------------
// biases, sums of columns

// y[r, c] = (accumulate ? y[r, c] : 0) + bias[c]. Without `accumulate`, y is not read.   [any; 256]
template <class T>
__device__ __forceinline__ void add_bias(T* y, const float* bias, int rows, int cols, int stride,
                                         int accumulate) {
    const bool wide = rows_aligned_16(y, stride) && rows_aligned_16(y, cols) && is_aligned_16(bias);
    by_width<T>(wide, [&](auto w) {
        constexpr int W = decltype(w)::value;
        for (Cells at(cols / W); at.row < rows; at.next()) {
            T* const to = y + at.row * stride + at.column * W;
            float b[W];
            load(b, bias + at.column * W);
            if (accumulate) {
                float v[W];
                load(v, to);
#pragma unroll
                for (int j = 0; j < W; ++j) {
                    b[j] += v[j];
                }
            }
            store(to, b);
        }
    });
}
INSTANTIATE(add_bias, (T * y, const float* bias, int rows, int cols, int stride, int accumulate),
            (y, bias, rows, cols, stride, accumulate))

// out[c] += Σ_r g[r, c]. Thread (x, y) adds the rows y + 8k of column x in four sums, by k mod 4:
// more loads are in flight and rounding errors are smaller. Then the partial sums of the block are
// added from y = 0 up.   [ceil(cols / 32); (32, 8)]
template <class T>
__device__ __forceinline__ void column_sum(float* out, const T* g, int rows, int cols, int stride) {
    constexpr int COLUMNS = 32, ROWS = 8, SUMS = 4;
    __shared__ float parts[ROWS][COLUMNS];
    const int c = blockIdx.x * COLUMNS + threadIdx.x;
    float sums[SUMS] = {};
    if (c < cols) {
        for (long long r = threadIdx.y; r < rows; r += ROWS * SUMS) {
#pragma unroll
            for (int k = 0; k < SUMS; ++k) {
                if (r + k * ROWS < rows) {
                    sums[k] += to_float(g[(r + k * ROWS) * stride + c]);
                }
            }
        }
    }
    parts[threadIdx.y][threadIdx.x] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    __syncthreads();
    if (threadIdx.y == 0 && c < cols) {
        float sum = 0.0f;
#pragma unroll
        for (int y = 0; y < ROWS; ++y) {
            sum += parts[y][threadIdx.x];
        }
        out[c] += sum;
    }
}
INSTANTIATE(column_sum, (float* out, const T* g, int rows, int cols, int stride),
            (out, g, rows, cols, stride))
