// One token of the causal convolution: see reference.decode_conv1d.
#include "../native.h"

constexpr int64_t CHANNELS = 512;  // whose sums wait for the activation

template <class T, int WIDTH>
static void convolve(
    const T* __restrict x, const T* __restrict weight, const T* bias, T* __restrict window,
    T* __restrict out, int64_t channels, bool activated) {
    for (int64_t begin = 0; begin < channels; begin += CHANNELS) {
        int64_t count = channels - begin < CHANNELS ? channels - begin : CHANNELS;
        float totals[CHANNELS];
        for (int64_t i = 0; i < count; i++) {
            int64_t c = begin + i;
            const T* past = window + c * (WIDTH - 1);
            const T* taps = weight + c * WIDTH;
            float newest = widen(x[c]), total = 0.0f;
            for (int w = 0; w < WIDTH - 1; w++)
                total = __builtin_fmaf(widen(past[w]), widen(taps[w]), total);
            total = __builtin_fmaf(newest, widen(taps[WIDTH - 1]), total);
            totals[i] = total;
        }
        for (int64_t i = 0; i < count; i++) {
            T* past = window + (begin + i) * (WIDTH - 1);
            for (int w = 0; w < WIDTH - 2; w++) past[w] = past[w + 1];
            past[WIDTH - 2] = x[begin + i];
        }
        if (bias)
            for (int64_t i = 0; i < count; i++) totals[i] += widen(bias[begin + i]);
        if (activated)
            for (int64_t i = 0; i < count; i++) totals[i] = silu(totals[i]);
        for (int64_t i = 0; i < count; i++) out[begin + i] = narrow<T>(totals[i]);
    }
}

template <class T>
static void decode(
    const T* x, int64_t stride, const T* weight, const T* bias, T* states, int64_t slot_stride,
    const int32_t* slots, T* out, int64_t rows, int64_t channels, int64_t width, int64_t activated, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(4 * rows * channels, threads))
    for (int64_t row = 0; row < rows; row++) {
        const T* from = x + row * stride;
        T* window = states + slots[row] * slot_stride;
        T* to = out + row * channels;
        if (width == 2) convolve<T, 2>(from, weight, bias, window, to, channels, activated);
        if (width == 3) convolve<T, 3>(from, weight, bias, window, to, channels, activated);
        if (width == 4) convolve<T, 4>(from, weight, bias, window, to, channels, activated);
    }
}

#define CONVOLUTIONS(T, NAME)                                                                 \
    EXPORT void decode_conv1d_##NAME(                                                         \
        const T* x, int64_t stride, const T* weight, const T* bias, T* states,                \
        int64_t slot_stride, const int32_t* slots, T* out, int64_t rows, int64_t channels,    \
        int64_t width, int64_t activated, int threads) {                                      \
        decode(                                                                               \
            x, stride, weight, bias, states, slot_stride, slots, out, rows, channels, width,  \
            activated, threads);                                                              \
    }

CONVOLUTIONS(float, float32)
CONVOLUTIONS(BFloat16, bfloat16)
