// Checks the kernels of elementwise.cu, norm.cu and head.cu under the emulator against
// double-precision references that are written from the definitions, not from the kernels.
//
//     tests/cuda/run kernels
//
// Every case runs in three orders of the threads, whose results must be equal to the last bit, with
// arrays on 16-byte boundaries and off them. The search for races runs in one order. Outputs start
// as NaN, and lie between guards.
#include "elementwise.cu"
#include "head.cu"
#include "norm.cu"

#include "runs.h"

#include <numeric>

namespace {

const int ROWS[] = {1, 5, 67}, WIDTHS[] = {1, 3, 8, 33, 576, 770};

// ----------------------------------------------------------------------------------------
// elementwise.cu

template <class T>
void move_rows(int rows, int width, int grid) {
    const std::string shape = text({rows, width, grid});
    cases<T>("embed", shape, [&](Run& run) {
        auto table = run.random<T>(11 * width);
        auto ids = run.below(rows, 11);
        auto x = run.empty<float>(rows * width);
        launch(ENTRY(embed), grid, 256, 0, x.data(), table.data(), ids.data(), rows, width);
        Numbers want;
        for (int t = 0; t < rows; ++t)
            for (int c = 0; c < width; ++c) want.push_back(table.at(ids[t] * width + c));
        run.expect(x, want, 0);
    });
    cases<T>("scale_rows", shape, [&](Run& run) {
        auto from = run.random<float>(rows * width), g = run.random<float>(rows);
        auto to = run.empty<T>(rows * width);
        launch(ENTRY(scale_rows), grid, 256, 0, to.data(), from.data(), g.data(), rows, width);
        Numbers want;
        for (int i = 0; i < rows * width; ++i) want.push_back(from.at(i) * g.at(i / width));
        run.expect(to, want);
    });
    if (std::is_same_v<T, bf16>) return;
    cases<T>("gather_rows", shape, [&](Run& run) {
        auto from = run.random<float>(13 * width);
        auto index = run.below(rows, 13);
        auto to = run.empty<float>(rows * width);
        launch(gather_rows, grid, 256, 0, to.data(), from.data(), index.data(), rows, width);
        Numbers want;
        for (int t = 0; t < rows; ++t)
            for (int c = 0; c < width; ++c) want.push_back(from.at(index[t] * width + c));
        run.expect(to, want, 0);
    });
    cases<T>("scatter_rows", shape, [&](Run& run) {
        // `order` sorts the rows of `from` by id. Of the ids 0..2·rows about 60 % appear, the first
        // one very often.
        auto to = run.random<float>(2 * rows * width), from = run.random<float>(3 * rows * width);
        auto ids = run.below(3 * rows, 2 * rows), order = run.empty<unsigned>(3 * rows);
        for (int i = 0; i < rows; ++i) ids[3 * i] = ids[0];
        std::iota(order.data(), order.data() + 3 * rows, 0u);
        std::stable_sort(order.data(), order.data() + 3 * rows,
                         [&](unsigned a, unsigned b) { return ids[a] < ids[b]; });
        std::vector<unsigned> list, starts;
        for (int k = 0; k < 3 * rows; ++k)
            if (k == 0 || ids[order[k]] != list.back())
                list.push_back(ids[order[k]]), starts.push_back(k);
        starts.push_back(3 * rows);
        Numbers want = to.values();
        for (int t = 0; t < 3 * rows; ++t)
            for (int c = 0; c < width; ++c) want[ids[t] * width + c] += from.at(t * width + c);
        launch(scatter_rows, grid, 256, 0, to.data(), from.data(), list.data(), starts.data(),
               order.data(), int(list.size()), width);
        run.expect(to, want);
    });
}

// Checks y = f(gate)·up, and its gradient, which is written over the input. `value` is f and
// `slope` is its derivative, both by their definitions.
template <class T, class Forward, class Backward, class Function>
void check_gated(const std::string& name, Forward forward, Backward backward, Function value,
                 Function slope, int rows, int width, int grid) {
    const std::string shape = text({rows, width, grid});
    const auto at_gate = [=](int t, int c) { return t * 2 * width + c; };
    const auto at_up = [=](int t, int c) { return (t * 2 + 1) * width + c; };
    const T extreme = from_float<T>(-120.0f);  // e^120 is infinite in f32
    cases<T>(name, shape, [&](Run& run) {
        auto in = run.random<T>(rows * 2 * width, 4);
        in[0] = extreme;
        auto y = run.empty<T>(rows * width);
        launch(forward, grid, 256, 0, y.data(), in.data(), rows, width);
        Numbers want;
        for (int t = 0; t < rows; ++t)
            for (int c = 0; c < width; ++c)
                want.push_back(value(in.at(at_gate(t, c))) * in.at(at_up(t, c)));
        run.expect(y, want);
    });
    cases<T>(name + "_backward", shape, [&](Run& run) {
        auto in = run.random<T>(rows * 2 * width, 4), gy = run.random<T>(rows * width);
        in[0] = extreme;
        Numbers want = in.values();
        for (int t = 0; t < rows; ++t)
            for (int c = 0; c < width; ++c) {
                const double g = gy.at(t * width + c);
                const double gate = want[at_gate(t, c)], up = want[at_up(t, c)];
                want[at_gate(t, c)] = g * up * slope(gate);
                want[at_up(t, c)] = g * value(gate);
            }
        launch(backward, grid, 256, 0, in.data(), gy.data(), rows, width);
        run.expect(in, want);
    });
}

double sigma(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigma(x); }
// (x·σ(x))' = σ + x·σ·(1 − σ)
double silu_slope(double x) { return sigma(x) + x * sigma(x) * (1 - sigma(x)); }

// GELU: 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))).
const double ROOT = std::sqrt(2 / std::acos(-1.0));
double gelu_tanh(double x) { return std::tanh(ROOT * (x + 0.044715 * x * x * x)); }
double gelu(double x) { return 0.5 * x * (1 + gelu_tanh(x)); }
double gelu_slope(double x) {
    const double th = gelu_tanh(x);
    return 0.5 * (1 + th) + 0.5 * x * (1 - th * th) * ROOT * (1 + 3 * 0.044715 * x * x);
}

template <class T>
void element_wise(int rows, int width, int grid) {
    const std::string shape = text({rows, width, grid});
    check_gated<T>("swiglu", ENTRY(swiglu), ENTRY(swiglu_backward), silu, silu_slope, rows, width,
                   grid);
    check_gated<T>("geglu", ENTRY(geglu), ENTRY(geglu_backward), gelu, gelu_slope, rows, width,
                   grid);
    for (int pad : {0, 8, 5})
        for (int accumulate : {0, 1})
            cases<T>("add_bias", shape + text({pad, accumulate}), [&](Run& run) {
                const int stride = width + pad;
                auto y = accumulate ? run.random<T>(rows * stride) : run.empty<T>(rows * stride);
                auto bias = run.random<float>(width);
                Numbers want = y.values();
                for (int r = 0; r < rows; ++r)
                    for (int c = 0; c < width; ++c) {
                        double& to = want[r * stride + c];
                        to = (accumulate ? to : 0) + bias.at(c);
                    }
                launch(ENTRY(add_bias), grid, 256, 0, y.data(), bias.data(), rows, width, stride,
                       accumulate);
                run.expect(y, want);
            });
}

template <class T>
void sum_columns(int rows, int width, int pad) {
    cases<T>("column_sum", text({rows, width, pad}), [&](Run& run) {
        const int stride = width + pad;
        auto g = run.random<T>(rows * stride);
        auto out = run.random<float>(width);
        Numbers want = out.values();
        for (int r = 0; r < rows; ++r)
            for (int c = 0; c < width; ++c) want[c] += g.at(r * stride + c);
        launch(ENTRY(column_sum), groups(width, 32), dim3(32, 8), 0, out.data(), g.data(), rows,
               width, stride);
        run.expect(out, want);
    });
}

void casts(int n, int grid) {
    cases<bf16>("cast_bf16", text({n, grid}), [&](Run& run) {
        auto from = run.random<float>(n);
        auto to = run.empty<bf16>(n);
        launch(cast_bf16, grid, 256, 0, to.data(), from.data(), n);
        run.expect(to, from.values(), 1.0 / 256);
    });
    cases<float>("cast_f32", text({n, grid}), [&](Run& run) {
        auto from = run.random<bf16>(n);
        auto to = run.empty<float>(n);
        launch(cast_f32, grid, 256, 0, to.data(), from.data(), n);
        run.expect(to, from.values(), 0);
    });
}

template <class T>
void rotary(int rows, int heads, int dim, int half, int rest, int grid) {
    for (float sign : {1.0f, -1.0f})
        cases<T>("rope", text({rows, heads, dim, half, rest, grid, int(sign)}), [&](Run& run) {
            const int stride = heads * dim + rest;
            auto x = run.random<T>(rows * stride);
            auto cosine = run.random<float>(rows * half), sine = run.random<float>(rows * half);
            Numbers want = x.values();
            for (int t = 0; t < rows; ++t)
                for (int h = 0; h < heads; ++h)
                    for (int i = 0; i < half; ++i) {
                        double *a = &want[t * stride + h * dim + i], *b = a + half;
                        const double c = cosine.at(t * half + i), s = sign * sine.at(t * half + i),
                                     old = *a;
                        *a = old * c - *b * s;
                        *b = *b * c + old * s;
                    }
            launch(ENTRY(rope), grid, 256, 0, x.data(), cosine.data(), sine.data(), rows, stride,
                   heads, dim, half, sign);
            run.expect(x, want);
        });
}

template <class T>
void interleaved_rotary(int rows, int heads, int dim, int half, int rest, int grid) {
    const std::string sizes = text({rows, heads, dim, half, rest, grid});
    for (float sign : {1.0f, -1.0f})
        cases<T>("rope_interleaved", sizes + (sign > 0 ? "" : " back"), [&](Run& run) {
            const int stride = heads * dim + rest;
            auto x = run.random<T>(rows * stride);
            auto cosine = run.random<float>(rows * half), sine = run.random<float>(rows * half);
            Numbers want = x.values();
            for (int t = 0; t < rows; ++t)
                for (int h = 0; h < heads; ++h)
                    for (int i = 0; i < half; ++i) {
                        double *a = &want[t * stride + h * dim + 2 * i], *b = a + 1;
                        const double c = cosine.at(t * half + i), s = sign * sine.at(t * half + i),
                                     old = *a;
                        *a = old * c - *b * s;
                        *b = *b * c + old * s;
                    }
            launch(ENTRY(rope_interleaved), grid, 256, 0, x.data(), cosine.data(), sine.data(),
                   rows, stride, heads, dim, half, sign);
            run.expect(x, want);
        });
}

// -----------------------------------------------------------------------------------------------
// norm.cu

constexpr float EPS = 1e-5f;

double inverse_of(const double* x, int width) {
    double squares = 0;
    for (int c = 0; c < width; ++c) squares += x[c] * x[c];
    return 1 / std::sqrt(squares / width + EPS);
}

// ∂loss/∂x of y = x·r·w by the chain rule: g·w·r + x·∂r,
// with ∂r/∂x_c = −r³·x_c / width.
Numbers norm_gradient(const double* x, const double* w, const double* g, int width) {
    const double r = inverse_of(x, width);
    double of_r = 0;
    for (int c = 0; c < width; ++c) of_r += g[c] * w[c] * x[c];
    Numbers dx;
    for (int c = 0; c < width; ++c) dx.push_back(g[c] * w[c] * r - of_r * r * r * r * x[c] / width);
    return dx;
}

template <class T>
void row_norms(int rows, int width) {
    cases<T>("rms_norm", text({rows, width}), [&](Run& run) {
        auto x = run.random<float>(rows * width, 3), w = run.random<float>(width);
        auto y = run.empty<T>(rows * width);
        launch(ENTRY(rms_norm), rows, 256, 0, y.data(), x.data(), w.data(), rows, width, EPS);
        const Numbers v = x.values();
        Numbers want;
        for (int r = 0; r < rows; ++r) {
            const double inverse = inverse_of(&v[r * width], width);
            for (int c = 0; c < width; ++c) want.push_back(v[r * width + c] * inverse * w.at(c));
        }
        run.expect(y, want);
    });
    for (int per_block : {1, 3, 64})
        cases<T>("rms_norm_backward", text({rows, width, per_block}), [&](Run& run) {
            auto x = run.random<float>(rows * width, 3), w = run.random<float>(width),
                 gx = run.random<float>(rows * width);
            auto g = run.random<T>(rows * width);
            auto inverse = run.empty<float>(rows),
                 partial = run.empty<float>(groups(rows, per_block) * width);
            auto dw = run.random<float>(width);
            Numbers want = gx.values(), want_inverse, want_dw = dw.values(),
                    want_partial(partial.n);
            const Numbers v = x.values(), weight = w.values(), up = g.values();
            for (int r = 0; r < rows; ++r) {
                const double* row = &v[r * width];
                const Numbers dx = norm_gradient(row, weight.data(), &up[r * width], width);
                want_inverse.push_back(inverse_of(row, width));
                for (int c = 0; c < width; ++c) {
                    const double of_weight = up[r * width + c] * row[c] * want_inverse[r];
                    want[r * width + c] += dx[c];
                    want_partial[r / per_block * width + c] += of_weight;
                    want_dw[c] += of_weight;
                }
            }
            launch(ENTRY(rms_norm_backward), rows, 256, 0, gx.data(), inverse.data(), x.data(),
                   w.data(), g.data(), rows, width, EPS);
            launch(ENTRY(rms_norm_weight), dim3(groups(width, 256), groups(rows, per_block)), 256,
                   0, partial.data(), x.data(), inverse.data(), g.data(), rows, width, per_block);
            launch(column_sum_f32, groups(width, 32), dim3(32, 8), 0, dw.data(), partial.data(),
                   groups(rows, per_block), width, width);
            run.expect(gx, want);
            run.expect(inverse, want_inverse);
            run.expect(partial, want_partial);
            run.expect(dw, want_dw);
        });
}

template <class T>
void head_norms(int rows, int heads, int dim, int offset, int rest, bool wide = false) {
    const int stride = offset + heads * dim + rest, items = rows * heads;
    const std::string shape = text({rows, heads, dim, offset, rest});
    const auto start = [&](int i) { return i / heads * stride + offset + i % heads * dim; };
    cases<T>(wide ? "wide_head_norm" : "head_norm", shape, [&](Run& run) {
        auto x = run.random<T>(rows * stride, 3);
        auto w = run.random<float>(dim);
        const Numbers before = x.values();
        Numbers want = before;
        for (int i = 0; i < items; ++i) {
            const double inverse = inverse_of(&before[start(i)], dim);
            for (int c = 0; c < dim; ++c) want[start(i) + c] *= inverse * w.at(c);
        }
        if (wide)
            launch(ENTRY(wide_head_norm), items, 256, 0, x.data(), w.data(), rows, stride, offset,
                   heads, dim, EPS);
        else
            launch(ENTRY(head_norm), groups(items, 4), 128, 0, x.data(), w.data(), rows, stride,
                   offset, heads, dim, EPS);
        run.expect(x, want);
    });
    const char* const backward = wide ? "wide_head_norm_backward" : "head_norm_backward";
    for (int per_block : {0, 1, 7, 64})  // 0: 5 items per block, without ∂w
        cases<T>(backward, shape + text({per_block}), [&](Run& run) {
            const int share = per_block == 0 ? 5 : per_block, blocks = groups(items, share);
            auto x = run.random<T>(rows * stride, 3), g = run.random<T>(rows * stride);
            auto w = run.random<float>(dim);
            auto partial = run.empty<float>(blocks * dim);
            const Numbers before = x.values(), weight = w.values(), up = g.values();
            Numbers want = up, want_partial(partial.n, per_block == 0 ? NAN : 0);
            for (int i = 0; i < items; ++i) {
                const double *head = &before[start(i)], inverse = inverse_of(head, dim);
                const Numbers dx = norm_gradient(head, weight.data(), &up[start(i)], dim);
                for (int c = 0; c < dim; ++c) {
                    want[start(i) + c] = dx[c];
                    want_partial[i / share * dim + c] += up[start(i) + c] * head[c] * inverse;
                }
            }
            float* const sums = per_block == 0 ? nullptr : partial.data();
            if (wide)
                launch(ENTRY(wide_head_norm_backward), blocks, 256, 0, g.data(), sums, x.data(),
                       w.data(), rows, stride, offset, heads, dim, EPS, share);
            else
                launch(ENTRY(head_norm_backward), blocks, 128, 0, g.data(), sums, x.data(),
                       w.data(), rows, stride, offset, heads, dim, EPS, share);
            // With D = 1 the gradient is 0 but for ε: x/|x| is constant.
            run.expect(g, want, std::is_same_v<T, bf16> ? 1e-2 : 1e-5, dim == 1 ? 1 : 1e-30);
            run.expect(partial, want_partial);
        });
}

// -----------------------------------------------------------------------------------------------
// head.cu

// Checks the whole head over `vocabulary` tokens in tiles, with random W [vocabulary, hidden] and
// random logits (not h·W). `rise` is added to the logits per token: if it is positive, later tiles
// tend to have larger maxima; if it is negative, earlier ones. Without a soft-cap, `softcap` is 0.
template <class T>
void whole_head(int rows, int vocabulary, int tile, int pad, int distribution, int gradient,
                double rise, float softcap = 0) {
    const int hidden = 35, ld = tile + pad;
    // The cap rounds the logits, so that nothing that follows from them is exact.
    const double tolerance = softcap == 0 ? 1e-5 : 3e-5;
    // With a single token, 1 − p is 0, and only the rounding remains.
    const double terms = softcap != 0 && vocabulary == 1 ? 1 : 1e-30;
    const auto slope = [&](double logit) {
        return softcap == 0 ? 1 : 1 - logit / softcap * logit / softcap;
    };
    cases<T>(
        softcap == 0 ? "head" : "head capped",
        text({rows, vocabulary, tile, pad, distribution, gradient, int(rise * 1000)}),
        [&](Run& run) {
            auto state = run.empty<float>(rows * 8), scales = run.empty<float>(rows),
                 d = run.empty<float>(rows * hidden);
            auto w = run.random<T>(vocabulary * hidden);
            auto targets = run.below(rows, vocabulary);
            std::normal_distribution<double> normal(0, 3);
            // Multiples of 1/4, so that there are ties.
            Numbers l(rows * vocabulary);
            for (size_t i = 0; i < l.size(); ++i)
                l[i] = std::round(4 * (normal(run.engine) + rise * (i % vocabulary))) / 4;
            // The logits as the kernels read them; `l` has those with the cap.
            const Numbers uncapped = l;
            if (softcap != 0)
                for (double& x : l) x = softcap * std::tanh(x / softcap);
            launch(head_start, groups(rows, 256), 256, 0, state.data(), rows);

            Numbers largest(rows, -INFINITY), sums(rows * hidden);
            for (int first = 0; first < vocabulary; first += tile) {
                const int width = std::min(tile, vocabulary - first);
                const bool last = first + tile >= vocabulary;
                auto logits = run.empty<float>((rows - 1) * ld + width);
                auto p = run.empty<T>(logits.n);
                Numbers want_p(logits.n, NAN), want_scales(rows, gradient ? 0 : NAN);
                for (int i = 0; i < rows; ++i) {
                    const double older = largest[i];
                    for (int j = 0; j < width; ++j) {
                        logits[i * ld + j] = float(uncapped[i * vocabulary + first + j]);
                        largest[i] = std::max(largest[i], l[i * vocabulary + first + j]);
                    }
                    for (int j = 0; gradient && j < width; ++j) {
                        const double logit = l[i * vocabulary + first + j];
                        want_p[i * ld + j] = std::exp(logit - largest[i]) * slope(logit);
                    }
                    if (gradient) want_scales[i] = std::exp(older - largest[i]);
                }
                // Every second tile is written in place: in f32, p may alias the logits.
                bool in_place = false;
                T* to = gradient ? p.data() : nullptr;
                if constexpr (std::is_same_v<T, float>)
                    if (gradient && first / tile % 2 == 1) to = logits.data(), in_place = true;
                float* const factors = gradient ? scales.data() : nullptr;
                if (softcap == 0)
                    launch(ENTRY(head_tile), rows, 256, 0, state.data(), to, factors, logits.data(),
                           targets.data(), rows, width, ld, first, distribution, gradient);
                else
                    launch(ENTRY(head_tile_capped), rows, 256, 0, state.data(), to, factors,
                           logits.data(), targets.data(), rows, width, ld, first, distribution,
                           gradient, softcap);
                if constexpr (std::is_same_v<T, float>)
                    if (in_place) std::copy(logits.data(), logits.data() + logits.n, p.data());
                run.expect(p, want_p, std::is_same_v<T, bf16> ? 1e-2 : tolerance);
                run.expect(scales, want_scales, tolerance);
                if (!gradient) continue;
                // Does what the GEMM of cuBLAS does, with β = 0 for the first tile.
                if (first > 0)
                    launch(head_rescale, rows, 256, 0, d.data(), scales.data(), rows, hidden);
                for (int i = 0; i < rows; ++i)
                    for (int c = 0; c < hidden; ++c) {
                        double sum = first > 0 ? d.at(i * hidden + c) : 0;
                        for (int j = 0; j < width; ++j)
                            sum += p.at(i * ld + j) * w.at((first + j) * hidden + c);
                        d[i * hidden + c] = float(sum);
                    }
                if (last && softcap == 0)
                    launch(ENTRY(head_finish), rows, 256, 0, d.data(), state.data(), w.data(),
                           targets.data(), rows, hidden);
                else if (last)
                    launch(ENTRY(head_finish_capped), rows, 256, 0, d.data(), state.data(),
                           w.data(), targets.data(), rows, hidden, softcap);
            }

            Numbers fields[7], want_d(d.n, gradient ? 0 : NAN), lse(rows);
            for (int i = 0; i < rows; ++i) {
                const double* row = &l[i * vocabulary];
                const double top = *std::max_element(row, row + vocabulary);
                double total = 0, weighted = 0, squares = 0, plain = 0;
                for (int v = 0; v < vocabulary; ++v) {
                    const double e = std::exp(row[v] - top);
                    total += e, weighted += (row[v] - top) * e, squares += e * e, plain += row[v];
                }
                lse[i] = top + std::log(total);
                const double all[] = {top,
                                      total,
                                      weighted,
                                      squares,
                                      plain,
                                      row[targets[i]],
                                      double(std::max_element(row, row + vocabulary) - row)};
                for (int k = 0; k < 7; ++k)
                    fields[k].push_back((k >= 2 && k <= 4) || k == 6 ? distribution ? all[k] : 0
                                                                     : all[k]);
                for (int v = 0; gradient && v < vocabulary; ++v) {
                    const double error =
                        ((int(targets[i]) == v) - std::exp(row[v] - lse[i])) * slope(row[v]);
                    for (int c = 0; c < hidden; ++c)
                        want_d[i * hidden + c] += error * w.at(v * hidden + c);
                }
            }
            for (int k = 0; k < 7; ++k) {
                auto field = run.empty<float>(rows);
                for (int i = 0; i < rows; ++i)
                    field[i] = k == 6 ? float(__float_as_uint(state[i * 8 + k])) : state[i * 8 + k];
                const bool exact = k == 6 || (softcap == 0 && (k == 0 || k == 5));
                run.expect(field, fields[k], exact ? 0 : tolerance);
            }
            // With T = bf16, d is a sum over p that was rounded to bf16.
            run.expect(d, want_d, std::is_same_v<T, bf16> ? 1e-2 : tolerance, terms);

            if (!gradient) return;
            auto lse_f32 = run.empty<float>(rows), g = run.random<float>(rows);
            for (int i = 0; i < rows; ++i) lse_f32[i] = float(lse[i]);
            for (int first = 0; first < vocabulary; first += tile) {
                const int width = std::min(tile, vocabulary - first);
                auto logits = run.empty<float>((rows - 1) * ld + width);
                auto e = run.empty<T>(logits.n);
                Numbers want(e.n, NAN);
                for (int i = 0; i < rows; ++i)
                    for (int j = 0; j < width; ++j) {
                        const double x = l[i * vocabulary + first + j];
                        logits[i * ld + j] = float(uncapped[i * vocabulary + first + j]);
                        want[i * ld + j] =
                            g.at(i) * slope(x) *
                            ((int(targets[i]) == first + j) - std::exp(x - lse_f32.at(i)));
                    }
                if (softcap == 0)
                    launch(ENTRY(head_errors), rows, 256, 0, e.data(), logits.data(),
                           lse_f32.data(), g.data(), targets.data(), rows, width, ld, first);
                else
                    launch(ENTRY(head_errors_capped), rows, 256, 0, e.data(), logits.data(),
                           lse_f32.data(), g.data(), targets.data(), rows, width, ld, first,
                           softcap);
                run.expect(e, want, std::is_same_v<T, bf16> ? 1e-2 : tolerance, terms);
            }
        });
}

template <class T>
void all() {
    for (int rows : ROWS)
        for (int width : WIDTHS) {
            for (int grid : {1, rows}) {
                move_rows<T>(rows, width, grid);
                element_wise<T>(rows, width, grid);
            }
            sum_columns<T>(rows, width, 0);
            sum_columns<T>(rows, width, 5);
            row_norms<T>(rows, width);
        }
    move_rows<T>(5, 2304, 5);
    element_wise<T>(3, 2304, 40);
    row_norms<T>(3, 2305);
    row_norms<T>(3, 4352);
    sum_columns<T>(1000, 33, 3);
    for (int rows : ROWS)
        for (int dim : {2, 6, 64, 128})
            for (int heads : {1, 3})
                for (int rest : {0, 16, 7}) {
                    const int grid = rest == 0 ? 1 : rows;
                    // All dimensions of a head, then about half of them.
                    for (int half : {dim / 2, (dim + 2) / 4}) {
                        rotary<T>(rows, heads, dim, half, rest, grid);
                        interleaved_rotary<T>(rows, heads, dim, half, rest, grid);
                    }
                }
    for (int rows : ROWS)
        for (int dim : {1, 33, 64, 66, 128, 250, 256})
            for (int offset : {0, 64, 5})
                head_norms<T>(rows, offset == 0 ? 1 : 3, dim, offset, offset == 5 ? 3 : 2 * offset);
    for (int rows : ROWS)
        for (int dim : {33, 264})
            for (int offset : {0, 64, 5}) head_norms<T>(rows, 1 + offset % 2, dim, offset, 7, true);
    head_norms<T>(3, 1, 2048, 0, 1024, true);
    head_norms<T>(3, 1, 2053, 64, 7, true);
    for (int rows : ROWS)
        for (int vocabulary : {1, 3, 33, 576, 770})
            for (int tile : {1, 33, 256, 1024})
                for (int options : {0, 1, 2, 3}) {
                    if (groups(vocabulary, tile) > 8 ||
                        (rows == 67 && groups(vocabulary, tile) > 3))
                        continue;
                    whole_head<T>(rows, vocabulary, tile, tile == 256 ? 8 : 3, options & 1,
                                  options >> 1, 0.01);
                    if (rows == 5 && options == 3)
                        whole_head<T>(rows, vocabulary, tile, 0, options & 1, options >> 1, -0.01);
                    if (rows == 5)
                        whole_head<T>(rows, vocabulary, tile, 3, options & 1, options >> 1, 0.01,
                                      8);
                }
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 1) only = arguments[1];
    all<float>();
    all<bf16>();
    for (int n : {1, 3, 8, 33, 770, 67 * 769})
        for (int grid : {1, 3, 400}) casts(n, grid);
    for (const auto& [kernel, error] : errors)
        printf("%-28s largest error %.2e\n", kernel.c_str(), error);
    printf("%d failed\n", failures);
    return failures != 0;
}
