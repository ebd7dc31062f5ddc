// LM head, log-softmax and gather, one tile of the vocabulary after the other. The logits [N, V]
// never exist as a whole.
//
// log p(y) = ⟨h, W_y⟩ − log Σ_v e^⟨h, W_v⟩. cuBLAS computes a tile of logits and
// accumulates Σ_v p_v·W_v. These kernels update the maximum, the sums and ∂log p/∂h = W_y −
// Σ_v p_v·W_v, and rescale them whenever a larger logit appears (online softmax,
// arXiv:1805.02867).
//
// The kernels with CAPPED apply a soft-cap c to the logits as they read them: l' = c·tanh(l / c).
// In the gradients, W_v is then multiplied by the slope of the cap at v, 1 − (l'_v / c)².
#include "elements.cuh"

// State of a row's online softmax: indices of the floats in state[row, 8].
enum State {
    MAXIMUM,   // the largest logit l
    TOTAL,     // Σ e^(l − max)
    WEIGHTED,  // Σ (l − max)·e^(l − max)
    SQUARES,   // Σ e^(2(l − max))
    LOGITS,    // Σ l
    TARGET,    // the target's logit
    ARGMAX,    // token of the largest logit (on a tie, the first), as the bits of an unsigned
    UNUSED,
    STATE
};

// Applies the soft-cap of the kernels with CAPPED to W logits.
template <bool CAPPED, int W>
__device__ __forceinline__ void cap_logits(float (&l)[W], float softcap) {
    if constexpr (CAPPED) {
#pragma unroll
        for (int j = 0; j < W; ++j) {
            l[j] = soft_cap(l[j], softcap);
        }
    }
}

// Initialises every row's state before the first tile.   [ceil(rows / 256); 256]
KERNEL void head_start(float* state, int rows) {
    const long long row = grid_thread();
    if (row < rows) {
        float* const s = state + row * STATE;
        s[MAXIMUM] = s[TARGET] = -INFINITY;
        s[TOTAL] = s[WEIGHTED] = s[SQUARES] = s[LOGITS] = s[UNUSED] = 0.0f;
        s[ARGMAX] = __uint_as_float(0);
    }
}

// Adds the logits of the tokens first..first + width to the state. Rows of the logits lie ld
// elements apart. WEIGHTED, SQUARES, LOGITS and ARGMAX are updated only if `distribution`. With
// `gradient`, writes p[i, j] = e^(l − max), in the layout of the logits, and scales[i], the
// factor for sums over earlier tiles (0 for the first tile). In f32, p may alias the logits; a bf16
// row would overlap the logits of other rows. With CAPPED, p is multiplied by the slope of the
// soft-cap.   [rows; 256]
template <class T, bool CAPPED = false>
__device__ __forceinline__ void head_tile(float* state, T* p, float* scales, const float* logits,
                                          const unsigned* targets, int rows, int width, int ld,
                                          int first, int distribution, int gradient,
                                          float softcap = 0.0f) {
    const long long start = (long long)blockIdx.x * ld;
    float* const s = state + (long long)blockIdx.x * STATE;
    const float old = s[MAXIMUM];
    // Only thread 0 needs this. It is read before any thread may overwrite it. The difference wraps
    // to a large number if the target is below `first`.
    const unsigned target = targets[blockIdx.x] - unsigned(first);
    const bool has_target = threadIdx.x == 0 && target < unsigned(width);
    float of_target = has_target ? logits[start + target] : 0.0f;
    if constexpr (CAPPED) {
        of_target = soft_cap(of_target, softcap);
    }
    const bool wide = rows_aligned_16(logits, ld) && width % Vector<T>::N == 0 &&
                      (!gradient || rows_aligned_16(p, ld));
    by_width<T>(wide, [&](auto w) {
        constexpr int W = decltype(w)::value;
        float top = -INFINITY, logit_sum = 0.0f;
        int at = 0;
        for (int c = threadIdx.x * W; c < width; c += blockDim.x * W) {
            float l[W];
            load(l, logits + start + c);
            cap_logits<CAPPED>(l, softcap);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                if (l[j] > top) {
                    top = l[j];
                    at = c + j;
                }
                logit_sum += l[j];
            }
        }
        const float tile_max = block_max(top);
        const bool larger = tile_max > old;
        const float max = larger ? tile_max : old;
        float argmax = 0.0f;
        if (distribution && larger) {
            // The smallest column with the maximum. Columns of a tile are below 2²⁴ and
            // therefore exact as floats.
            argmax = -block_max(top == tile_max ? -float(at) : -INFINITY);
        }
        // After the barriers of block_max every logit has been read once, and of_target too, so p
        // may overwrite them.
        float sum = 0.0f, weighted = 0.0f, squares = 0.0f;
        for (int c = threadIdx.x * W; c < width; c += blockDim.x * W) {
            float l[W];
            load(l, logits + start + c);
            cap_logits<CAPPED>(l, softcap);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                const float t = l[j] - max, e = expf(t);
                sum += e;
                weighted += t * e;
                squares += e * e;
                if constexpr (CAPPED) {
                    l[j] = e * soft_cap_slope(l[j], softcap);
                } else {
                    l[j] = e;
                }
            }
            if (gradient) {
                store(p + start + c, l);
            }
        }
        sum = block_sum(sum);
        if (distribution) {
            weighted = block_sum(weighted);
            squares = block_sum(squares);
            logit_sum = block_sum(logit_sum);
        }
        if (threadIdx.x != 0) {
            return;
        }
        const float step = old - max;
        const float scale = !larger ? 1.0f : old == -INFINITY ? 0.0f : expf(step);
        if (distribution) {
            const float older =
                larger && scale > 0.0f ? scale * (s[WEIGHTED] + step * s[TOTAL]) : s[WEIGHTED];
            s[WEIGHTED] = older + weighted;
            s[SQUARES] = s[SQUARES] * scale * scale + squares;
            s[LOGITS] += logit_sum;
            if (larger) {
                s[ARGMAX] = __uint_as_float(unsigned(first) + unsigned(argmax));
            }
        }
        s[TOTAL] = s[TOTAL] * scale + sum;
        s[MAXIMUM] = max;
        if (has_target) {
            s[TARGET] = of_target;
        }
        if (gradient) {
            scales[blockIdx.x] = scale;
        }
    });
}
INSTANTIATE(head_tile,
            (float* state, T* p, float* scales, const float* logits, const unsigned* targets,
             int rows, int width, int ld, int first, int distribution, int gradient),
            (state, p, scales, logits, targets, rows, width, ld, first, distribution, gradient))
INSTANTIATE_CAPPED(head_tile,
                   (float* state, T* p, float* scales, const float* logits,
                    const unsigned* targets, int rows, int width, int ld, int first,
                    int distribution, int gradient, float softcap),
                   (state, p, scales, logits, targets, rows, width, ld, first, distribution,
                    gradient, softcap))

// d[i, :] *= scales[i]. Most rows keep their maximum; a scale of 1 is skipped.   [rows; 256]
KERNEL void head_rescale(float* d, const float* scales, int rows, int width) {
    const float scale = scales[blockIdx.x];
    if (scale == 1.0f) {
        return;
    }
    float* const row = d + (long long)blockIdx.x * width;
    by_width<float>(rows_aligned_16(d, width), [&](auto w) {
        constexpr int W = decltype(w)::value;
        for (int c = threadIdx.x * W; c < width; c += blockDim.x * W) {
            float v[W];
            load(v, row + c);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                v[j] *= scale;
            }
            store(row + c, v);
        }
    });
}

// d = ∂log p/∂h: d[i, :] = W[y_i, :] − d[i, :] / Σ e^(l − max). With CAPPED, W[y_i, :] is
// first multiplied by the slope of the soft-cap.   [rows; 256]
template <class T, bool CAPPED = false>
__device__ __forceinline__ void head_finish(float* d, const float* state, const T* w,
                                            const unsigned* targets, int rows, int width,
                                            float softcap = 0.0f) {
    const float* const s = state + (long long)blockIdx.x * STATE;
    const float inverse = 1.0f / s[TOTAL];
    const float slope = CAPPED ? soft_cap_slope(s[TARGET], softcap) : 1.0f;
    float* const row = d + (long long)blockIdx.x * width;
    const T* const of_target = w + (long long)targets[blockIdx.x] * width;
    by_width<T>(rows_aligned_16(d, width) && rows_aligned_16(w, width), [&](auto elements) {
        constexpr int W = decltype(elements)::value;
        for (int c = threadIdx.x * W; c < width; c += blockDim.x * W) {
            float v[W], weight[W];
            load(v, row + c);
            load(weight, of_target + c);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                if constexpr (CAPPED) {
                    weight[j] *= slope;
                }
                v[j] = weight[j] - v[j] * inverse;
            }
            store(row + c, v);
        }
    });
}
INSTANTIATE(head_finish,
            (float* d, const float* state, const T* w, const unsigned* targets, int rows,
             int width),
            (d, state, w, targets, rows, width))
INSTANTIATE_CAPPED(head_finish,
                   (float* d, const float* state, const T* w, const unsigned* targets, int rows,
                    int width, float softcap),
                   (d, state, w, targets, rows, width, softcap))

// ∂loss/∂logits of a tile, for ∂W = eᵀ·h: e[i, j] = g_i·(1{first + j = y_i} − e^(l −
// lse_i)), in the layout of the logits. In f32, e may alias the logits; see head_tile. With CAPPED,
// e is multiplied by the slope of the soft-cap.   [rows; 256]
template <class T, bool CAPPED = false>
__device__ __forceinline__ void head_errors(T* e, const float* logits, const float* lse,
                                            const float* g, const unsigned* targets, int rows,
                                            int width, int ld, int first, float softcap = 0.0f) {
    const long long start = (long long)blockIdx.x * ld;
    const float of_row = g[blockIdx.x], log_sum = lse[blockIdx.x];
    const unsigned target = targets[blockIdx.x] - unsigned(first);
    const bool wide =
        rows_aligned_16(logits, ld) && rows_aligned_16(e, ld) && width % Vector<T>::N == 0;
    by_width<T>(wide, [&](auto elements) {
        constexpr int W = decltype(elements)::value;
        for (int c = threadIdx.x * W; c < width; c += blockDim.x * W) {
            float l[W];
            load(l, logits + start + c);
            cap_logits<CAPPED>(l, softcap);
#pragma unroll
            for (int j = 0; j < W; ++j) {
                const float error =
                    of_row * ((unsigned(c + j) == target ? 1.0f : 0.0f) - expf(l[j] - log_sum));
                if constexpr (CAPPED) {
                    l[j] = error * soft_cap_slope(l[j], softcap);
                } else {
                    l[j] = error;
                }
            }
            store(e + start + c, l);
        }
    });
}
INSTANTIATE(head_errors,
            (T * e, const float* logits, const float* lse, const float* g, const unsigned* targets,
             int rows, int width, int ld, int first),
            (e, logits, lse, g, targets, rows, width, ld, first))
INSTANTIATE_CAPPED(head_errors,
                   (T * e, const float* logits, const float* lse, const float* g,
                    const unsigned* targets, int rows, int width, int ld, int first,
                    float softcap),
                   (e, logits, lse, g, targets, rows, width, ld, first, softcap))
