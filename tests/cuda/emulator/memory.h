// Device memory of the emulator. It is filled with NaN when it is allocated and when it is freed.
// Guard zones around every allocation are checked after every kernel and when it is released.
// EMULATE_MEMORY limits the bytes of a device. Memory that is mapped (EMULATE_MAPPING=1) has no
// guard zones, but addresses that are not mapped cannot be accessed. With EMULATE_DEVICES=n there
// are n devices, and a thread finds only the memory of the device whose context it has.
#pragma once

#include "scheduler.h"

#include <sys/mman.h>

#include <map>

namespace emulate {

constexpr size_t ALIGNMENT = 256;
constexpr size_t DEFAULT_MEMORY = size_t(4) << 30;
constexpr int MOST_DEVICES = 8;

inline int device_count() {
    const char* text = getenv("EMULATE_DEVICES");
    return text == nullptr ? 1 : std::min(std::max(atoi(text), 0), MOST_DEVICES);
}
// Returns the device of the calling thread's context. The emulated driver replaces this function.
inline int (*current_device)() = [] { return 0; };

class Memory {
  public:
    static size_t limit() {
        const char* text = getenv("EMULATE_MEMORY");
        return text == nullptr ? DEFAULT_MEMORY : strtoull(text, nullptr, 10);
    }
    size_t used() {
        std::lock_guard<std::mutex> lock(mutex_);
        return used_[current_device()];
    }

    // Returns null if the allocation would exceed the limit.
    void* allocate(size_t bytes) {
        std::lock_guard<std::mutex> lock(mutex_);
        const size_t whole = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        const int device = current_device();
        if (whole < bytes || used_[device] + whole > limit()) {
            return nullptr;
        }
        auto* start = static_cast<unsigned char*>(aligned_alloc(ALIGNMENT, whole + 2 * GUARD));
        if (start == nullptr) {
            return nullptr;
        }
        unsigned char* data = start + GUARD;
        memset(start, GUARD_BYTE, GUARD);
        memset(data, POISON, bytes);
        memset(data + bytes, GUARD_BYTE, whole - bytes + GUARD);
        used_[device] += whole;
        live_[reinterpret_cast<size_t>(data)] = Piece{bytes, device};
        return data;
    }

    // Returns false if `pointer` is not the start of live memory.
    bool release(void* pointer) {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto found = live_.find(reinterpret_cast<size_t>(pointer));
        if (found == live_.end()) {
            return false;
        }
        const auto [bytes, device] = found->second;
        check_one(found->first, bytes);
        const size_t whole = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        auto* start = static_cast<unsigned char*>(pointer) - GUARD;
        memset(start, POISON, whole + 2 * GUARD);
        free(start);
        used_[device] -= whole;
        live_.erase(found);
        return true;
    }

    // Counts memory of a device that will be mapped. Returns false if it would exceed the limit.
    bool create(size_t bytes, int device) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (used_[device] + bytes > limit()) {
            return false;
        }
        used_[device] += bytes;
        return true;
    }
    void destroy(size_t bytes, int device) {
        std::lock_guard<std::mutex> lock(mutex_);
        used_[device] -= bytes;
    }
    // Maps memory to reserved addresses. Returns false if memory is mapped at `pointer` already.
    bool map(void* pointer, size_t bytes, int device) {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto start = reinterpret_cast<size_t>(pointer);
        if (!mapped_.emplace(start, Piece{bytes, device}).second ||
            mprotect(pointer, bytes, PROT_READ | PROT_WRITE) != 0) {
            return false;
        }
        memset(pointer, POISON, bytes);
        return true;
    }
    bool unmap(void* pointer, size_t bytes) {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto found = mapped_.find(reinterpret_cast<size_t>(pointer));
        if (found == mapped_.end() || found->second.bytes != bytes) {
            return false;
        }
        mapped_.erase(found);
        return madvise(pointer, bytes, MADV_DONTNEED) == 0 &&
               mprotect(pointer, bytes, PROT_NONE) == 0;
    }

    // Returns true if [pointer, pointer + bytes) lies in one live allocation of the current device,
    // or is mapped there.
    bool contains(const void* pointer, size_t bytes) {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto address = reinterpret_cast<size_t>(pointer);
        if (is_mapped(address, bytes)) {
            return true;
        }
        auto after = live_.upper_bound(address);
        if (after == live_.begin()) {
            return false;
        }
        const auto& [start, piece] = *--after;
        return piece.device == current_device() && address - start <= piece.bytes &&
               bytes <= piece.bytes - (address - start);
    }

    // Aborts with a report if a guard zone is damaged. It is called after every kernel and
    // GEMM, with its name.
    void check_after(const char* operation) {
        std::lock_guard<std::mutex> lock(mutex_);
        recent_[count_++ % RECENT] = operation;
        for (const auto& [start, piece] : live_) {
            check_one(start, piece.bytes);
        }
    }

  private:
    static constexpr size_t RECENT = 8;
    struct Piece {
        size_t bytes;
        int device;
    };

    bool is_mapped(size_t address, size_t bytes) const {
        const size_t end = address + bytes;
        for (auto piece = mapped_.upper_bound(address); piece != mapped_.begin();) {
            const auto& [start, of] = *--piece;
            if (of.device != current_device() || address < start || address >= start + of.bytes) {
                return false;
            }
            // The rest must lie in the piece that starts where this one ends.
            address = start + of.bytes;
            if (address >= end) {
                return true;
            }
            piece = mapped_.upper_bound(address);
        }
        return false;
    }

    void check_one(size_t start, size_t bytes) {
        const auto* data = reinterpret_cast<const unsigned char*>(start);
        const size_t behind = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT - bytes + GUARD;
        for (size_t i = 0; i < GUARD; ++i) {
            if (data[-1 - long(i)] != GUARD_BYTE) {
                report(bytes, "before the start", i + 1);
            }
        }
        for (size_t i = 0; i < behind; ++i) {
            if (data[bytes + i] != GUARD_BYTE) {
                report(bytes, "past the end", i);
            }
        }
    }
    [[noreturn]] void report(size_t bytes, const char* where, size_t distance) {
        std::string names;
        for (size_t i = count_ > RECENT ? count_ - RECENT : 0; i < count_; ++i) {
            names += " " + recent_[i % RECENT];
        }
        fail("device memory of %zu bytes was written to %zu bytes %s; last operations:%s", bytes,
             distance, where, names.c_str());
    }

    std::mutex mutex_;
    std::map<size_t, Piece> live_;  // by start
    std::map<size_t, Piece> mapped_;
    size_t used_[MOST_DEVICES] = {};
    std::string recent_[RECENT];
    size_t count_ = 0;
};

inline Memory& memory() {
    static Memory all;
    return all;
}

}  // namespace emulate
