// RMSNorm, y = x / √(mean(x²) + ε) ⊙ w over the last dimension (arXiv:1910.07467), of rows
// and of heads.
#include "elements.cuh"

// Returns 1 / √(mean(x²) + ε), given squares = Σ x².
__device__ __forceinline__ float inverse_rms(float squares, int width, float eps) {
    return 1.0f / sqrtf(squares / float(width) + eps);
}

// -------------------------------------------------------------------------------------------------
// rows
//
// One block per row. After the reduction a thread reads its elements again, from the L1 cache.

// y = the norm of each row of x.   [rows; 256]
template <class T>
__device__ __forceinline__ void rms_norm(T* y, const float* x, const float* w, int rows, int width,
                                         float eps) {
    const long long start = (long long)blockIdx.x * width;
    const bool wide = rows_aligned_16(y, width) && rows_aligned_16(x, width) && is_aligned_16(w);
    by_width<T>(wide, [&](auto elements) {
        constexpr int W = decltype(elements)::value;
        float squares = 0.0f;
        for (int c = threadIdx.x * W; c < width; c += blockDim.x * W) {
            float v[W];
            load(v, x + start + c);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                squares += v[j] * v[j];
            }
        }
        const float r = inverse_rms(block_sum(squares), width, eps);
        for (int c = threadIdx.x * W; c < width; c += blockDim.x * W) {
            float v[W], weight[W];
            load(v, x + start + c);
            load(weight, w + c);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                v[j] = v[j] * r * weight[j];
            }
            store(y + start + c, v);
        }
    });
}
INSTANTIATE(rms_norm, (T * y, const float* x, const float* w, int rows, int width, float eps),
            (y, x, w, rows, width, eps))

// With r = 1/rms of the row: gx += r·(g⊙w − x·r²·mean(g⊙w⊙x)). Writes inverse[row] = r
// for rms_norm_weight.   [rows; 256]
template <class T>
__device__ __forceinline__ void rms_norm_backward(float* gx, float* inverse, const float* x,
                                                  const float* w, const T* g, int rows, int width,
                                                  float eps) {
    const long long start = (long long)blockIdx.x * width;
    const bool wide = rows_aligned_16(gx, width) && rows_aligned_16(x, width) && is_aligned_16(w) &&
                      rows_aligned_16(g, width);
    by_width<T>(wide, [&](auto elements) {
        constexpr int W = decltype(elements)::value;
        float squares = 0.0f, products = 0.0f;
        for (int c = threadIdx.x * W; c < width; c += blockDim.x * W) {
            float v[W], weight[W], up[W];
            load(v, x + start + c);
            load(weight, w + c);
            load(up, g + start + c);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                squares += v[j] * v[j];
                products += up[j] * weight[j] * v[j];
            }
        }
        const float r = inverse_rms(block_sum(squares), width, eps);
        const float along = block_sum(products) * r * r / float(width);
        for (int c = threadIdx.x * W; c < width; c += blockDim.x * W) {
            float v[W], weight[W], up[W], sum[W];
            load(v, x + start + c);
            load(weight, w + c);
            load(up, g + start + c);
            load(sum, gx + start + c);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                sum[j] += r * (up[j] * weight[j] - v[j] * along);
            }
            store(gx + start + c, sum);
        }
        if (threadIdx.x == 0) {
            inverse[blockIdx.x] = r;
        }
    });
}
INSTANTIATE(rms_norm_backward,
            (float* gx, float* inverse, const float* x, const float* w, const T* g, int rows,
             int width, float eps),
            (gx, inverse, x, w, g, rows, width, eps))

// partial[b, c] = Σ g·x·inverse of column c over the rows from b·rows_per_block on, one thread
// per column. column_sum_f32 adds the partials to ∂w.   [(ceil(width / 256), ceil(rows /
// rows_per_block)); 256]
template <class T>
__device__ __forceinline__ void rms_norm_weight(float* partial, const float* x,
                                                const float* inverse, const T* g, int rows,
                                                int width, int rows_per_block) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= width) {
        return;
    }
    const long long first = (long long)blockIdx.y * rows_per_block;
    const long long end = first + rows_per_block < rows ? first + rows_per_block : rows;
    float sum = 0.0f;
    // Unrolled, so that several loads are in flight at once.
#pragma unroll 8
    for (long long r = first; r < end; ++r) {
        sum += to_float(g[r * width + c]) * x[r * width + c] * inverse[r];
    }
    partial[(long long)blockIdx.y * width + c] = sum;
}
INSTANTIATE(rms_norm_weight,
            (float* partial, const float* x, const float* inverse, const T* g, int rows, int width,
             int rows_per_block),
            (partial, x, inverse, g, rows, width, rows_per_block))

// -------------------------------------------------------------------------------------------------
// heads
//
// One warp per head of a row, which it holds in registers. Item i is head i mod `heads` of row
// i / heads. D ≤ MAX_DIM: for wider heads the host launches the kernels of the next section
// (`MAX_WARP_HEAD` in src/compute/cuda/ops.rs).

constexpr int MAX_DIM = 256, HEAD_WARPS = 4;

// A head in a warp's registers: lane l holds its elements (k·32 + l)·W + j, and zeros beyond D.
template <int W>
struct HeadRegisters {
    static constexpr int PARTS = MAX_DIM / (32 * W);
    float v[PARTS][W] = {};

    // Calls f(k, c) for each part k of this lane; c is the first element of the part.
    template <class F>
    static __device__ __forceinline__ void parts(int dim, F f) {
#pragma unroll
        for (int k = 0; k < PARTS; ++k) {
            const int c = (k * 32 + threadIdx.x % 32) * W;
            if (c < dim) {
                f(k, c);
            }
        }
    }

    template <class T>
    __device__ __forceinline__ void read(const T* from, int dim) {
        parts(dim, [&](int k, int c) { load(v[k], from + c); });
    }

    template <class T>
    __device__ __forceinline__ void write(T* to, int dim) const {
        parts(dim, [&](int k, int c) { store(to + c, v[k]); });
    }
};

// Start of item i's head.
__device__ __forceinline__ long long head_start_of(long long item, int stride, int offset,
                                                   int heads, int dim) {
    const long long row = (unsigned long long)item / (unsigned)heads;
    return row * stride + offset + (item - row * heads) * dim;
}

// True if all heads start and end on 16-byte boundaries.
template <class T>
__device__ __forceinline__ bool heads_aligned_16(const T* x, int stride, int offset, int dim) {
    return rows_aligned_16(x, stride) && rows_aligned_16(x, dim) && is_aligned_16(x + offset);
}

// Applies RMSNorm to every head in place. Head h of row r starts at r·stride + offset + h·D.
// [ceil(rows·heads / 4); 128]
template <class T>
__device__ __forceinline__ void head_norm(T* qkv, const float* w, int rows, int stride, int offset,
                                          int heads, int dim, float eps) {
    const long long item = (long long)blockIdx.x * HEAD_WARPS + threadIdx.x / 32;
    if (item >= (long long)rows * heads) {
        return;
    }
    T* const head = qkv + head_start_of(item, stride, offset, heads, dim);
    by_width<T>(heads_aligned_16(qkv, stride, offset, dim) && is_aligned_16(w), [&](auto elements) {
        constexpr int W = decltype(elements)::value;
        using Registers = HeadRegisters<W>;
        Registers x, weight;
        x.read(head, dim);
        weight.read(w, dim);
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < Registers::PARTS * W; ++i) {
            squares += x.v[i / W][i % W] * x.v[i / W][i % W];
        }
        const float r = inverse_rms(warp_sum(squares), dim, eps);
#pragma unroll
        for (int i = 0; i < Registers::PARTS * W; ++i) {
            x.v[i / W][i % W] *= r * weight.v[i / W][i % W];
        }
        x.write(head, dim);
    });
}
INSTANTIATE(head_norm,
            (T * qkv, const float* w, int rows, int stride, int offset, int heads, int dim,
             float eps),
            (qkv, w, rows, stride, offset, heads, dim, eps))

// Replaces the upstream gradient g of head_norm's output by the gradient of its input `before` (in
// the same layout): g = r·(g⊙w − x·r²·mean(g⊙w⊙x)), r = 1/rms. If partial is not null,
// partial[b, :] = Σ g⊙x·r over the `per_block` items of block b, which its warps process in
// turn; column_sum_f32 adds the partials to ∂w.   [ceil(rows·heads / per_block); 128]
template <class T>
__device__ __forceinline__ void head_norm_backward(T* g, float* partial, const T* before,
                                                   const float* w, int rows, int stride, int offset,
                                                   int heads, int dim, float eps, int per_block) {
    alignas(16) __shared__ float sums[HEAD_WARPS][MAX_DIM];
    const int warp = threadIdx.x / 32;
    const long long items = (long long)rows * heads, first = (long long)blockIdx.x * per_block;
    const long long end = first + per_block < items ? first + per_block : items;
    const bool wide = heads_aligned_16(g, stride, offset, dim) &&
                      heads_aligned_16(before, stride, offset, dim) && is_aligned_16(w);
    by_width<T>(wide, [&](auto elements) {
        constexpr int W = decltype(elements)::value;
        using Registers = HeadRegisters<W>;
        Registers weight, of_weight;
        weight.read(w, dim);
        for (long long item = first + warp; item < end; item += HEAD_WARPS) {
            const long long start = head_start_of(item, stride, offset, heads, dim);
            Registers x, up;
            x.read(before + start, dim);
            up.read(g + start, dim);
            float squares = 0.0f, products = 0.0f;
#pragma unroll
            for (int i = 0; i < Registers::PARTS * W; ++i) {
                const float v = x.v[i / W][i % W];
                squares += v * v;
                products += up.v[i / W][i % W] * weight.v[i / W][i % W] * v;
            }
            const float r = inverse_rms(warp_sum(squares), dim, eps);
            const float along = warp_sum(products) * r * r / float(dim);
#pragma unroll
            for (int i = 0; i < Registers::PARTS * W; ++i) {
                const float v = x.v[i / W][i % W], u = up.v[i / W][i % W];
                of_weight.v[i / W][i % W] += u * v * r;
                up.v[i / W][i % W] = r * (u * weight.v[i / W][i % W] - v * along);
            }
            up.write(g + start, dim);
        }
        of_weight.write(sums[warp], dim);
    });
    if (partial == nullptr) {
        return;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < dim; c += blockDim.x) {
        partial[(long long)blockIdx.x * dim + c] =
            (sums[0][c] + sums[1][c]) + (sums[2][c] + sums[3][c]);
    }
}
INSTANTIATE(head_norm_backward,
            (T * g, float* partial, const T* before, const float* w, int rows, int stride,
             int offset, int heads, int dim, float eps, int per_block),
            (g, partial, before, w, rows, stride, offset, heads, dim, eps, per_block))

// -------------------------------------------------------------------------------------------------
// wide heads
//
// The same for heads of any width. A block works on a whole head, in the backward pass on several
// heads, one after the other. Families that norm all heads at once (OLMo 2) have a single head of
// H·D elements for the queries, and one of K·D elements for the keys.

// As head_norm.   [rows·heads; 256]
template <class T>
__device__ __forceinline__ void wide_head_norm(T* qkv, const float* w, int rows, int stride,
                                               int offset, int heads, int dim, float eps) {
    T* const head = qkv + head_start_of(blockIdx.x, stride, offset, heads, dim);
    by_width<T>(heads_aligned_16(qkv, stride, offset, dim) && is_aligned_16(w), [&](auto elements) {
        constexpr int W = decltype(elements)::value;
        float squares = 0.0f;
        for (int c = threadIdx.x * W; c < dim; c += blockDim.x * W) {
            float v[W];
            load(v, head + c);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                squares += v[j] * v[j];
            }
        }
        const float r = inverse_rms(block_sum(squares), dim, eps);
        for (int c = threadIdx.x * W; c < dim; c += blockDim.x * W) {
            float v[W], weight[W];
            load(v, head + c);
            load(weight, w + c);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                v[j] = v[j] * r * weight[j];
            }
            store(head + c, v);
        }
    });
}
INSTANTIATE(wide_head_norm,
            (T * qkv, const float* w, int rows, int stride, int offset, int heads, int dim,
             float eps),
            (qkv, w, rows, stride, offset, heads, dim, eps))

// As head_norm_backward. A thread sums the elements of `partial` that it owns over the items of its
// block, in order.   [ceil(rows·heads / per_block); 256]
template <class T>
__device__ __forceinline__ void wide_head_norm_backward(T* g, float* partial, const T* before,
                                                        const float* w, int rows, int stride,
                                                        int offset, int heads, int dim, float eps,
                                                        int per_block) {
    const long long items = (long long)rows * heads, first = (long long)blockIdx.x * per_block;
    const long long end = first + per_block < items ? first + per_block : items;
    float* const of_weight =
        partial == nullptr ? nullptr : partial + (long long)blockIdx.x * dim;
    const bool wide = heads_aligned_16(g, stride, offset, dim) &&
                      heads_aligned_16(before, stride, offset, dim) && is_aligned_16(w) &&
                      is_aligned_16(of_weight);
    by_width<T>(wide, [&](auto elements) {
        constexpr int W = decltype(elements)::value;
        for (long long item = first; item < end; ++item) {
            const long long start = head_start_of(item, stride, offset, heads, dim);
            float squares = 0.0f, products = 0.0f;
            for (int c = threadIdx.x * W; c < dim; c += blockDim.x * W) {
                float v[W], weight[W], up[W];
                load(v, before + start + c);
                load(weight, w + c);
                load(up, g + start + c);
#pragma unroll
                for (int j = 0; j < W; ++j) {
                    squares += v[j] * v[j];
                    products += up[j] * weight[j] * v[j];
                }
            }
            const float r = inverse_rms(block_sum(squares), dim, eps);
            const float along = block_sum(products) * r * r / float(dim);
            for (int c = threadIdx.x * W; c < dim; c += blockDim.x * W) {
                float v[W], weight[W], up[W];
                load(v, before + start + c);
                load(weight, w + c);
                load(up, g + start + c);
                if (of_weight != nullptr) {
                    float sum[W] = {};
                    if (item > first) {
                        load(sum, of_weight + c);
                    }
#pragma unroll
                    for (int j = 0; j < W; ++j) {
                        sum[j] += up[j] * v[j] * r;
                    }
                    store(of_weight + c, sum);
                }
#pragma unroll
                for (int j = 0; j < W; ++j) {
                    up[j] = r * (up[j] * weight[j] - v[j] * along);
                }
                store(g + start + c, up);
            }
        }
    });
}
INSTANTIATE(wide_head_norm_backward,
            (T * g, float* partial, const T* before, const float* w, int rows, int stride,
             int offset, int heads, int dim, float eps, int per_block),
            (g, partial, before, w, rows, stride, offset, heads, dim, eps, per_block))
