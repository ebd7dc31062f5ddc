// All kernels, and the table of their names. The build script writes names.inc: a line
// KERNEL_NAME(name) for each.
#include "registry.h"

#include "all.cu"

namespace emulate {

#define KERNEL_NAME(name) {#name, &Entry<&name>::prepare},
static const Kernel KERNELS[] = {
#include "names.inc"
};

const Kernel* find_kernel(const char* name) {
    for (const Kernel& kernel : KERNELS) {
        if (strcmp(kernel.name, name) == 0) {
            return &kernel;
        }
    }
    return nullptr;
}

}  // namespace emulate
