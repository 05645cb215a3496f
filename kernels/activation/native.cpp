// Gated activations, one row at a time: see reference.py.
#include "../native.h"

template <class T>
static void silu_and_mul(
    const T* x, int64_t stride, T* out, int64_t rows, int64_t half, int threads) {
    for_each(rows, threads_for(2 * rows * half, threads), [&](int64_t row) {
        const T *gate = x + row * stride, *up = gate + half;
        T* to = out + row * half;
        for (int64_t i = 0; i < half; i++) to[i] = narrow<T>(silu(widen(gate[i])) * widen(up[i]));
    });
}

// gate_size: elements of a gate's row, either size or 1.
template <class T>
static void sigmoid_mul(
    const T* x, int64_t stride, const T* gate, int64_t gate_stride, int64_t gate_size, T* out,
    int64_t rows, int64_t size, int threads) {
    for_each(rows, threads_for(2 * rows * size, threads), [&](int64_t row) {
        const T *from = x + row * stride, *open = gate + row * gate_stride;
        T* to = out + row * size;
        if (gate_size == 1) {
            float factor = sigmoid(widen(open[0]));
            for (int64_t i = 0; i < size; i++) to[i] = narrow<T>(widen(from[i]) * factor);
        } else {
            for (int64_t i = 0; i < size; i++)
                to[i] = narrow<T>(widen(from[i]) * sigmoid(widen(open[i])));
        }
    });
}

#define ACTIVATIONS(T, NAME)                                                                  \
    EXPORT void silu_and_mul_##NAME(                                                          \
        const T* x, int64_t stride, T* out, int64_t rows, int64_t half, int threads) {        \
        silu_and_mul(x, stride, out, rows, half, threads);                                    \
    }                                                                                         \
    EXPORT void sigmoid_mul_##NAME(                                                           \
        const T* x, int64_t stride, const T* gate, int64_t gate_stride, int64_t gate_size,    \
        T* out, int64_t rows, int64_t size, int threads) {                                    \
        sigmoid_mul(x, stride, gate, gate_stride, gate_size, out, rows, size, threads);       \
    }

ACTIVATIONS(float, float32)
ACTIVATIONS(BFloat16, bfloat16)
