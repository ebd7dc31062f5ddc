// Emulates the CUDA driver library: runs the compiled-in kernels on the CPU.
//
// Every call is done when it returns. With EMULATE_LATE=1, copies, memsets, kernels and GEMMs stay
// in their device's queue until the host waits for the device, as they may on a GPU, and read their
// sources only then. All streams of a device are one. Modules are not compiled from their image; if
// it is PTX, it must name the kernels that are looked up. With EMULATE_RELEASE_FAILS=1,
// cuMemRelease releases the memory but returns an error.
#include "registry.h"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <mutex>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using emulate::memory;

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
};
struct ErrorText {
    Result result;
    const char *name, *text;
};
constexpr ErrorText ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "no context is current to this thread"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "the module is for a newer device"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
};

constexpr int TARGET = 80;  // compute capability 8.0
constexpr size_t SHARED_BY_DEFAULT = 48 * 1024;

struct Attribute {
    int key, value;
};
constexpr Attribute ATTRIBUTES[] = {
    {1, 1024},  // threads per block
    {2, 1024},
    {3, 1024},
    {4, 64},  // block dimensions
    {5, 0x7fffffff},
    {6, 65535},
    {7, 65535},                   // grid dimensions
    {8, int(SHARED_BY_DEFAULT)},  // shared memory per block
    {10, 32},                     // warp size
    {12, 65536},                  // registers per block
    {13, 1410000},                // clock, kHz
    {16, 108},                    // multiprocessors
    {38, 40 << 20},               // L2 cache, bytes
    {75, TARGET / 10},
    {76, TARGET % 10},
    {81, int(emulate::MOST_SHARED) + 1024},  // shared memory per multiprocessor
    {97, int(emulate::MOST_SHARED)},         // shared memory per block, when asked for
    {115, 0},                                // memory pools
};

struct Function {
    const emulate::Kernel* kernel;
    size_t dynamic_shared;
};
struct Module {
    std::string text;  // of the PTX; empty for other images
    std::vector<std::unique_ptr<Function>> functions;
};
struct Event {
    bool timed, recorded;
    std::chrono::steady_clock::time_point time;
};
struct Stream {};
struct Context {};

// One context per device.
Context contexts[emulate::MOST_DEVICES];

// Not thread_local: launches overwrite thread-local variables with NaN.
pthread_key_t current_context() {
    static const pthread_key_t key = [] {
        pthread_key_t key;
        pthread_key_create(&key, nullptr);
        return key;
    }();
    return key;
}
bool no_context() { return pthread_getspecific(current_context()) == nullptr; }
// Makes the emulator's memory use the device of the calling thread's context.
const bool device_function_is_set = [] {
    emulate::current_device = [] {
        const auto* context = static_cast<Context*>(pthread_getspecific(current_context()));
        return context == nullptr ? 0 : int(context - contexts);
    };
    return true;
}();

bool is_word(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$'; }

bool has_entry(const std::string& ptx, const std::string& name) {
    for (size_t at = ptx.find(".entry"); at != std::string::npos; at = ptx.find(".entry", at + 1)) {
        const size_t start = ptx.find_first_not_of(" \t\r\n", at + 6);
        if (start != std::string::npos && ptx.compare(start, name.size(), name) == 0 &&
            !is_word(ptx.c_str()[start + name.size()])) {
            return true;
        }
    }
    return false;
}

// The exit handlers of the process free the memory of NVIDIA's libraries. A call after that would
// read freed memory, so here it ends the process with an error.
std::atomic<bool> is_exiting{false};
struct AtExit {
    ~AtExit() { is_exiting = true; }
} at_exit;
void check_not_exiting() {
    if (is_exiting) {
        fprintf(stderr, "emulator: called while the process ends\n");
        _exit(97);
    }
}

bool is_set(const char* variable) {
    const char* text = getenv(variable);
    return text != nullptr && *text == '1';
}

// Work that a device has accepted and not done yet.
struct Queue {
    std::recursive_mutex mutex;
    std::deque<std::function<Result()>> waiting;
    Result failure = SUCCESS;
};
Queue& queue() {
    static Queue queues[emulate::MOST_DEVICES];
    return queues[emulate::current_device()];
}
Result defer(std::function<Result()> work) {
    static const bool late = is_set("EMULATE_LATE");
    Queue& mine = queue();
    std::lock_guard<std::recursive_mutex> lock(mine.mutex);
    if (!late) {
        return work();
    }
    mine.waiting.push_back(std::move(work));
    return SUCCESS;
}
// Does the waiting work, in order. After a failure, every later wait returns that failure.
Result finish() {
    Queue& mine = queue();
    std::lock_guard<std::recursive_mutex> lock(mine.mutex);
    while (!mine.waiting.empty()) {
        const std::function<Result()> work = std::move(mine.waiting.front());
        mine.waiting.pop_front();
        const Result result = work();
        if (mine.failure == SUCCESS) {
            mine.failure = result;
        }
    }
    return mine.failure;
}
Result wait() { return no_context() ? INVALID_CONTEXT : finish(); }

Result set(void* to, size_t pattern, size_t size, size_t n) {
    if (no_context()) {
        return INVALID_CONTEXT;
    }
    if (n != 0 && !memory().contains(to, size * n)) {
        return INVALID_VALUE;
    }
    return defer([=] {
        // Little-endian: the first bytes of `pattern` are its low bytes.
        for (size_t i = 0; i < n; ++i) {
            memcpy(static_cast<char*>(to) + i * size, &pattern, size);
        }
        return SUCCESS;
    });
}

// Copies n bytes. An address that is said to be on the device must be in device memory.
Result copy(void* to, bool to_device, const void* from, bool from_device, size_t n) {
    check_not_exiting();
    if (no_context()) {
        return INVALID_CONTEXT;
    }
    if (n == 0) {
        return SUCCESS;
    }
    if ((to_device && !memory().contains(to, n)) || (from_device && !memory().contains(from, n))) {
        return INVALID_VALUE;
    }
    return defer([=] {
        memmove(to, from, n);
        return SUCCESS;
    });
}
Result then_wait(Result result) { return result == SUCCESS ? wait() : result; }

}  // namespace

// -------------------------------------------------------------------------------------------------
// device and context

EXPORT Result cuInit(unsigned) { return SUCCESS; }
EXPORT Result cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}
EXPORT Result cuGetErrorName(Result result, const char** name) {
    for (const ErrorText& error : ERRORS) {
        if (error.result == result) {
            *name = error.name;
            return SUCCESS;
        }
    }
    *name = nullptr;
    return INVALID_VALUE;
}
EXPORT Result cuGetErrorString(Result result, const char** text) {
    for (const ErrorText& error : ERRORS) {
        if (error.result == result) {
            *text = error.text;
            return SUCCESS;
        }
    }
    *text = nullptr;
    return INVALID_VALUE;
}
EXPORT Result cuDeviceGetCount(int* count) {
    *count = emulate::device_count();
    return SUCCESS;
}
EXPORT Result cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < emulate::device_count() ? SUCCESS : INVALID_DEVICE;
}
EXPORT Result cuDeviceGetName(char* name, int size, int) {
    snprintf(name, size_t(size), "Emulated device");
    return SUCCESS;
}
EXPORT Result cuDeviceGetUuid_v2(unsigned char* uuid, int) {
    memset(uuid, 0, 16);
    return SUCCESS;
}
EXPORT Result cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = emulate::Memory::limit();
    return SUCCESS;
}
EXPORT Result cuDeviceGetAttribute(int* value, int key, int) {
    constexpr int VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED = 102;
    if (key == VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED) {
        *value = is_set("EMULATE_MAPPING");
        return SUCCESS;
    }
    for (const Attribute& attribute : ATTRIBUTES) {
        if (attribute.key == key) {
            *value = attribute.value;
            return SUCCESS;
        }
    }
    *value = 0;
    return SUCCESS;
}
EXPORT Result cuDevicePrimaryCtxRetain(Context** context, int device) {
    *context = &contexts[device];
    return SUCCESS;
}
EXPORT Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
EXPORT Result cuCtxSetCurrent(Context* context) {
    pthread_setspecific(current_context(), context);
    return SUCCESS;
}
EXPORT Result cuCtxGetCurrent(Context** context) {
    *context = static_cast<Context*>(pthread_getspecific(current_context()));
    return SUCCESS;
}
EXPORT Result cuCtxSynchronize() { return wait(); }

// ---------------------------------------------------------------------------------------------
// memory

EXPORT Result cuMemGetInfo_v2(size_t* available, size_t* total) {
    if (no_context()) {
        return INVALID_CONTEXT;
    }
    *total = emulate::Memory::limit();
    *available = *total - std::min(*total, memory().used());
    return SUCCESS;
}
EXPORT Result cuMemAlloc_v2(void** pointer, size_t bytes) {
    if (no_context()) {
        return INVALID_CONTEXT;
    }
    if (bytes == 0) {
        return INVALID_VALUE;
    }
    *pointer = memory().allocate(bytes);
    return *pointer == nullptr ? OUT_OF_MEMORY : SUCCESS;
}
EXPORT Result cuMemFree_v2(void* pointer) {
    if (no_context()) {
        return INVALID_CONTEXT;
    }
    finish();  // as the driver does
    return pointer == nullptr || memory().release(pointer) ? SUCCESS : INVALID_VALUE;
}
EXPORT Result cuMemAllocAsync(void** pointer, size_t bytes, Stream*) {
    return cuMemAlloc_v2(pointer, bytes);
}
EXPORT Result cuMemFreeAsync(void* pointer, Stream*) { return cuMemFree_v2(pointer); }
EXPORT Result cuMemAddressReserve(void** pointer, size_t bytes, size_t alignment, void*,
                                  unsigned long long) {
    auto* start = static_cast<char*>(mmap(nullptr, bytes + alignment, PROT_NONE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (start == MAP_FAILED) {
        return OUT_OF_MEMORY;
    }
    *pointer = start + (alignment - reinterpret_cast<size_t>(start) % alignment) % alignment;
    return SUCCESS;
}
EXPORT Result cuMemAddressFree(void* pointer, size_t bytes) {
    return munmap(pointer, bytes) == 0 ? SUCCESS : INVALID_VALUE;
}
// CUmemAllocationProp. A handle is the size of its memory plus the number of the device, which fits
// in the lowest bits because sizes are multiples of large pages.
struct Properties {
    int type, handle_types, location_type, device;
};
EXPORT Result cuMemCreate(size_t* handle, size_t bytes, const Properties* properties,
                          unsigned long long) {
    if (bytes % emulate::MOST_DEVICES != 0 || properties->device < 0 ||
        properties->device >= emulate::device_count()) {
        return INVALID_VALUE;
    }
    *handle = bytes + size_t(properties->device);
    return memory().create(bytes, properties->device) ? SUCCESS : OUT_OF_MEMORY;
}
EXPORT Result cuMemRelease(size_t handle) {
    const size_t device = handle % emulate::MOST_DEVICES;
    memory().destroy(handle - device, int(device));
    return is_set("EMULATE_RELEASE_FAILS") ? INVALID_VALUE : SUCCESS;
}
EXPORT Result cuMemMap(void* pointer, size_t bytes, size_t offset, size_t handle,
                       unsigned long long) {
    const size_t device = handle % emulate::MOST_DEVICES;
    return offset == 0 && bytes == handle - device && memory().map(pointer, bytes, int(device))
               ? SUCCESS
               : INVALID_VALUE;
}
EXPORT Result cuMemSetAccess(void*, size_t, const void*, size_t) { return SUCCESS; }
EXPORT Result cuMemUnmap(void* pointer, size_t bytes) {
    return memory().unmap(pointer, bytes) ? SUCCESS : INVALID_VALUE;
}
EXPORT Result cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    *pointer = malloc(bytes);
    return *pointer == nullptr ? OUT_OF_MEMORY : SUCCESS;
}
EXPORT Result cuMemFreeHost(void* pointer) {
    free(pointer);
    return SUCCESS;
}
EXPORT Result cuMemsetD8_v2(void* to, unsigned char value, size_t n) {
    return then_wait(set(to, value, 1, n));
}
EXPORT Result cuMemsetD8Async(void* to, unsigned char value, size_t n, Stream*) {
    return set(to, value, 1, n);
}
EXPORT Result cuMemsetD32_v2(void* to, unsigned value, size_t n) {
    return then_wait(set(to, value, 4, n));
}
EXPORT Result cuMemsetD32Async(void* to, unsigned value, size_t n, Stream*) {
    return set(to, value, 4, n);
}
EXPORT Result cuMemcpyHtoD_v2(void* to, const void* from, size_t n) {
    return then_wait(copy(to, true, from, false, n));
}
EXPORT Result cuMemcpyDtoH_v2(void* to, const void* from, size_t n) {
    return then_wait(copy(to, false, from, true, n));
}
EXPORT Result cuMemcpyDtoD_v2(void* to, const void* from, size_t n) {
    return then_wait(copy(to, true, from, true, n));
}
EXPORT Result cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t n, Stream*) {
    return copy(to, true, from, false, n);
}
EXPORT Result cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t n, Stream*) {
    return copy(to, false, from, true, n);
}
EXPORT Result cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t n, Stream*) {
    return copy(to, true, from, true, n);
}

// -------------------------------------------------------------------------------------------------
// streams and events

EXPORT Result cuStreamCreate(Stream** stream, unsigned) {
    *stream = new Stream;
    return no_context() ? INVALID_CONTEXT : SUCCESS;
}
EXPORT Result cuStreamDestroy_v2(Stream* stream) {
    delete stream;
    return SUCCESS;
}
EXPORT Result cuStreamSynchronize(Stream*) { return wait(); }
EXPORT Result cuStreamWaitEvent(Stream*, Event*, unsigned) { return SUCCESS; }
EXPORT Result cuLaunchHostFunc(Stream*, void (*function)(void*), void* data) {
    return defer([=] {
        function(data);
        return SUCCESS;
    });
}
EXPORT Result cuEventCreate(Event** event, unsigned flags) {
    *event = new Event{(flags & 2) == 0, false, {}};  // 2: CU_EVENT_DISABLE_TIMING
    return SUCCESS;
}
EXPORT Result cuEventDestroy_v2(Event* event) {
    delete event;
    return SUCCESS;
}
EXPORT Result cuEventRecord(Event* event, Stream*) {
    event->recorded = true;
    event->time = std::chrono::steady_clock::now();
    return SUCCESS;
}
EXPORT Result cuEventQuery(Event*) { return wait(); }
EXPORT Result cuEventSynchronize(Event* event) { return event->recorded ? wait() : SUCCESS; }
EXPORT Result cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
    if (!start->timed || !end->timed || !start->recorded || !end->recorded) {
        return INVALID_HANDLE;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return SUCCESS;
}

// -------------------------------------------------------------------------------------------------
// modules and launches

EXPORT Result cuModuleLoadData(Module** module, const char* image) {
    if (no_context()) {
        return INVALID_CONTEXT;
    }
    *module = new Module;
    const unsigned char first = (unsigned char)image[0];
    if (first == 0x7F || first >= 0x80 || strstr(image, ".version") == nullptr) {
        return SUCCESS;  // an ELF image, a fat binary or no PTX at all
    }
    (*module)->text = image;
    const char* target = strstr(image, ".target sm_");
    if (target != nullptr && atoi(target + strlen(".target sm_")) > TARGET) {
        delete *module;
        return NO_BINARY_FOR_GPU;
    }
    return SUCCESS;
}
EXPORT Result cuModuleLoadDataEx(Module** module, const char* image, unsigned, void*, void*) {
    return cuModuleLoadData(module, image);
}
EXPORT Result cuModuleUnload(Module* module) {
    delete module;
    return SUCCESS;
}
EXPORT Result cuModuleGetFunction(Function** function, Module* module, const char* name) {
    const emulate::Kernel* kernel = emulate::find_kernel(name);
    if (kernel == nullptr || (!module->text.empty() && !has_entry(module->text, name))) {
        return NOT_FOUND;
    }
    module->functions.push_back(std::make_unique<Function>(Function{kernel, SHARED_BY_DEFAULT}));
    *function = module->functions.back().get();
    return SUCCESS;
}
EXPORT Result cuFuncGetAttribute(int* value, int key, Function* function) {
    *value = key == 0 ? 1024 : key == 8 ? int(function->dynamic_shared) : 0;
    return SUCCESS;
}
EXPORT Result cuFuncSetAttribute(Function* function, int key, int value) {
    constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
    if (key == MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        if (value < 0 || size_t(value) > emulate::MOST_SHARED) {
            return INVALID_VALUE;
        }
        function->dynamic_shared = size_t(value);
    }
    return SUCCESS;
}
// Returns true after as many launches as EMULATE_LOST_AFTER says. The launch then fails, as after
// an access out of bounds on a GPU.
static bool is_lost() {
    static const char* const text = getenv("EMULATE_LOST_AFTER");
    static std::atomic<long long> launches{0};
    return text != nullptr && ++launches > atoll(text);
}
EXPORT Result cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                             unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                             Stream*, void** parameters, void** extra) {
    check_not_exiting();
    if (no_context()) {
        return INVALID_CONTEXT;
    }
    const auto threads = (unsigned long long)block_x * block_y * block_z;
    const bool grid_fits = grid_x != 0 && grid_y != 0 && grid_z != 0 && grid_x <= 0x7fffffff &&
                           grid_y <= 65535 && grid_z <= 65535;
    const bool block_fits =
        threads != 0 && threads <= 1024 && block_x <= 1024 && block_y <= 1024 && block_z <= 64;
    if (!grid_fits || !block_fits || shared > function->dynamic_shared || extra != nullptr) {
        return INVALID_VALUE;
    }
    if (is_lost()) {
        return ILLEGAL_ADDRESS;
    }
    const emulate::Kernel& kernel = *function->kernel;
    auto run = kernel.prepare(kernel.name, dim3(grid_x, grid_y, grid_z),
                              dim3(block_x, block_y, block_z), shared, parameters);
    return defer([&kernel, run = std::move(run)] {
        run();
        memory().check_after(kernel.name);
        return SUCCESS;
    });
}

// -------------------------------------------------------------------------------------------------
// for the emulated cuBLAS, not part of CUDA

EXPORT int emulate_contains(const void* pointer, size_t bytes) {
    return memory().contains(pointer, bytes);
}
EXPORT void emulate_defer(void (*work)(void*), void* data) {
    defer([=] {
        work(data);
        return SUCCESS;
    });
}
EXPORT void emulate_check_after(const char* operation) { memory().check_after(operation); }
