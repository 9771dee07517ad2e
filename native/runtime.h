// How a kernel uses several threads: torch's own OpenMP pool, entered through the function pointer of its libgomp, so
// that no second pool spins against it. Work is cut into tasks by shape alone, never by the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <thread>

namespace sensorium {

// GOMP_parallel(function, argument, threads, flags)
using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
struct Kernels;
struct Team;

struct Runtime {
    int threads;
    Fork fork;  // null: everything runs on the calling thread
    const Kernels* kernels;
    Team* team;  // the threads that are inside this call already, or null
};

constexpr int kMaxWorkers = 64;

// How far ahead a row or two ask for their weights' lines. A Zen 5 reads half as much again when it is far. A Zen 4
// halves its speed by that: it finds the one stream by itself, and goes faster through it when a unit's lines are asked
// for together.
extern const int64_t kFewRowsAhead;

static inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Threads that stay together for one call from Python and work through its loops, one after the other. A loop is over
// when its tasks are done, not when every thread has come by: on a busy machine a thread may not be running at all.
struct Team {
    // Epoch, end and next task of one worker's range in one word: whoever gets a task number below the end by adding
    // one has claimed it in just that loop, which cannot end before the task is done.
    struct alignas(64) Range {
        std::atomic<uint64_t> word{0};
        int64_t start = 0;
    };
    static constexpr int kBits = 22;
    static constexpr uint64_t kMask = (uint64_t(1) << kBits) - 1;
    static constexpr int64_t kMaxTasks = int64_t(kMask) - 2 * kMaxWorkers;  // of one range

    explicit Team(int workers) : workers(workers) {}

    int workers;
    void (*run)(const void* body, int64_t task) = nullptr;
    const void* body = nullptr;
    uint64_t loops = 0;
    Range ranges[kMaxWorkers];
    alignas(64) std::atomic<uint64_t> epoch{0};
    alignas(64) std::atomic<int64_t> remaining{0};
    alignas(64) std::atomic<bool> over{false};
    std::atomic<int> tickets{0};

    void work(int me) {
        // One's own contiguous range first (sequential reads), then those of the others.
        for (int i = 0; i < workers; ++i) {
            Range& range = ranges[(me + i) % workers];
            for (;;) {
                uint64_t word = range.word.load(std::memory_order_relaxed);
                if ((word & kMask) >= ((word >> kBits) & kMask)) break;
                word = range.word.fetch_add(1, std::memory_order_acq_rel);
                if ((word & kMask) >= ((word >> kBits) & kMask)) break;
                run(body, range.start + int64_t(word & kMask));
                remaining.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    void loop(int64_t count, void (*function)(const void*, int64_t), const void* argument) {
        run = function, body = argument;
        remaining.store(count, std::memory_order_relaxed);
        ++loops;
        for (int i = 0; i < workers; ++i) {
            const int64_t start = count * i / workers, end = count * (i + 1) / workers;
            ranges[i].start = start;
            ranges[i].word.store((loops << (2 * kBits)) | (uint64_t(end - start) << kBits), std::memory_order_release);
        }
        epoch.store(loops, std::memory_order_release);
        work(0);
        for (int spins = 0; remaining.load(std::memory_order_acquire) > 0; ++spins) {
            if (spins < kSpins)
                relax();
            else
                std::this_thread::yield();
        }
    }

    void serve(int me) {
        for (uint64_t seen = 0;;) {
            int spins = 0;
            uint64_t now;
            while ((now = epoch.load(std::memory_order_acquire)) == seen) {
                if (over.load(std::memory_order_acquire)) return;
                if (++spins < kSpins)
                    relax();
                else
                    std::this_thread::yield();
            }
            seen = now;
            work(me);
        }
    }

    static constexpr int kSpins = 2000;  // some 40 microseconds
};

// Calls master(runtime) with a team behind it when `wanted`, alone otherwise. Inside a team it just calls.
template <class Master>
void with_team(const Runtime& runtime, bool wanted, const Master& master) {
    const int workers = std::min(runtime.threads, kMaxWorkers);
    if (runtime.team || !wanted || workers <= 1 || !runtime.fork) {
        master(runtime);
        return;
    }
    struct Call {
        Team team;
        Runtime runtime;
        const Master& master;
        std::thread::id caller;
        static void run(void* argument) {
            Call& call = *static_cast<Call*>(argument);
            if (std::this_thread::get_id() == call.caller) {
                call.master(call.runtime);
                call.team.over.store(true, std::memory_order_release);
            } else {
                call.team.serve(1 + call.team.tickets.fetch_add(1, std::memory_order_relaxed));
            }
        }
    } call{Team(workers), runtime, master, std::this_thread::get_id()};
    call.runtime.team = &call.team;
    runtime.fork(&Call::run, &call, unsigned(workers), 0);
}

// Calls body(0) ... body(count - 1), in any order, on the team's threads or, without one, in order on this thread.
template <class Body>
void parallel_for(const Runtime& runtime, int64_t count, const Body& body) {
    if (!runtime.team || count <= 1) {
        for (int64_t task = 0; task < count; ++task) body(task);
        return;
    }
    const auto run = [](const void* body, int64_t task) { (*static_cast<const Body*>(body))(task); };
    for (int64_t first = 0; first < count; first += Team::kMaxTasks) {
        const auto shifted = [&](int64_t task) { body(first + task); };
        if (first == 0 && count <= Team::kMaxTasks)
            runtime.team->loop(count, run, &body);
        else
            runtime.team->loop(
                std::min(Team::kMaxTasks, count - first),
                [](const void* body, int64_t task) { (*static_cast<const decltype(shifted)*>(body))(task); }, &shifted);
    }
}

// The same for `count` cheap items of `bytes` each: several items to a task, and one thread below ~64 KB in all.
template <class Body>
void parallel_rows(const Runtime& runtime, int64_t count, int64_t bytes, const Body& body) {
    constexpr int64_t kTaskBytes = 32 << 10;
    const int64_t rows = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, bytes));
    if (count * bytes <= 2 * kTaskBytes) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    with_team(runtime, true, [&](const Runtime& team) {
        parallel_for(team, (count + rows - 1) / rows, [&](int64_t task) {
            const int64_t last = std::min(count, (task + 1) * rows);
            for (int64_t i = task * rows; i < last; ++i) body(i);
        });
    });
}

// The buffers that a thread keeps between calls. Code that runs while another buffer is in use takes a different one.
enum class Buffer {
    kActivations,     // x of a product, packed or quantised
    kProducts,        // a panel's sums before they are stored
    kWeightPiece,     // a piece of a panel, packed or expanded while it is multiplied
    kRecords,         // records of a panel, made of a file's blocks
    kGateUp,          // the gate and up products of few rows
    kCodes,           // int8 or int4 codes before they go to their place in a panel or a tile
    kFloatRow,        // a weight row in fp32 that is being quantised
    kRowScales,       // and its int4 scales
    kGroupLanes,      // sixteen groups of that row, side by side
    kAttentionTile,   // packed queries, keys, values and scores of one tile
    kAttentionParts,  // running sums of all parts of split tiles
    kAttentionState,  // running sums of a tile that is not split
    kDecoderStates,   // hidden states between the operations of decoder layers
    kExpertStates,    // some experts' tokens, and what becomes of them
    kExpertSums,      // what all experts of a layer give its tokens
    kRouting,         // a router's logits, and what is chosen
    kDrawWeights,     // a row's weights when its token is drawn
    kGrammarMask,     // the tokens that a grammar allows
    kDrawSums,        // and their sums up to the end of each chunk
    kStateRows,       // taps of a convolution, or unit queries and keys
    kStateColumns,    // of a head's memory
    kShared,          // what a routed layer's shared expert gives
};

// Memory that a thread keeps between calls, one piece for each buffer.
template <Buffer>
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
