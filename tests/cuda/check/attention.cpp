// Checks the attention kernels under the emulator against a double-precision reference with an
// explicit T × T softmax.
//
//     tests/cuda/run attention
//
// Every case runs in three orders of the threads, whose results must be equal to the last bit. The
// search for races runs in one order.
#include "attention.cu"
#include "attention_mma.cu"

#include <algorithm>
#include <random>
#include <string>

namespace {

constexpr int TILE = 64;

struct Segment {
    int start, end, prefix_start, prefix_end;
};

// A prompt with its completions.
struct Group {
    int prompt;
    std::vector<int> completions;
};

struct Layout {
    std::vector<Segment> segments;
    std::vector<int> tiles, key_tiles;
    std::vector<unsigned> positions;
    int tokens = 0;

    explicit Layout(const std::vector<Group>& groups) {
        for (const Group& group : groups) {
            const int start = tokens, prefix_end = start + group.prompt;
            segments.push_back({start, prefix_end, start, start});
            tokens = prefix_end;
            for (int n : group.completions) {
                segments.push_back({tokens, tokens + n, start, prefix_end});
                tokens += n;
            }
            for (int t = start; t < prefix_end; t++) positions.push_back(t - start);
            for (int n : group.completions)
                for (int t = 0; t < n; t++) positions.push_back(group.prompt + t);
        }
        for (const Segment& s : segments)
            for (int start = s.start; start < s.end; start += TILE) {
                const int end = std::min(start + TILE, s.end);
                // The completions of a prompt follow it.
                int dependent_start = 0, dependent_end = 0;
                for (const Segment& other : segments)
                    if (other.prefix_end > other.prefix_start && other.prefix_start == s.start) {
                        if (dependent_end == 0) dependent_start = other.start;
                        dependent_end = other.end;
                    }
                tiles.insert(tiles.end(), {start, end, s.start, s.prefix_start, s.prefix_end});
                key_tiles.insert(key_tiles.end(),
                                 {start, end, s.end, dependent_start, dependent_end});
            }
    }

    // Returns true if a query attends to a key, by the definition of the mask: its own segment up
    // to itself and the whole prefix, as far as the window reaches.
    bool sees(int query, int key, int window) const {
        for (const Segment& s : segments) {
            if (query < s.start || query >= s.end) continue;
            const bool own = key >= s.start && key <= query,
                       prefix = key >= s.prefix_start && key < s.prefix_end;
            if (!own && !prefix) return false;
            const int place_of_query = s.prefix_end - s.prefix_start + query - s.start;
            const int place_of_key =
                own ? s.prefix_end - s.prefix_start + key - s.start : key - s.prefix_start;
            return window == 0 || place_of_query - place_of_key < window;
        }
        return false;
    }
};

using Numbers = std::vector<double>;

struct Results {
    Numbers out, lse, dqkv;
};

// Without a soft-cap, `softcap` is 0.
Results reference(const Layout& layout, const Numbers& qkv, const Numbers& dout, int heads,
                  int kv_heads, int dim, int window, double scale, double softcap) {
    const int tokens = layout.tokens, row = (heads + 2 * kv_heads) * dim, width = heads * dim;
    Results r{Numbers(size_t(tokens) * width), Numbers(size_t(tokens) * heads),
              Numbers(size_t(tokens) * row)};
    for (int h = 0; h < heads; h++) {
        const int kv = h / (heads / kv_heads), k_at = (heads + kv) * dim,
                  v_at = (heads + kv_heads + kv) * dim;
        for (int i = 0; i < tokens; i++) {
            std::vector<int> keys;
            for (int j = 0; j < tokens; j++)
                if (layout.sees(i, j, window)) keys.push_back(j);
            const double *q = &qkv[size_t(i) * row + h * dim],
                         *g = &dout[size_t(i) * width + h * dim];
            double* out = &r.out[size_t(i) * width + h * dim];
            Numbers p, slopes;
            double top = -INFINITY, total = 0;
            for (int j : keys) {
                double s = 0;
                for (int d = 0; d < dim; d++) s += q[d] * qkv[size_t(j) * row + k_at + d];
                s *= scale;
                const double t = softcap == 0 ? 0 : std::tanh(s / softcap);
                slopes.push_back(1 - t * t);
                p.push_back(softcap == 0 ? s : softcap * t);
                top = std::max(top, p.back());
            }
            for (double& x : p) total += x = std::exp(x - top);
            r.lse[size_t(i) * heads + h] = top + std::log(total);
            double delta = 0;
            for (size_t n = 0; n < keys.size(); n++) {
                p[n] /= total;
                for (int d = 0; d < dim; d++)
                    out[d] += p[n] * qkv[size_t(keys[n]) * row + v_at + d];
            }
            for (int d = 0; d < dim; d++) delta += out[d] * g[d];
            for (size_t n = 0; n < keys.size(); n++) {
                const double* key = &qkv[size_t(keys[n]) * row];
                double* gradient = &r.dqkv[size_t(keys[n]) * row];
                double dp = 0;
                for (int d = 0; d < dim; d++) dp += g[d] * key[v_at + d];
                const double ds = p[n] * (dp - delta) * scale * slopes[n];
                for (int d = 0; d < dim; d++) {
                    gradient[v_at + d] += p[n] * g[d];
                    gradient[k_at + d] += ds * q[d];
                    r.dqkv[size_t(i) * row + h * dim + d] += ds * key[k_at + d];
                }
            }
        }
    }
    return r;
}

bool failed = false;

void expect(bool right, const std::string& what) {
    if (right) return;
    printf("FAILED: %s\n", what.c_str());
    failed = true;
}

// One order and one window are enough to look for races, which is slow: a race is found in any
// order, and windows only change which tiles are visited.
#ifdef EMULATE_RACES
const char* const ORDERS[] = {"forward"};
const std::vector<int> WINDOWS{70};
#else
const char* const ORDERS[] = {"forward", "reverse", "random:7"};
// The last one is how some configurations say that there is no window: positions must not be added
// to it in 32 bits.
const std::vector<int> WINDOWS{0, 1, 5, 70, 2147483647};
#endif

// The kernels of one type, and on tensor cores of one D.
template <class T>
struct Kernels {
    void (*forward)(T*, float*, const T*, const int*, const unsigned*, int, int, int, int, float);
    void (*delta)(float*, const T*, const T*, int, int, int);
    void (*dq)(T*, const T*, const T*, const float*, const float*, const int*, const unsigned*, int,
               int, int, int, float);
    void (*dkv)(T*, const T*, const T*, const float*, const float*, const int*, const unsigned*,
                int, int, int, int, float);
    // Takes the place of `dkv` on tensor cores. A block computes the part of one query head.
    void (*dkv_of_head)(T*, const T*, const T*, const float*, const float*, const int*,
                        const unsigned*, int, int, int, int, float, float*);
    size_t forward_bytes, backward_bytes;
    // The same with a soft-cap, which is the last argument.
    void (*forward_capped)(T*, float*, const T*, const int*, const unsigned*, int, int, int, int,
                           float, float);
    void (*dq_capped)(T*, const T*, const T*, const float*, const float*, const int*,
                      const unsigned*, int, int, int, int, float, float);
    void (*dkv_capped)(T*, const T*, const T*, const float*, const float*, const int*,
                       const unsigned*, int, int, int, int, float, float);
    void (*dkv_of_head_capped)(T*, const T*, const T*, const float*, const float*, const int*,
                               const unsigned*, int, int, int, int, float, float*, float);
};

const Kernels<float> F32{attention_f32,
                         attention_delta_f32,
                         attention_dq_f32,
                         attention_dkv_f32,
                         nullptr,
                         0,
                         0,
                         attention_capped_f32,
                         attention_dq_capped_f32,
                         attention_dkv_capped_f32,
                         nullptr};
const Kernels<bf16> BF16{attention_bf16,
                         attention_delta_bf16,
                         attention_dq_bf16,
                         attention_dkv_bf16,
                         nullptr,
                         0,
                         0,
                         attention_capped_bf16,
                         attention_dq_capped_bf16,
                         attention_dkv_capped_bf16,
                         nullptr};
const Kernels<bf16> MMA_64{attention_mma_64,
                           attention_delta_bf16,
                           attention_dq_mma_64,
                           nullptr,
                           attention_dkv_mma_64,
                           32768,
                           40960,
                           attention_mma_64_capped,
                           attention_dq_mma_64_capped,
                           nullptr,
                           attention_dkv_mma_64_capped};
const Kernels<bf16> MMA_128{attention_mma_128,
                            attention_delta_bf16,
                            attention_dq_mma_128,
                            nullptr,
                            attention_dkv_mma_128,
                            65536,
                            81920,
                            attention_mma_128_capped,
                            attention_dq_mma_128_capped,
                            nullptr,
                            attention_dkv_mma_128_capped};

// Outputs of the kernels. `same` compares them bit for bit.
template <class T>
struct Outputs {
    std::vector<T> out, dqkv;
    std::vector<float> lse, delta;

    bool same(const Outputs& other) const {
        const auto equal = [](const auto& a, const auto& b) {
            return memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
        };
        return equal(out, other.out) && equal(dqkv, other.dqkv) && equal(lse, other.lse) &&
               equal(delta, other.delta);
    }
};

template <class T>
std::vector<T> poisoned(size_t n) {
    std::vector<T> v(n);
    memset(static_cast<void*>(v.data()), 0xFF, n * sizeof(T));
    return v;
}

// Rows after the last token, that no kernel may touch.
constexpr int SPARE = 3;

template <class T>
bool is_poison(const T& x) {
    const T poison = poisoned<T>(1)[0];
    return memcmp(&x, &poison, sizeof x) == 0;
}

template <class T>
Outputs<T> run(const Kernels<T>& kernels, const Layout& layout, const std::vector<T>& qkv,
               const std::vector<T>& dout, int heads, int kv_heads, int dim, int window,
               float scale, float softcap, const std::string& name) {
    const int tokens = layout.tokens, row = (heads + 2 * kv_heads) * dim, width = heads * dim,
              rows = tokens + SPARE;
    Outputs<T> o{poisoned<T>(size_t(rows) * width), poisoned<T>(size_t(rows) * row),
                 poisoned<float>(size_t(rows) * heads), poisoned<float>(size_t(rows) * heads)};
    const unsigned tiles = layout.tiles.size() / 5;
    const dim3 grid = kernels.dkv != nullptr ? dim3(tiles, heads) : dim3(heads, tiles);
    const unsigned* positions = layout.positions.data();
    // Launches the variant with or without a soft-cap.
    const auto launch = [&](auto plain, auto capped, dim3 blocks, size_t bytes, auto... arguments) {
        if (softcap == 0)
            emulate::launch(plain, blocks, 128, bytes, arguments...);
        else
            emulate::launch(capped, blocks, 128, bytes, arguments..., softcap);
    };
    launch(kernels.forward, kernels.forward_capped, grid, kernels.forward_bytes, o.out.data(),
           o.lse.data(), qkv.data(), layout.tiles.data(), positions, heads, kv_heads, dim, window,
           scale);
    emulate::launch(kernels.delta, unsigned(tokens * heads + 3) / 4, 128, 0, o.delta.data(),
                    o.out.data(), dout.data(), tokens, heads, dim);
    launch(kernels.dq, kernels.dq_capped, grid, kernels.backward_bytes, o.dqkv.data(), qkv.data(),
           dout.data(), o.lse.data(), o.delta.data(), layout.tiles.data(), positions, heads,
           kv_heads, dim, window, scale);
    for (size_t i = 0; i < o.dqkv.size(); i++)
        if (int(i % row) >= width && !is_poison(o.dqkv[i]))
            return expect(false, name + ": dq wrote outside of its columns"), o;
    const auto queries = o.dqkv;
    const auto untouched = [&](const auto& values, int columns, const char* what) {
        for (size_t i = size_t(tokens) * columns; i < values.size(); i++)
            if (!is_poison(values[i]))
                return expect(false, name + ": wrote " + what + " after the last token");
    };
    if (kernels.dkv != nullptr) {
        launch(kernels.dkv, kernels.dkv_capped, dim3(tiles, unsigned(kv_heads)),
               kernels.backward_bytes, o.dqkv.data(), qkv.data(), dout.data(), o.lse.data(),
               o.delta.data(), layout.key_tiles.data(), positions, heads, kv_heads, dim, window,
               scale);
    } else {
        const bool shared = heads != kv_heads;
        auto parts = poisoned<float>(shared ? size_t(rows) * 2 * width : 0);
        launch(kernels.dkv_of_head, kernels.dkv_of_head_capped, grid, kernels.backward_bytes,
               o.dqkv.data(), qkv.data(), dout.data(), o.lse.data(), o.delta.data(),
               layout.key_tiles.data(), positions, heads, kv_heads, dim, window, scale,
               shared ? parts.data() : nullptr);
        if constexpr (std::is_same_v<T, bf16>)
            if (shared) {
                expect(memcmp(o.dqkv.data(), queries.data(), queries.size() * sizeof(T)) == 0,
                       name + ": dkv of a head wrote the sum's place");
                untouched(parts, 2 * width, "parts");
                const auto before = parts;
                emulate::launch(attention_sum, unsigned(tokens), 256, 0, o.dqkv.data(),
                                parts.data(), heads, kv_heads, dim);
                expect(memcmp(parts.data(), before.data(), parts.size() * sizeof(float)) == 0,
                       name + ": the sum wrote its parts");
            }
    }
    for (size_t i = 0; i < o.dqkv.size(); i++)
        if (int(i % row) < width && memcmp(&o.dqkv[i], &queries[i], sizeof(T)) != 0)
            return expect(false, name + ": dkv wrote outside of its columns"), o;
    untouched(o.out, width, "out");
    untouched(o.dqkv, row, "dqkv");
    untouched(o.lse, heads, "lse");
    untouched(o.delta, heads, "delta");
    return o;
}

// The largest difference in the columns [first, end) of rows, relative to the largest number there.
template <class T>
double error(const std::vector<T>& values, const Numbers& right, int columns, int first, int end) {
    double largest = 0, difference = 0;
    for (size_t i = 0; i < right.size(); i++) {
        const int column = i % columns;
        if (column < first || column >= end) continue;
        const double x = to_float(values[i]);
        if (!std::isfinite(x)) return INFINITY;
        largest = std::max(largest, std::fabs(right[i]));
        difference = std::max(difference, std::fabs(x - right[i]));
    }
    return largest == 0 ? difference : difference / largest;
}

std::mt19937 generator(1);
double worst[3][5];

// Compares the kernels with the reference. `place` is the row of `worst`. `shift` is added to all
// scores, by a constant in the queries and one in the keys, so that e^score alone would vanish or
// overflow. The absolute error of a score, and with it the relative error of the results, grows
// with `shift`.
template <class T>
void check(const char* kind, int place, const Kernels<T>& kernels, const std::vector<Group>& groups,
           int heads, int kv_heads, int dim, int window, float shift = 0, float softcap = 0) {
    const Layout layout(groups);
    const int row = (heads + 2 * kv_heads) * dim, width = heads * dim;
    const auto part = [](const char* label, int value) {
        return std::string(" ") + label + "=" + std::to_string(value);
    };
    const std::string name = kind + part("T", layout.tokens) + part("H", heads) +
                             part("K", kv_heads) + part("D", dim) + part("window", window) +
                             (shift != 0 ? part("shift", int(shift)) : "") +
                             (softcap != 0 ? " capped" : "");
    std::normal_distribution<float> normal;
    // The score of a query and a key is shifted by ±constant² · D · scale, which is `shift`.
    const float constant = std::sqrt(std::fabs(shift) / std::sqrt(float(dim)));
    const auto random = [&](int columns, Numbers& numbers) {
        std::vector<T> values(size_t(layout.tokens) * columns);
        for (size_t i = 0; i < values.size(); i++) {
            const int column = columns == row ? i % row : row;
            const float offset = column < width                    ? constant
                                 : column < width + kv_heads * dim ? std::copysign(constant, shift)
                                                                   : 0;
            values[i] = from_float<T>(normal(generator) + offset);
            numbers.push_back(to_float(values[i]));
        }
        return values;
    };
    Numbers exact_qkv, exact_dout;
    const auto qkv = random(row, exact_qkv), dout = random(width, exact_dout);
    const float scale = 1 / std::sqrt(float(dim));
    Outputs<T> o;
    for (const char* order : ORDERS) {
        setenv("EMULATE_ORDER", order, 1);
        auto next =
            run(kernels, layout, qkv, dout, heads, kv_heads, dim, window, scale, softcap, name);
        if (o.out.empty()) o = next;
        expect(o.same(next), name + ": order " + order + " gives other bits");
    }
    const Results r =
        reference(layout, exact_qkv, exact_dout, heads, kv_heads, dim, window, scale, softcap);
    const double errors[5] = {error(o.out, r.out, width, 0, width),
                              error(o.lse, r.lse, heads, 0, heads),
                              error(o.dqkv, r.dqkv, row, 0, width),
                              error(o.dqkv, r.dqkv, row, width, width + kv_heads * dim),
                              error(o.dqkv, r.dqkv, row, width + kv_heads * dim, row)};
    printf("%-52s out %.1e lse %.1e dq %.1e dk %.1e dv %.1e\n", name.c_str(), errors[0], errors[1],
           errors[2], errors[3], errors[4]);
    fflush(stdout);
    for (int i = 0; i < 5; i++) {
        if (shift == 0) worst[place][i] = std::max(worst[place][i], errors[i]);
        expect(errors[i] <= (sizeof(T) == 2 ? 1e-2 : 1e-5) * (shift == 0 ? 1 : 10),
               name + ": error");
    }
}

const std::vector<Group> ROW{{150, {63, 1, 65}}, {1, {64}}, {64, {}}, {65, {5, 150}}, {0, {2, 3}}};

// Near the size of the scores, so that it changes the results.
constexpr float SOFTCAP = 1.5;

void simt() {
    for (int window : WINDOWS) {
        check("f32", 0, F32, ROW, 9, 3, 16, window);
        check("bf16", 1, BF16, ROW, 4, 4, 32, window);
    }
    check("f32", 0, F32, {{70, {3, 66}}}, 32, 8, 8, 0);
    // A window that ends where a tile does.
    check("f32", 0, F32, {{189, {2}}}, 2, 1, 16, 127);
    check("f32", 0, F32, {{1, {}}}, 1, 1, 2, 0);
    check("f32", 0, F32, {{65, {2}}}, 2, 1, 66, 20);
    check("f32", 0, F32, {{65, {2}}}, 2, 1, 128, 0);
    check("f32", 0, F32, {{66, {3}}}, 2, 1, 130, 0);
    check("bf16", 1, BF16, {{66, {3}}}, 2, 1, 256, 0);
    for (float shift : {-150.0f, 150.0f}) check("f32", 0, F32, {{70, {3, 66}}}, 2, 1, 16, 0, shift);
    for (int window : {0, 70}) {
        check("f32", 0, F32, ROW, 9, 3, 16, window, 0, SOFTCAP);
        check("bf16", 1, BF16, ROW, 4, 4, 32, window, 0, SOFTCAP);
    }
    check("f32", 0, F32, {{66, {3}}}, 2, 1, 130, 0, 0, SOFTCAP);
    check("bf16", 1, BF16, {{66, {3}}}, 2, 1, 256, 0, 0, SOFTCAP);
}

void mma() {
    for (int window : WINDOWS) check("mma", 2, MMA_64, ROW, 2, 1, 64, window);
    // As many key heads as query heads, so that attention_sum is not needed.
    for (int window : {0, 70}) check("mma", 2, MMA_64, ROW, 2, 2, 64, window);
    check("mma", 2, MMA_64, {{65, {2, 70}}}, 9, 3, 64, 0);
    check("mma", 2, MMA_64, {{1, {}}}, 4, 4, 64, 0);
    // Windows that end where a tile does.
    check("mma", 2, MMA_64, {{64, {2}}}, 2, 1, 64, 65);
    check("mma", 2, MMA_64, {{189, {2}}}, 2, 1, 64, 127);
    for (float shift : {-150.0f, 150.0f})
        check("mma", 2, MMA_64, {{70, {3, 66}}}, 2, 1, 64, 0, shift);
    check("mma", 2, MMA_128, ROW, 1, 1, 128, 0);
    check("mma", 2, MMA_128, ROW, 2, 2, 128, 5);
    for (int window : {0, 70}) check("mma", 2, MMA_128, ROW, 2, 1, 128, window);
    check("mma", 2, MMA_128, {{130, {70, 1, 63}}}, 6, 2, 128, 0);
    check("mma", 2, MMA_128, {{63, {3}}}, 32, 8, 128, 5);
    for (int window : {0, 5}) {
        check("mma", 2, MMA_64, ROW, 2, 1, 64, window, 0, SOFTCAP);
        check("mma", 2, MMA_64, ROW, 2, 2, 64, window, 0, SOFTCAP);
        check("mma", 2, MMA_128, ROW, 2, 1, 128, window, 0, SOFTCAP);
    }
    check("mma", 2, MMA_128, {{130, {70, 1, 63}}}, 2, 2, 128, 0, 0, SOFTCAP);
}

}  // namespace

int main(int count, char** arguments) {
    const std::string only = count > 1 ? arguments[1] : "";
    if (only != "mma") simt();
    if (only != "simt") mma();
    const char* kinds[] = {"f32", "bf16", "mma"};
    for (int place = 0; place < 3; place++) {
        const double* w = worst[place];
        printf("worst %-6s out %.1e lse %.1e dq %.1e dk %.1e dv %.1e\n", kinds[place], w[0], w[1],
               w[2], w[3], w[4]);
    }
    printf(failed ? "attention: FAILED\n" : "attention: ok\n");
    return failed;
}
