// Helpers of the tests of the emulator: conditions, and code that must abort with a report.
#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <string>

static int failures = 0;
#define CHECK(condition)                                                        \
    do {                                                                        \
        if (!(condition)) {                                                     \
            fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #condition); \
            failures += 1;                                                      \
        }                                                                       \
    } while (false)

// Returns true if `run` aborts with a report that contains `text`.
template <class F>
static bool aborts_with(const char* text, F run) {
    int ends[2];
    if (pipe(ends) != 0) {
        return false;
    }
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        run();
        _exit(0);
    }
    close(ends[1]);
    std::string report;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) {
        report.append(buffer, size_t(n));
    }
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    const bool good = WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT &&
                      report.find(text) != std::string::npos;
    if (!good) {
        fprintf(stderr, "expected \"%s\", got status %d: %s\n", text, status, report.c_str());
    }
    return good;
}
