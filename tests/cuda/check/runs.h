// Helpers of the checks of kernels: arrays between guards, comparison with a reference, runs in
// several orders.
#pragma once

#include "common.cuh"

#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <type_traits>

namespace {

using Numbers = std::vector<double>;

// A race is found in any order, and looking for races is slow, so one order is enough then.
#ifdef EMULATE_RACES
const char* const ORDERS[] = {"forward"};
#else
const char* const ORDERS[] = {"forward", "reverse", "random:7"};
#endif

// n elements of T between guards. They start `shift` elements after a 16-byte boundary, and all
// their bytes are 0xFF (NaN) at first.
template <class T>
struct Array {
    static constexpr size_t GUARD = 64;
    size_t n, start;
    std::vector<unsigned char> bytes;

    Array(size_t n, int shift) : n(n), bytes(n * sizeof(T) + 3 * GUARD, 0xFF) {
        start = GUARD + (16 - (reinterpret_cast<size_t>(bytes.data()) + GUARD) % 16) % 16 +
                shift * sizeof(T);
        for (size_t i = 0; i < bytes.size(); ++i)
            if (i < start || i >= start + n * sizeof(T)) bytes[i] = 0xA5;
    }
    Array(const Array&) = delete;
    Array(Array&&) = default;
    T* data() { return reinterpret_cast<T*>(bytes.data() + start); }
    T& operator[](size_t i) { return data()[i]; }
    double at(size_t i) { return to_float(data()[i]); }
    Numbers values() {
        Numbers v(n);
        for (size_t i = 0; i < n; ++i) v[i] = at(i);
        return v;
    }
    bool guarded() const {
        for (size_t i = 0; i < bytes.size(); ++i)
            if ((i < start || i >= start + n * sizeof(T)) && bytes[i] != 0xA5) return false;
        return true;
    }
};

int failures = 0;
// Largest error of each kernel.
std::map<std::string, double> errors;

// A check of one launch or a few, in one order of threads and with one alignment of the arrays.
struct Run {
    std::mt19937 engine;
    int shift;
    std::string kernel, label;
    std::vector<uint32_t> bits;  // of all results

    template <class T>
    Array<T> empty(size_t n) {
        return Array<T>(n, shift);
    }
    template <class T>
    Array<T> random(size_t n, double deviation = 1) {
        Array<T> a(n, shift);
        std::normal_distribution<float> normal(0, deviation);
        for (size_t i = 0; i < n; ++i) a[i] = from_float<T>(normal(engine));
        return a;
    }
    Array<unsigned> below(size_t n, unsigned end) {
        Array<unsigned> a(n, shift);
        for (size_t i = 0; i < n; ++i) a[i] = engine() % end;
        return a;
    }
    void fail(const std::string& what) {
        ++failures;
        printf("FAILED %s: %s\n", label.c_str(), what.c_str());
    }
    // Compares results with the expected ones. The error of an element is divided by the largest of
    // three values: the expected element, the root mean square of all expected elements, and
    // `terms`, the size of the terms that cancel in them. NaN is expected where nothing may be
    // written.
    template <class T>
    void expect(Array<T>& got, const Numbers& want,
                double tolerance = std::is_same_v<T, bf16> ? 1e-2 : 1e-5, double terms = 1e-30) {
        double squares = 0, count = 0;
        for (double w : want)
            if (!std::isnan(w)) squares += w * w, count += 1;
        const double typical = std::max(std::sqrt(squares / std::max(count, 1.0)), terms);
        double& largest = errors[kernel];
        for (size_t i = 0; i < want.size(); ++i) {
            bits.push_back(__float_as_uint(to_float(got[i])));
            const double g = got.at(i), w = want[i];
            const double error = std::isnan(w) != std::isnan(g) ? INFINITY
                                 : std::isnan(w) || g == w
                                     ? 0
                                     : std::abs(g - w) / std::max(std::abs(w), typical);
            largest = std::max(largest, error);
            if (!(error <= tolerance)) {
                fail("element " + std::to_string(i) + " is " + std::to_string(g) + ", not " +
                     std::to_string(w));
                break;
            }
        }
        if (want.size() != got.n || !got.guarded()) fail("wrote outside of the array");
    }
};

// Part of the names of the checks that run; empty for all.
std::string only;

// Runs `body` in every order and alignment.
template <class T>
void cases(const std::string& kernel, const std::string& shape,
           const std::function<void(Run&)>& body) {
    const std::string name = kernel + (std::is_same_v<T, float> ? " f32" : " bf16");
    if (name.find(only) == std::string::npos) return;
    for (int shift : {0, 1}) {
        std::vector<uint32_t> first;
        for (const char* order : ORDERS) {
            setenv("EMULATE_ORDER", order, 1);
            Run run{std::mt19937(1 + shape.size()),
                    shift,
                    name,
                    name + " " + shape + " shift " + std::to_string(shift) + " " + order,
                    {}};
            body(run);
            if (order == ORDERS[0]) first = run.bits;
            if (run.bits != first) run.fail("depends on the order of the threads");
        }
    }
}

#define ENTRY(name)                             \
    [] {                                        \
        if constexpr (std::is_same_v<T, float>) \
            return &name##_f32;                 \
        else                                    \
            return &name##_bf16;                \
    }()

std::string text(std::initializer_list<int> numbers) {
    std::string s;
    for (int n : numbers) s += std::to_string(n) + " ";
    return s;
}
int groups(long long n, int size) { return int((n + size - 1) / size); }
using emulate::launch;

}  // namespace
