// Replaces the library of the thread sanitizer: defines the functions that a compiler calls before
// each memory access. This file itself is not compiled with the sanitizer.
#include "scheduler.h"

namespace emulate {

void note_access(const void* address, size_t bytes, bool write) {
    Worker* worker = here.worker;
    if (worker == nullptr || worker->current == nullptr) return;
    const auto* p = static_cast<const unsigned char*>(address);
    const auto* own = reinterpret_cast<const unsigned char*>(&here);
    size_t at;
    if (p >= worker->shared && p < worker->shared + worker->launch->shared) {
        at = size_t(p - worker->shared);
    } else if (p >= worker->variables.begin && p < worker->variables.end &&
               (p < own || p >= own + sizeof(Here))) {
        at = worker->launch->shared + size_t(p - worker->variables.begin);  // __shared__ variables
    } else {
        return;
    }
    const unsigned thread = worker->number();
    const int other = worker->races.access(thread, at, bytes, write);
    if (other >= 0) {
        const bool dynamic = at < worker->launch->shared;
        fail(
            "race: %s of thread %u and an access of thread %d, no barrier between, %zu bytes at "
            "%zu of the %s shared memory",
            write ? "a write" : "a read", thread, other, bytes,
            dynamic ? at : at - worker->launch->shared, dynamic ? "dynamic" : "static");
    }
}

}  // namespace emulate

using emulate::note_access;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define ACCESSES(bytes)                                                          \
    void __tsan_read##bytes(void* p) { note_access(p, bytes, false); }           \
    void __tsan_write##bytes(void* p) { note_access(p, bytes, true); }           \
    void __tsan_volatile_read##bytes(void* p) { note_access(p, bytes, false); }  \
    void __tsan_volatile_write##bytes(void* p) { note_access(p, bytes, true); }  \
    void __tsan_unaligned_read##bytes(void* p) { note_access(p, bytes, false); } \
    void __tsan_unaligned_write##bytes(void* p) { note_access(p, bytes, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, unsigned long n) { note_access(p, n, false); }
void __tsan_write_range(void* p, unsigned long n) { note_access(p, n, true); }

// Atomic operations never race with each other; the kernels have none in shared memory.
#define ATOMICS(bits, type)                                                                       \
    type __tsan_atomic##bits##_load(const volatile type* p, int) {                                \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                              \
    }                                                                                             \
    void __tsan_atomic##bits##_store(volatile type* p, type x, int) {                             \
        __atomic_store_n(p, x, __ATOMIC_SEQ_CST);                                                 \
    }                                                                                             \
    type __tsan_atomic##bits##_exchange(volatile type* p, type x, int) {                          \
        return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST);                                       \
    }                                                                                             \
    type __tsan_atomic##bits##_fetch_add(volatile type* p, type x, int) {                         \
        return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);                                        \
    }                                                                                             \
    type __tsan_atomic##bits##_fetch_sub(volatile type* p, type x, int) {                         \
        return __atomic_fetch_sub(p, x, __ATOMIC_SEQ_CST);                                        \
    }                                                                                             \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* was, type x, int,   \
                                                      int) {                                      \
        return __atomic_compare_exchange_n(p, was, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    }
ATOMICS(8, unsigned char)
ATOMICS(32, unsigned)
ATOMICS(64, unsigned long)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

}  // extern "C"
