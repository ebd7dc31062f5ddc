// Emulates the cuBLAS library: GEMMs on the CPU, with the checks of the original. Matrices are
// column-major. Sums are in f32, over k from 0 up. If EMULATE_TF32 is set, the operands of f32
// GEMMs are rounded to TF32, as NVIDIA_TF32_OVERRIDE may make cuBLAS do.
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Operation { NONE = 0, TRANSPOSE = 1, CONJUGATE = 2 };
enum Type { R_32F = 0, R_16BF = 14 };
enum Compute {
    COMPUTE_32F = 68,
    COMPUTE_32F_PEDANTIC = 69,
    COMPUTE_32F_FAST_16BF = 75,
    COMPUTE_32F_FAST_TF32 = 77
};
constexpr int TF32_TENSOR_OP_MATH = 3;

struct Handle {
    int math = 0;
};

// The emulated driver knows which memory is on the device.
struct Driver {
    int (*contains)(const void*, size_t) = nullptr;
    void (*check_after)(const char*) = nullptr;
    void (*defer)(void (*)(void*), void*) = nullptr;
    Driver() {
        if (void* library = dlopen("libcuda.so.1", RTLD_NOW)) {
            contains = reinterpret_cast<decltype(contains)>(dlsym(library, "emulate_contains"));
            check_after =
                reinterpret_cast<decltype(check_after)>(dlsym(library, "emulate_check_after"));
            defer = reinterpret_cast<decltype(defer)>(dlsym(library, "emulate_defer"));
        }
        if (contains == nullptr || check_after == nullptr || defer == nullptr) {
            fprintf(stderr, "emulator: this cuBLAS needs the emulated libcuda.so.1\n");
            abort();
        }
    }
};
const Driver& driver() {
    static const Driver driver;
    return driver;
}

// Puts the work in the queue of the device.
void defer(std::function<void()> work) {
    driver().defer(
        [](void* data) {
            auto* work = static_cast<std::function<void()>*>(data);
            (*work)();
            delete work;
        },
        new std::function<void()>(std::move(work)));
}

float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
// Rounds to nearest even, keeping all but the lowest `drop` bits.
float round_off(float x, int drop) {
    const uint32_t bits = to_bits(x), last = bits >> drop & 1;
    return x != x ? x : from_bits((bits + (1u << (drop - 1)) - 1 + last) >> drop << drop);
}
float load(const void* from, Type type, size_t at) {
    return type == R_32F ? static_cast<const float*>(from)[at]
                         : from_bits(uint32_t(static_cast<const uint16_t*>(from)[at]) << 16);
}
void store(void* to, Type type, size_t at, float x) {
    if (type == R_32F) {
        static_cast<float*>(to)[at] = x;
    } else {
        static_cast<uint16_t*>(to)[at] =
            uint16_t(x != x ? 0x7FFF : to_bits(round_off(x, 16)) >> 16);
    }
}
size_t size_of(Type type) { return type == R_32F ? 4 : 2; }
// Returns the bytes from the first to the last element of a column-major matrix.
size_t extent(size_t rows, size_t columns, int ld, Type type) {
    return rows == 0 || columns == 0 ? 0 : ((columns - 1) * size_t(ld) + rows) * size_of(type);
}

struct Matrix {
    const void* data;
    Type type;
    int ld;
    long long stride;  // between the matrices of a batch
};

// Aborts unless the matrix is in device memory.
void check_in_device_memory(const char* name, const void* data, size_t bytes) {
    if (bytes != 0 && !driver().contains(data, bytes)) {
        fprintf(stderr, "emulator: matrix %s of a GEMM is not in device memory: %p, %zu bytes\n",
                name, data, bytes);
        abort();
    }
}

// Writes the matrix op(X) of `rows` × `columns` to `to` in f32: element (r, c) goes to
// r · to_row + c · to_column. Rounds off the lowest `drop` bits of each value.
void unpack(std::vector<float>& to, const Matrix& x, size_t offset, bool transposed, size_t rows,
            size_t columns, size_t to_row, size_t to_column, int drop) {
    for (size_t c = 0; c < columns; ++c) {
        for (size_t r = 0; r < rows; ++r) {
            const size_t at = transposed ? r * size_t(x.ld) + c : c * size_t(x.ld) + r;
            const float value = load(x.data, x.type, offset + at);
            to[r * to_row + c * to_column] = drop == 0 ? value : round_off(value, drop);
        }
    }
}

Status gemm(Handle* handle, Operation op_a, Operation op_b, int m, int n, int k,
               const float* alpha, Matrix a, Matrix b, const float* beta, void* c_data, Matrix c,
               int batch, Compute compute) {
    if (handle == nullptr) {
        return NOT_INITIALIZED;
    }
    const auto known = [](Operation op) {
        return op == NONE || op == TRANSPOSE || op == CONJUGATE;
    };
    const bool transposed_a = op_a != NONE, transposed_b = op_b != NONE;
    if (m < 0 || n < 0 || k < 0 || batch < 0 || !known(op_a) || !known(op_b) || alpha == nullptr ||
        beta == nullptr || a.ld < std::max(1, transposed_a ? k : m) ||
        b.ld < std::max(1, transposed_b ? n : k) || c.ld < std::max(1, m)) {
        return INVALID_VALUE;
    }
    const bool types =
        a.type == b.type && ((a.type == R_16BF && (c.type == R_16BF || c.type == R_32F)) ||
                             (a.type == R_32F && c.type == R_32F));
    const bool fast = compute == COMPUTE_32F_FAST_16BF || compute == COMPUTE_32F_FAST_TF32;
    if (!types ||
        (compute != COMPUTE_32F && compute != COMPUTE_32F_PEDANTIC && !(fast && a.type == R_32F))) {
        return NOT_SUPPORTED;
    }
    if (m == 0 || n == 0 || batch == 0) {
        return SUCCESS;
    }
    static const bool tf32 = getenv("EMULATE_TF32") != nullptr;
    int drop = 0;  // bits that the tensor cores do not take from an f32
    if (compute == COMPUTE_32F_FAST_16BF) {
        drop = 16;
    } else if (a.type == R_32F &&
               (compute == COMPUTE_32F_FAST_TF32 ||
                (compute == COMPUTE_32F && (handle->math == TF32_TENSOR_OP_MATH || tf32)))) {
        drop = 13;
    }
    defer([=, alpha = *alpha, beta = *beta] {
        const size_t rows = size_t(m), columns = size_t(n), depth = size_t(k);
        std::vector<float> left(rows * depth), right(depth * columns), sums(rows);
        for (int i = 0; i < batch; ++i) {
            const size_t at_a = size_t(i * a.stride), at_b = size_t(i * b.stride),
                         at_c = size_t(i * c.stride);
            check_in_device_memory("A", static_cast<const char*>(a.data) + at_a * size_of(a.type),
                        transposed_a ? extent(depth, rows, a.ld, a.type)
                                     : extent(rows, depth, a.ld, a.type));
            check_in_device_memory("B", static_cast<const char*>(b.data) + at_b * size_of(b.type),
                        transposed_b ? extent(columns, depth, b.ld, b.type)
                                     : extent(depth, columns, b.ld, b.type));
            check_in_device_memory("C", static_cast<const char*>(c.data) + at_c * size_of(c.type),
                        extent(rows, columns, c.ld, c.type));
            // left[l · m + row], right[column · k + l]
            unpack(left, a, at_a, transposed_a, rows, depth, 1, rows, drop);
            unpack(right, b, at_b, transposed_b, depth, columns, 1, depth, drop);
            for (size_t column = 0; column < columns; ++column) {
                std::fill(sums.begin(), sums.end(), 0.0f);
                for (size_t l = 0; l < depth; ++l) {
                    const float* from = &left[l * rows];
                    const float factor = right[column * depth + l];
                    for (size_t row = 0; row < rows; ++row) {
                        sums[row] += from[row] * factor;
                    }
                }
                for (size_t row = 0; row < rows; ++row) {
                    const size_t at = at_c + column * size_t(c.ld) + row;
                    const float before = beta == 0.0f ? 0.0f : beta * load(c.data, c.type, at);
                    store(c_data, c.type, at, alpha * sums[row] + before);
                }
            }
        }
        driver().check_after("cublas");
    });
    return SUCCESS;
}

}  // namespace

EXPORT Status cublasCreate_v2(Handle** handle) {
    *handle = new Handle;
    return SUCCESS;
}
EXPORT Status cublasDestroy_v2(Handle* handle) {
    delete handle;
    return handle == nullptr ? NOT_INITIALIZED : SUCCESS;
}
EXPORT Status cublasGetVersion_v2(Handle*, int* version) {
    *version = 130000;
    return SUCCESS;
}
EXPORT Status cublasSetStream_v2(Handle* handle, void*) {
    return handle == nullptr ? NOT_INITIALIZED : SUCCESS;
}
EXPORT Status cublasSetWorkspace_v2(Handle* handle, void* workspace, size_t bytes) {
    check_in_device_memory("workspace", workspace, bytes);
    return handle == nullptr ? NOT_INITIALIZED : SUCCESS;
}
EXPORT Status cublasSetMathMode(Handle* handle, int mode) {
    if (handle == nullptr) {
        return NOT_INITIALIZED;
    }
    handle->math = mode;
    return SUCCESS;
}
EXPORT Status cublasGemmStridedBatchedEx(Handle* handle, Operation op_a, Operation op_b, int m,
                                         int n, int k, const float* alpha, const void* a,
                                         Type type_a, int lda, long long stride_a, const void* b,
                                         Type type_b, int ldb, long long stride_b,
                                         const float* beta, void* c, Type type_c, int ldc,
                                         long long stride_c, int batch, Compute compute, int) {
    return gemm(handle, op_a, op_b, m, n, k, alpha, Matrix{a, type_a, lda, stride_a},
                   Matrix{b, type_b, ldb, stride_b}, beta, c, Matrix{c, type_c, ldc, stride_c},
                   batch, compute);
}
EXPORT Status cublasGemmEx(Handle* handle, Operation op_a, Operation op_b, int m, int n, int k,
                           const float* alpha, const void* a, Type type_a, int lda, const void* b,
                           Type type_b, int ldb, const float* beta, void* c, Type type_c, int ldc,
                           Compute compute, int) {
    return gemm(handle, op_a, op_b, m, n, k, alpha, Matrix{a, type_a, lda, 0},
                   Matrix{b, type_b, ldb, 0}, beta, c, Matrix{c, type_c, ldc, 0}, 1, compute);
}
