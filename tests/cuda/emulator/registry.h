// The kernels that are compiled in, by name.
#pragma once

#include "memory.h"

#include <functional>

namespace emulate {

struct Kernel {
    const char* name;
    // Copies the arguments and returns a function that runs the kernel with them. `parameters` are
    // pointers to the values, as in cuLaunchKernel.
    std::function<void()> (*prepare)(const char* name, dim3 grid, dim3 block, size_t shared,
                                     void** parameters);
};

const Kernel* find_kernel(const char* name);

// Aborts unless a pointer is null or lies in live device memory, with the alignment of its type.
template <class T>
void check_argument(const char* name, size_t index, T value) {
    if constexpr (std::is_pointer<T>::value) {
        if (value != nullptr && !memory().contains(value, 0)) {
            fail("argument %zu of %s is not in device memory: %p", index, name, (const void*)value);
        }
        if (reinterpret_cast<size_t>(value) % alignof(std::remove_pointer_t<T>) != 0) {
            fail("argument %zu of %s is misaligned: %p", index, name, (const void*)value);
        }
    }
}

template <auto KERNEL_FUNCTION>
struct Entry;
template <class... P, void (*KERNEL_FUNCTION)(P...)>
struct Entry<KERNEL_FUNCTION> {
    static std::function<void()> prepare(const char* name, dim3 grid, dim3 block, size_t shared,
                                         void** parameters) {
        return prepare(name, grid, block, shared, parameters, std::index_sequence_for<P...>());
    }
    template <size_t... I>
    static std::function<void()> prepare(const char* name, dim3 grid, dim3 block, size_t shared,
                                         void** parameters, std::index_sequence<I...>) {
        (check_argument(name, I, *static_cast<P*>(parameters[I])), ...);
        return [=, arguments = std::tuple<P...>(*static_cast<P*>(parameters[I])...)] {
            launch(name, KERNEL_FUNCTION, grid, block, shared, std::get<I>(arguments)...);
        };
    }
};

}  // namespace emulate
