// Runs the threads of a CUDA block as fibers of one OS thread.
//
// A fiber runs until it needs the others: at a block barrier, or at an operation of its warp
// (shuffle, vote, mma, ...). A warp operation is carried out once, by the scheduler, when all lanes
// named by its mask wait at it; their operands and results lie on their stacks. EMULATE_ORDER
// (forward, reverse, random:SEED) sets the order of lanes, warps and blocks, so that a result that
// depends on timing changes with it; EMULATE_THREADS (default 1) spreads blocks over OS threads.
// Barriers that can never complete abort with a report.
#pragma once

#include "order.h"
#include "races.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Saves the callee-saved registers, stores the stack pointer in *save and continues on the stack
// `to`. This is assembly for x86-64, the only processors that the emulator runs on.
extern "C" void emulate_switch(void** save, void* to);
asm(R"(
    .section .text.emulate_switch,"axG",@progbits,emulate_switch,comdat
    .weak emulate_switch
    .hidden emulate_switch
    .type emulate_switch,@function
emulate_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulate_switch, .-emulate_switch
    .text
)");

namespace emulate {

constexpr unsigned WARP = 32;
constexpr unsigned MOST_THREADS = 1024;
constexpr size_t MOST_SHARED = 163 * 1024;  // of compute capability 8.0
constexpr size_t STACK = 256 * 1024;
constexpr size_t GUARD = 256;
constexpr unsigned char POISON = 0xFF;  // NaN as float and as bf16
constexpr unsigned char GUARD_BYTE = 0xA5;

struct Worker;

// Where the calling fiber is: the only thread-local state of the emulator, because Worker::poison
// overwrites all other thread-local variables. It is zero at first.
struct Here {
    uint3 thread, block, block_dim, grid_dim;
    Worker* worker;
};
inline thread_local Here here;

// A source line, to tell barriers apart.
struct Place {
    const char* file;
    int line;
};

// A warp operation: `arguments[lane]` for the lanes in `mask`.
using Combine = void (*)(void* const* arguments, unsigned mask);
// The operation of __syncwarp.
inline void nothing(void* const*, unsigned) {}

struct Copy {
    void* to;
    const void* from;  // null: zeros
    unsigned group;
};

struct Fiber {
    void* stack_pointer;
    uint3 index;
    Combine combine;  // what it waits for, in its warp
    const char* operation;
    unsigned mask;
    void* argument;
    Place place;  // the block barrier it waits at
    int* predicate;
    std::vector<Copy> copies;  // asynchronous copies not carried out yet
    unsigned group;
};

// Sets of lanes: each lane of the warp is in exactly one of ready, in_warp, in_block and done.
struct WarpState {
    unsigned lanes, ready, in_warp, in_block, done;
};

struct Launch {
    const char* name;
    dim3 grid, block;
    size_t shared;
    void (*run)(void*);
    void* data;
    std::atomic<unsigned long long> next{0};
    std::vector<unsigned> order;  // of blocks, if random
};

struct Range {
    unsigned char *begin, *end;
};

// The calling thread's copy of the thread-local variables of the module that this code is part of.
inline Range thread_local_range() {
    here.worker = nullptr;  // makes the copy, if this is the thread's first access
    auto* self = reinterpret_cast<unsigned char*>(&here);
    Range range{self, self};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            auto* range = static_cast<Range*>(data);
            auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
            for (int i = 0; i < info->dlpi_phnum && begin != nullptr; ++i) {
                const auto& header = info->dlpi_phdr[i];
                if (header.p_type == PT_TLS && begin <= range->begin &&
                    range->begin < begin + header.p_memsz) {
                    *range = Range{begin, begin + header.p_memsz};
                    return 1;
                }
            }
            return 0;
        },
        &range);
    if (range.begin == range.end) {
        fail("the thread-local variables of this module were not found");
    }
    return range;
}

extern "C" inline void emulate_enter();

// The fibers, stacks and shared memory with which one OS thread runs blocks, one after the other.
struct Worker {
    Fiber fibers[MOST_THREADS] = {};
    WarpState warps[MOST_THREADS / WARP] = {};
    unsigned threads = 0;
    Fiber* current = nullptr;
    void* scheduler = nullptr;  // its stack pointer while a fiber runs
    Launch* launch = nullptr;
    Order order;
    unsigned char* stacks;
    std::vector<unsigned char> shared_memory =
        std::vector<unsigned char>(MOST_SHARED + 2 * GUARD + 128);
    unsigned char* shared = nullptr;
    Range variables = {};  // __shared__ ones
#ifdef EMULATE_RACES
    Races races;
#endif

    Worker() {
        // The lowest page of every stack stays inaccessible, to stop an overflow.
        void* memory = mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            fail("no memory for stacks");
        }
        stacks = static_cast<unsigned char*>(memory);
        for (unsigned t = 0; t < MOST_THREADS; ++t) {
            mprotect(stacks + t * STACK, 4096, PROT_NONE);
        }
        const auto address = reinterpret_cast<size_t>(shared_memory.data()) + GUARD;
        shared = reinterpret_cast<unsigned char*>((address + 127) / 128 * 128);
    }

    // Fills the shared memory of a block with NaN: the dynamic memory, between guard zones, and the
    // `__shared__` variables, which are thread-local variables of this module. This overwrites all
    // thread-local variables of the module but `here`.
    void poison() {
        memset(shared - GUARD, GUARD_BYTE, GUARD);
        memset(shared, POISON, launch->shared);
        memset(shared + launch->shared, GUARD_BYTE, GUARD);
        auto* own = reinterpret_cast<unsigned char*>(&here);
        memset(variables.begin, POISON, own - variables.begin);
        memset(own + sizeof(Here), POISON, variables.end - (own + sizeof(Here)));
    }

    void check_shared_guards() const {
        for (size_t i = 0; i < GUARD; ++i) {
            if (shared[-1 - long(i)] != GUARD_BYTE) {
                fail("write %zu bytes before the dynamic shared memory", i + 1);
            }
            if (shared[launch->shared + i] != GUARD_BYTE) {
                fail("write %zu bytes past the %zu bytes of dynamic shared memory", i,
                     launch->shared);
            }
        }
    }

    void start_fibers() {
        const dim3 size = launch->block;
        threads = size.x * size.y * size.z;
        for (unsigned t = 0; t < threads; ++t) {
            Fiber& fiber = fibers[t];
            fiber.index = uint3{t % size.x, t / size.x % size.y, t / size.x / size.y};
            fiber.copies.clear();
            fiber.group = 0;
            // Stacks start at different offsets, because they would share the same cache sets
            // otherwise.
            auto* top = reinterpret_cast<void**>(stacks + (t + 1) * STACK - t % 64 * 192);
            *--top = nullptr;                                  // no caller
            *--top = reinterpret_cast<void*>(&emulate_enter);  // where the first switch returns to
            fiber.stack_pointer = top - 6;                     // six registers of any value
        }
        for (unsigned w = 0; w * WARP < threads; ++w) {
            const unsigned left = threads - w * WARP;
            const unsigned lanes = left >= WARP ? ~0u : (1u << left) - 1;
            warps[w] = WarpState{lanes, lanes, 0, 0, 0};
        }
    }

    void run_block(unsigned long long number) {
        const dim3 grid = launch->grid;
        here.block = uint3{unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                           unsigned(number / grid.x / grid.y)};
        here.grid_dim = uint3{grid.x, grid.y, grid.z};
        here.block_dim = uint3{launch->block.x, launch->block.y, launch->block.z};
        here.worker = this;
        poison();
        start_fibers();
#ifdef EMULATE_RACES
        races.begin(launch->shared + size_t(variables.end - variables.begin),
                    (threads + WARP - 1) / WARP);
#endif
        for (;;) {
            unsigned ready = 0;
            for (unsigned w = 0; w * WARP < threads; ++w) {
                ready |= unsigned(warps[w].ready != 0) << w;
            }
            if (ready != 0) {
                step(order.choose(ready));
            } else if (!pass_block_barrier()) {
                break;
            }
        }
        check_shared_guards();
        here.worker = nullptr;
    }

    // Runs every ready lane of a warp until it waits. Then carries out the warp operations at which
    // all lanes of the operation's mask wait.
    void step(unsigned w) {
        WarpState& warp = warps[w];
        for (unsigned todo = warp.ready; todo != 0;) {
            const unsigned lane = order.choose(todo);
            todo &= ~(1u << lane);
            current = &fibers[w * WARP + lane];
            here.thread = current->index;
            emulate_switch(&scheduler, current->stack_pointer);
        }
        current = nullptr;
        Fiber* lanes = &fibers[w * WARP];
        for (unsigned todo = warp.in_warp; todo != 0;) {
            const Fiber& first = lanes[__builtin_ctz(todo)];
            const unsigned mask = first.mask & warp.lanes;
            todo &= todo - 1;
            if ((mask & warp.in_warp) != mask) {
                continue;
            }
            void* arguments[WARP] = {};
            bool same = true;
            for (unsigned set = mask; set != 0; set &= set - 1) {
                const Fiber& fiber = lanes[__builtin_ctz(set)];
                same = same && fiber.combine == first.combine && fiber.mask == first.mask;
                arguments[__builtin_ctz(set)] = fiber.argument;
            }
            if (same) {
                first.combine(arguments, mask);
#ifdef EMULATE_RACES
                if (first.combine == &nothing && mask == warp.lanes) {
                    races.warp_barrier(w);
                }
#endif
                warp.in_warp &= ~mask;
                warp.ready |= mask;
                todo &= ~mask;
            }
        }
    }

    // Called when no fiber can continue. Lets the block pass its barrier. Returns false if all
    // fibers have ended.
    bool pass_block_barrier() {
        unsigned waiting = 0, done = 0;
        int count = 0;
        bool same = true;
        for (unsigned t = 0; t < threads; ++t) {
            const WarpState& warp = warps[t / WARP];
            if (warp.in_block >> t % WARP & 1) {
                waiting += 1;
                count += *fibers[t].predicate != 0;
                same = same && fibers[t].place.line == fibers[0].place.line &&
                       strcmp(fibers[t].place.file, fibers[0].place.file) == 0;
            }
            done += warp.done >> t % WARP & 1;
        }
        if (done == threads) {
            return false;
        }
        if (waiting != threads || !same) {
            report_stuck();
        }
        for (unsigned t = 0; t < threads; ++t) {
            *fibers[t].predicate = count;
        }
#ifdef EMULATE_RACES
        races.block_barrier();
#endif
        for (unsigned w = 0; w * WARP < threads; ++w) {
            warps[w].ready = warps[w].in_block;
            warps[w].in_block = 0;
        }
        return true;
    }

    [[noreturn]] void report_stuck() {
        std::string previous;
        for (unsigned t = 0; t < threads; ++t) {
            const WarpState& warp = warps[t / WARP];
            const Fiber& fiber = fibers[t];
            char text[256];
            if (warp.done >> t % WARP & 1) {
                snprintf(text, sizeof text, "has ended");
            } else if (warp.in_warp >> t % WARP & 1) {
                snprintf(text, sizeof text, "waits at %s, mask %08x", fiber.operation, fiber.mask);
            } else {
                snprintf(text, sizeof text, "waits at the barrier %s:%d", fiber.place.file,
                         fiber.place.line);
            }
            if (previous != text) {  // one line for each run of threads
                fprintf(stderr, "emulator: from thread %u on: %s\n", t, text);
                previous = text;
            }
        }
        fail("divergent barrier: no thread can go on");
    }

    // Switches from the calling fiber to the scheduler.
    void suspend() { emulate_switch(&current->stack_pointer, scheduler); }

    unsigned number() const { return unsigned(current - fibers); }

    void wait_in_warp(Combine combine, const char* operation, unsigned mask, void* argument) {
        const unsigned lane = number() % WARP;
        WarpState& warp = warps[number() / WARP];
        if (!(mask >> lane & 1)) {
            fail("%s: lane %u calls with mask %08x", operation, lane, mask);
        }
        if (mask & warp.done) {
            fail("%s: mask %08x names threads that have ended (%08x)", operation, mask,
                 mask & warp.done);
        }
        current->combine = combine;
        current->operation = operation;
        current->mask = mask;
        current->argument = argument;
        warp.ready &= ~(1u << lane);
        warp.in_warp |= 1u << lane;
        suspend();
    }

    int wait_in_block(int predicate, Place place) {
        WarpState& warp = warps[number() / WARP];
        current->place = place;
        current->predicate = &predicate;
        warp.ready &= ~(1u << number() % WARP);
        warp.in_block |= 1u << number() % WARP;
        suspend();
        return predicate;
    }

    [[noreturn]] void end() {
        WarpState& warp = warps[number() / WARP];
        warp.ready &= ~(1u << number() % WARP);
        warp.done |= 1u << number() % WARP;
        suspend();
        abort();
    }

    void run_blocks(Launch& of) {
        launch = &of;
        order = Order::from_environment();
        variables = thread_local_range();
        const auto blocks = (unsigned long long)of.grid.x * of.grid.y * of.grid.z;
        for (auto i = of.next++; i < blocks; i = of.next++) {
            auto number = i;
            if (order.kind == Order::REVERSE) {
                number = blocks - 1 - i;
            } else if (order.kind == Order::RANDOM) {
                number = of.order[i];
            }
            run_block(number);
        }
    }
};

extern "C" inline void emulate_enter() {
    Worker* worker = here.worker;
    worker->launch->run(worker->launch->data);
    worker->end();
}

inline void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "emulator: ");
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    if (here.worker != nullptr && here.worker->launch != nullptr) {
        const uint3 b = here.block, t = here.thread;
        fprintf(stderr, "\nemulator: in kernel %s, block (%u, %u, %u)", here.worker->launch->name,
                b.x, b.y, b.z);
        if (here.worker->current != nullptr) {
            fprintf(stderr, ", thread (%u, %u, %u)", t.x, t.y, t.z);
        }
    }
    fprintf(stderr, "\n");
    abort();
}

// Workers are reused, because making their stacks takes time. One launch runs at a time.
inline std::mutex launching;
inline std::vector<std::unique_ptr<Worker>> workers;

inline void run_grid(Launch& launch) {
    const auto threads = (unsigned long long)launch.block.x * launch.block.y * launch.block.z;
    const auto blocks = (unsigned long long)launch.grid.x * launch.grid.y * launch.grid.z;
    if (threads == 0 || threads > MOST_THREADS || blocks == 0 || launch.shared > MOST_SHARED) {
        fail("%s: a launch of %llu blocks of %llu threads, %zu bytes of shared memory", launch.name,
             blocks, threads, launch.shared);
    }
    std::lock_guard<std::mutex> lock(launching);
    Order order = Order::from_environment();
    if (order.kind == Order::RANDOM) {
        for (unsigned i = 0; i < blocks; ++i) {
            launch.order.push_back(i);
            std::swap(launch.order[i], launch.order[order.random(i + 1)]);
        }
    }
    const char* text = getenv("EMULATE_THREADS");
    const auto most = text == nullptr ? 1 : std::max(1, atoi(text));
    const unsigned count = unsigned(std::min<unsigned long long>(most, blocks));
    while (workers.size() < count) {
        workers.push_back(std::make_unique<Worker>());
    }
    std::vector<std::thread> others;
    for (unsigned i = 1; i < count; ++i) {
        others.emplace_back([&launch, i] { workers[i]->run_blocks(launch); });
    }
    workers[0]->run_blocks(launch);
    for (auto& other : others) {
        other.join();
    }
}

template <class... P>
struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
    static void run(void* call) {
        auto* self = static_cast<Call*>(call);
        std::apply(self->kernel, self->arguments);
    }
};

// Runs a kernel and returns when it is done: emulate::launch("name", kernel, grid, block,
// shared_bytes, args...).
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
            A... arguments) {
    Call<P...> call{kernel, std::tuple<P...>(static_cast<P>(arguments)...)};
    Launch launch;
    launch.name = name;
    launch.grid = grid;
    launch.block = block;
    launch.shared = shared;
    launch.run = &Call<P...>::run;
    launch.data = &call;
    run_grid(launch);
}
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... arguments) {
    Dl_info info = {};
    dladdr(reinterpret_cast<void*>(kernel), &info);
    launch(info.dli_sname == nullptr ? "?" : info.dli_sname, kernel, grid, block, shared,
           arguments...);
}

}  // namespace emulate
