// The order in which lanes, warps and blocks run: EMULATE_ORDER=forward|reverse|random:SEED.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulate {

// Reports what went wrong, and where, and aborts.
[[noreturn]] inline void fail(const char* format, ...);

struct Order {
    enum Kind { FORWARD, REVERSE, RANDOM } kind = FORWARD;
    uint64_t seed = 0;

    static Order from_environment() {
        const char* text = getenv("EMULATE_ORDER");
        Order order;
        if (text == nullptr || strcmp(text, "forward") == 0) {
            return order;
        }
        if (strcmp(text, "reverse") == 0) {
            order.kind = REVERSE;
        } else if (strncmp(text, "random:", 7) == 0) {
            order.kind = RANDOM;
            order.seed = strtoull(text + 7, nullptr, 10);
        } else {
            fail("EMULATE_ORDER=%s is not forward, reverse or random:SEED", text);
        }
        return order;
    }
    // splitmix64
    unsigned random(unsigned below) {
        seed += 0x9E3779B97F4A7C15ull;
        uint64_t z = seed;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return unsigned(((z ^ (z >> 31)) >> 32) % below);
    }
    // Returns the next member of a non-empty set, given as bits.
    unsigned choose(unsigned set) {
        if (kind == FORWARD) {
            return __builtin_ctz(set);
        }
        if (kind == REVERSE) {
            return 31 - __builtin_clz(set);
        }
        for (unsigned skip = random(__builtin_popcount(set)); skip > 0; --skip) {
            set &= set - 1;
        }
        return __builtin_ctz(set);
    }
};

}  // namespace emulate
