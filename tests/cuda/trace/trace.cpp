// A profiler that the CUDA driver loads into a program when the program calls cuInit: one line for
// each kernel, copy and memset on the GPU.
//
//   export CUDA_INJECTION64_PATH=/path/to/libbradley_trace.so
//   BRADLEY_TRACE=trace.tsv [BRADLEY_TRACE_SKIP=N] PROGRAM
//
// The fields of a line are separated by tabs: kernel|memcpy|memset, name, start and end in ns,
// stream, grid (3 fields), block (3 fields), bytes of dynamic shared memory, registers per thread,
// bytes, kind of copy. A line that starts with # is a remark. Records are in the order of their
// delivery: sort them by their start. With BRADLEY_TRACE_SKIP=N, records are left out until N
// kernels have been delivered.
#include <cupti.h>
#include <cxxabi.h>
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

constexpr size_t BUFFER = 8 << 20;
// Seconds between two flushes, and seconds that a flush before an unload or at the exit may take.
constexpr int PERIOD = 2, AT_UNLOAD = 10, AT_EXIT = 20;
constexpr const char* COPIES[] = {"?",    "HtoD", "DtoH", "HtoA", "AtoH", "AtoA",
                                  "AtoD", "DtoA", "DtoD", "HtoH", "PtoP"};
using Count = unsigned long long;

// None of these has a destructor: CUPTI's thread may outlive them.
pthread_mutex_t file_lock = PTHREAD_MUTEX_INITIALIZER;
FILE* file;
const char* path;
Count skip;
// Delivered kernels, written copies and memsets, records that CUPTI lost, and buffers that were not
// read to their end.
std::atomic<Count> kernels, others, dropped, cut;
std::atomic<bool> used;  // true once CUPTI has asked for a buffer

// One thread does every flush, so that whoever asks for one can give up on it.
pthread_mutex_t flush_lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t asked = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
Count wanted, finished;  // flushes that were asked for, and those that are done
bool stopped = true;     // true while the thread does not run, and once it is to end

bool check(const char* what, CUptiResult result) {
    if (result == CUPTI_SUCCESS) return true;
    const char* text = nullptr;
    cuptiGetResultString(result, &text);
    fprintf(stderr, "trace: %s: %s (%d)\n", what, text ? text : "unknown error", int(result));
    return false;
}

// Gives CUPTI a buffer of fresh pages. These are zero, as start() has told CUPTI.
void CUPTIAPI requested(uint8_t** buffer, size_t* size, size_t* max_records) {
    void* pages = mmap(nullptr, BUFFER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *buffer = pages == MAP_FAILED ? nullptr : static_cast<uint8_t*>(pages);
    *size = *buffer ? BUFFER : 0;
    *max_records = 0;
    used = true;
}

void write(FILE* to, const CUpti_ActivityKernel10* k) {
    int status = -1;
    const char* name = k->name ? k->name : "?";
    char* readable = strncmp(name, "_Z", 2) == 0
                         ? abi::__cxa_demangle(name, nullptr, nullptr, &status)
                         : nullptr;
    fprintf(to, "kernel\t%s\t%llu\t%llu\t%u\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t0\t-\n",
            readable ? readable : name, Count(k->start), Count(k->end), k->streamId, k->gridX,
            k->gridY, k->gridZ, k->blockX, k->blockY, k->blockZ, k->dynamicSharedMemory,
            int(k->registersPerThread));
    free(readable);
}

template <typename Record>
void write(FILE* to, const char* kind, const Record* r, const char* copy) {
    fprintf(to, "%s\t%s\t%llu\t%llu\t%u\t0\t0\t0\t0\t0\t0\t0\t0\t%llu\t%s\n", kind, kind,
            Count(r->start), Count(r->end), r->streamId, Count(r->bytes), copy);
    others++;
}

void write(FILE* to, const CUpti_Activity* record) {
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL ||
        record->kind == CUPTI_ACTIVITY_KIND_KERNEL) {
        if (kernels++ >= skip) write(to, reinterpret_cast<const CUpti_ActivityKernel10*>(record));
    } else if (kernels >= skip && record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
        auto copy = reinterpret_cast<const CUpti_ActivityMemcpy6*>(record);
        write(to, "memcpy", copy,
              COPIES[copy->copyKind < sizeof COPIES / sizeof *COPIES ? copy->copyKind : 0]);
    } else if (kernels >= skip && record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
        write(to, "memset", reinterpret_cast<const CUpti_ActivityMemset4*>(record), "-");
    }
}

// Writes the records of a full buffer to the file. No lock is held while CUPTI is called.
void CUPTIAPI completed(CUcontext context, uint32_t stream, uint8_t* buffer, size_t size,
                        size_t valid) {
    char* lines = nullptr;
    size_t length = 0, lost = 0;
    FILE* to = open_memstream(&lines, &length);
    CUpti_Activity* record = nullptr;
    CUptiResult result = CUPTI_ERROR_MAX_LIMIT_REACHED;
    while (to && buffer && valid > 0 &&
           (result = cuptiActivityGetNextRecord(buffer, valid, &record)) == CUPTI_SUCCESS)
        write(to, record);
    if (!to || result != CUPTI_ERROR_MAX_LIMIT_REACHED) cut++;
    if (to) fclose(to);
    if (cuptiActivityGetNumDroppedRecords(context, stream, &lost) == CUPTI_SUCCESS) dropped += lost;
    if (buffer) munmap(buffer, size);
    pthread_mutex_lock(&file_lock);
    if (file && lines) {
        fwrite(lines, 1, length, file);
        fflush(file);  // what is there stays there if the program is killed
    }
    pthread_mutex_unlock(&file_lock);
    free(lines);
}

// Returns false if the time is over.
bool wait(pthread_cond_t* condition, const timespec& until) {
    return pthread_cond_clockwait(condition, &flush_lock, CLOCK_MONOTONIC, &until) == 0;
}

timespec in(int seconds) {
    timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += seconds;
    return until;
}

void* flusher(void*) {
    pthread_mutex_lock(&flush_lock);
    while (!stopped || wanted > finished) {
        for (timespec until = in(PERIOD); wanted == finished && wait(&asked, until);) {
        }
        Count goal = wanted;
        bool forced = goal > finished;
        pthread_mutex_unlock(&flush_lock);
        if (forced)
            check("flushing", cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED));
        else if (used)
            cuptiActivityFlushAll(0);
        pthread_mutex_lock(&flush_lock);
        finished = goal;
        pthread_cond_broadcast(&done);
    }
    pthread_mutex_unlock(&flush_lock);
    return nullptr;
}

// Returns true if all records were delivered in time.
bool flush(int seconds, bool last) {
    pthread_mutex_lock(&flush_lock);
    Count goal = stopped ? 0 : ++wanted;
    stopped |= last;
    pthread_cond_signal(&asked);
    for (timespec until = in(seconds); finished < goal && wait(&done, until);) {
    }
    bool in_time = finished >= goal;
    pthread_mutex_unlock(&flush_lock);
    return in_time;
}

// Called before a module or a context is unloaded. Flushes, because a record's name may be in the
// module's memory, and its times need the context.
void CUPTIAPI called(void*, CUpti_CallbackDomain domain, CUpti_CallbackId, const void* data) {
    static std::atomic<bool> stuck;
    if (domain != CUPTI_CB_DOMAIN_DRIVER_API ||
        static_cast<const CUpti_CallbackData*>(data)->callbackSite != CUPTI_API_ENTER)
        return;
    if (!stuck && (stuck = !flush(AT_UNLOAD, false)))
        fprintf(stderr, "trace: the flush before an unload did not end\n");
}

__attribute__((destructor)) void finish() {
    bool in_time = flush(AT_EXIT, true);
    pthread_mutex_lock(&file_lock);
    if (file) {
        char remark[256];
        snprintf(remark, sizeof remark,
                 "%llu kernels, the first %llu left out; %llu copies and memsets; %llu records "
                 "dropped; %llu buffers cut short%s",
                 kernels.load(), skip, others.load(), dropped.load(), cut.load(),
                 in_time ? "" : "; THE LAST FLUSH DID NOT END");
        fprintf(file, "# %s\n", remark);
        bool failed = ferror(file);
        if (fclose(file)) failed = true;
        file = nullptr;
        fprintf(stderr, "trace: %s: %s%s\n", path, remark, failed ? "; NOT ALL IS WRITTEN" : "");
    }
    pthread_mutex_unlock(&file_lock);
}

void start() {
    const char* first = getenv("BRADLEY_TRACE_SKIP");
    skip = first ? strtoull(first, nullptr, 10) : 0;
    const char* named = getenv("BRADLEY_TRACE");
    path = strdup(named ? named : "");
    if (!(file = fopen(path, "w"))) return perror("trace: opening the file of BRADLEY_TRACE");
    uint32_t version = 0;
    if (!check("asking for CUPTI's version", cuptiGetVersion(&version))) return;
    CUpti_SubscriberHandle subscriber = nullptr;
    bool clean = check("subscribing", cuptiSubscribe(&subscriber, called, nullptr));
    for (auto id : {CUPTI_DRIVER_TRACE_CBID_cuModuleUnload, CUPTI_DRIVER_TRACE_CBID_cuLibraryUnload,
                    CUPTI_DRIVER_TRACE_CBID_cuDevicePrimaryCtxRelease_v2})
        if (subscriber)
            clean &= check("watching unloads",
                           cuptiEnableCallback(1, subscriber, CUPTI_CB_DOMAIN_DRIVER_API, id));
    uint8_t zeroed = 1;
    size_t size = sizeof zeroed;
    clean &= check(
        "giving zeroed buffers",
        cuptiActivitySetAttribute(CUPTI_ACTIVITY_ATTR_ZEROED_OUT_ACTIVITY_BUFFER, &size, &zeroed));
    if (!check("registering buffers", cuptiActivityRegisterCallbacks(requested, completed))) return;
    if (!check("tracing kernels", cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL)))
        return;
    clean &= check("tracing copies", cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY));
    clean &= check("tracing memsets", cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET));
    stopped = false;
    pthread_t thread;
    if (pthread_create(&thread, nullptr, flusher, nullptr) == 0)
        pthread_detach(thread);
    else
        clean = !(stopped = true);
    atexit(finish);
    fprintf(stderr, "trace: to %s; CUPTI %u, built for %d%s\n", path, version, CUPTI_API_VERSION,
            clean ? "" : "; NOT ALL IS TRACED");
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjection(void) {
    static std::atomic<bool> started;
    if (!started.exchange(true)) start();
    return 1;
}
