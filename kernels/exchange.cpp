// Exchange of data between processes of one machine through shared memory: see exchange.py.
//
// An exchange is one round: every process writes its part into its buffer, publishes the round, and
// reads the other parts when they are published. Each process has two buffers. To write round n it has
// read n - 1, which was published after reading n - 2, so no process reads the buffer being written.
#include "native.h"

#if defined(__unix__) || defined(__APPLE__)

#include <poll.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr int64_t SLEEP_NS = 10000000;
// Interval after which a sleeping process checks for ended processes.
constexpr int64_t BLOCK = 1024;
// Elements added at a time.
enum Failure : int64_t { NONE, LATE, GONE };

struct Post {
    std::atomic<uint32_t> published, sleepers;
    char apart[120];
};
static_assert(sizeof(Post) == 128, "as exchange.py has it");

struct Exchange {
    char* memory;
    pollfd* lines;
    int64_t num_lines, number, count, capacity, spin_ns, timeout_ns;
    // Results: the failure and its rank, exchanges, bytes sent, time in all exchanges.
    int64_t failure, whose, rounds, bytes, total_ns;
    // Published rounds.
    int64_t round;

    Post& post(int64_t rank) const { return ((Post*)memory)[rank]; }
    char* buffer(int64_t rank) const {
        return memory + count * sizeof(Post) + (2 * rank + (round & 1)) * capacity;
    }
};

static int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000 + time.tv_nsec;
}

static inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

static void sleep_while(std::atomic<uint32_t>& word, uint32_t seen) {
#ifdef __linux__
    timespec time = {0, SLEEP_NS};
    syscall(SYS_futex, &word, FUTEX_WAIT, seen, &time, nullptr, 0);
#else
    timespec time = {0, 50000};
    if (word.load() == seen) nanosleep(&time, nullptr);
#endif
}

static void wake(std::atomic<uint32_t>& word) {
#ifdef __linux__
    syscall(SYS_futex, &word, FUTEX_WAKE, 1 << 20, nullptr, nullptr, 0);
#endif
}

static bool fails(Exchange& e, Failure failure, int64_t whose) {
    e.failure = failure;
    e.whose = whose;
    return false;
}

// Waits for a rank. Returns true if it has published this round.
static bool waits(Exchange& e, int64_t rank) {
    Post& post = e.post(rank);
    auto is_there = [&] {
        return int32_t(post.published.load(std::memory_order_acquire) - uint32_t(e.round)) >= 0;
    };
    if (is_there()) return true;
    int64_t began = now();
    do {
        for (int i = 0; i < 64; i++) {
            pause_briefly();
            if (is_there()) return true;
        }
    } while (now() - began < e.spin_ns);
    for (;;) {
        post.sleepers++;
        uint32_t seen = post.published.load();
        if (int32_t(seen - uint32_t(e.round)) < 0) sleep_while(post.published, seen);
        post.sleepers--;
        if (is_there()) return true;
        if (poll(e.lines, e.num_lines, 0) > 0)
            for (int64_t i = 0; i < e.num_lines; i++)
                if (e.lines[i].revents && !is_there()) return fails(e, GONE, rank);
        if (now() - began > e.timeout_ns && !is_there()) return fails(e, LATE, rank);
    }
}

// Calls give(buffer), then take(rank, buffer) for every other rank in order, after all have given.
template <class Give, class Take>
static bool exchange(Exchange& e, int64_t bytes, Give give, Take take) {
    if (e.failure) return false;
    int64_t began = now();
    e.round++;
    e.rounds++;
    e.bytes += bytes;
    give(e.buffer(e.number));
    Post& own = e.post(e.number);
    own.published.store(uint32_t(e.round));
    if (own.sleepers.load()) wake(own.published);
    for (int64_t rank = 0; rank < e.count; rank++)
        if (rank != e.number && !waits(e, rank)) return false;
    take();
    e.total_ns += now() - began;
    return true;
}

template <class T>
static void sum(Exchange& e, const T* x, T* out, int64_t size, int threads) {
    int64_t most = e.capacity / sizeof(T);
    for (int64_t first = 0; first < size; first += most) {
        int64_t count = std::min(most, size - first), bytes = count * sizeof(T);
        auto give = [&](char* buffer) { memcpy(buffer, x + first, bytes); };
        auto take = [&] {
            int64_t blocks = (count + BLOCK - 1) / BLOCK;
            for_each(blocks, threads_for(count, threads), [&](int64_t item) {
                int64_t block = item * BLOCK;
                int64_t length = std::min(BLOCK, count - block);
                float total[BLOCK];
                for (int64_t rank = 0; rank < e.count; rank++) {
                    const T* part = (const T*)e.buffer(rank) + block;
                    if (rank == 0)
                        for (int64_t i = 0; i < length; i++) total[i] = widen(part[i]);
                    else
                        for (int64_t i = 0; i < length; i++) total[i] += widen(part[i]);
                }
                T* to = out + first + block;
                for (int64_t i = 0; i < length; i++) to[i] = narrow<T>(total[i]);
            });
        };
        if (!exchange(e, bytes, give, take)) return;
    }
}

EXPORT void exchange_sum_float32(
    Exchange* e, const float* x, float* out, int64_t size, int threads) {
    sum(*e, x, out, size, threads);
}

EXPORT void exchange_sum_bfloat16(
    Exchange* e, const BFloat16* x, BFloat16* out, int64_t size, int threads) {
    sum(*e, x, out, size, threads);
}

// Joins x [rows, own columns] of all ranks into out [rows, columns]; rank r has the columns from
// r * columns / count on. Rows are exchanged with the width of the widest part.
EXPORT void exchange_join(
    Exchange* e, const char* x, char* out, int64_t rows, int64_t columns, int64_t item) {
    auto start = [&](int64_t rank) { return rank * columns / e->count * item; };
    int64_t wide = (columns + e->count - 1) / e->count * item;
    for (int64_t first = 0, end = rows * wide; first < end; first += e->capacity) {
        int64_t last = std::min(end, first + e->capacity);
        // copy(position in the buffer, row, position in the part's row, bytes)
        auto each = [&](int64_t rank, auto copy) {
            int64_t width = start(rank + 1) - start(rank);
            for (int64_t row = first / wide; row * wide < last; row++) {
                int64_t from = std::max(first, row * wide);
                int64_t to = std::min(last, row * wide + width);
                if (from < to) copy(from - first, row, from - row * wide, to - from);
            }
        };
        auto give = [&](char* buffer) {
            int64_t width = start(e->number + 1) - start(e->number);
            each(e->number, [&](int64_t at, int64_t row, int64_t in_row, int64_t bytes) {
                memcpy(buffer + at, x + row * width + in_row, bytes);
            });
        };
        auto take = [&] {
            for (int64_t rank = 0; rank < e->count; rank++)
                each(rank, [&](int64_t at, int64_t row, int64_t in_row, int64_t bytes) {
                    char* to = out + row * columns * item + start(rank) + in_row;
                    memcpy(to, e->buffer(rank) + at, bytes);
                });
        };
        if (!exchange(*e, last - first, give, take)) return;
    }
}

#endif
