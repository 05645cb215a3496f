// Makes recorded calls one after the other: see recording.py.
#include "native.h"

#include <utility>

// The calling convention passes integers and addresses in one sequence of places and floats in
// another, in any mixed order. A function with fewer arguments reads the first ones.
#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))

constexpr size_t WORDS = 24;

struct Call {
    void (*function)();
    int64_t words[WORDS];
    float floats[4];
};

template <size_t... W>
static void make(const Call& call, std::index_sequence<W...>) {
    typedef void (*Function)(decltype(int64_t(W))..., float, float, float, float);
    const float* f = call.floats;
    ((Function)call.function)(call.words[W]..., f[0], f[1], f[2], f[3]);
}

EXPORT void make_calls(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) make(calls[i], std::make_index_sequence<WORDS>());
}

#endif
