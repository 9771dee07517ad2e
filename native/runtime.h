// How a kernel uses several threads: torch's own OpenMP pool, entered through the function pointer of its libgomp, so
// that no second pool spins against it. Work is cut into tasks by shape alone, never by the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace sensorium {

// GOMP_parallel(function, argument, threads, flags)
using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
struct Kernels;

struct Runtime {
    int threads;
    Fork fork;  // null: everything runs on the calling thread
    const Kernels* kernels;
};

constexpr int kMaxWorkers = 64;

template <class Body>
struct Tasks {
    struct alignas(64) Range {
        std::atomic<int64_t> next;
        int64_t end;
    };
    const Body* body;
    int workers;
    std::atomic<int> tickets{0};
    Range ranges[kMaxWorkers];

    // Each worker walks its own contiguous range first (sequential reads), then helps the others.
    static void run(void* argument) {
        Tasks& self = *static_cast<Tasks*>(argument);
        const int me = self.tickets.fetch_add(1, std::memory_order_relaxed);
        for (int i = 0; i < self.workers; ++i) {
            Range& range = self.ranges[(me + i) % self.workers];
            for (;;) {
                const int64_t task = range.next.fetch_add(1, std::memory_order_relaxed);
                if (task >= range.end) break;
                (*self.body)(task);
            }
        }
    }
};

// Calls body(0) ... body(count - 1), in any order, on up to runtime.threads threads.
template <class Body>
void parallel_for(const Runtime& runtime, int64_t count, const Body& body) {
    const int workers = int(std::min<int64_t>({int64_t(runtime.threads), count, int64_t(kMaxWorkers)}));
    if (workers <= 1 || !runtime.fork) {
        for (int64_t task = 0; task < count; ++task) body(task);
        return;
    }
    Tasks<Body> tasks;
    tasks.body = &body;
    tasks.workers = workers;
    for (int i = 0; i < workers; ++i) {
        tasks.ranges[i].next.store(count * i / workers, std::memory_order_relaxed);
        tasks.ranges[i].end = count * (i + 1) / workers;
    }
    runtime.fork(&Tasks<Body>::run, &tasks, unsigned(workers), 0);
}

// The same for `count` cheap items of `bytes` each: several items to a task, and no fork below ~64 KB in all.
template <class Body>
void parallel_rows(const Runtime& runtime, int64_t count, int64_t bytes, const Body& body) {
    constexpr int64_t kTaskBytes = 32 << 10;
    const int64_t rows = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, bytes));
    if (count * bytes <= 2 * kTaskBytes) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    parallel_for(runtime, (count + rows - 1) / rows, [&](int64_t task) {
        const int64_t last = std::min(count, (task + 1) * rows);
        for (int64_t i = task * rows; i < last; ++i) body(i);
    });
}

// Memory that a thread keeps between calls. One buffer per Tag: nested users take different tags.
template <int Tag>
struct Scratch {
    void* memory = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(memory); }
    static void* get(size_t bytes) {
        static thread_local Scratch self;
        if (bytes > self.size) {
            std::free(self.memory);
            self.size = (bytes + (bytes >> 2) + 4095) & ~size_t(4095);
            self.memory = std::aligned_alloc(4096, self.size);
            if (!self.memory) std::abort();
        }
        return self.memory;
    }
};

}  // namespace sensorium
