// The causal convolution token by token: see reference.decode_conv1d and verify_conv1d.
#include "../native.h"

constexpr int64_t CHANNELS = 512;  // whose sums wait for the activation

// `after` may be `before`.
template <class T, int WIDTH>
static void convolve(
    const T* x, const T* weight, const T* bias, const T* before, T* after, T* out, int64_t count,
    bool activated) {
    float totals[CHANNELS];
    for (int64_t c = 0; c < count; c++) {
        const T* past = before + c * (WIDTH - 1);
        const T* taps = weight + c * WIDTH;
        float newest = widen(x[c]), total = 0.0f;
        for (int w = 0; w < WIDTH - 1; w++)
            total = __builtin_fmaf(widen(past[w]), widen(taps[w]), total);
        total = __builtin_fmaf(newest, widen(taps[WIDTH - 1]), total);
        totals[c] = total;
    }
    for (int64_t c = 0; c < count; c++) {
        for (int w = 0; w < WIDTH - 2; w++)
            after[c * (WIDTH - 1) + w] = before[c * (WIDTH - 1) + w + 1];
        after[c * (WIDTH - 1) + WIDTH - 2] = x[c];
    }
    if (bias)
        for (int64_t c = 0; c < count; c++) totals[c] += widen(bias[c]);
    if (activated)
        for (int64_t c = 0; c < count; c++) totals[c] = silu(totals[c]);
    for (int64_t c = 0; c < count; c++) out[c] = narrow<T>(totals[c]);
}

// cu_seqlens: null where every sequence is one token. The window after row r goes to step_slots[r].
template <class T, int WIDTH>
static void decode(
    const T* x, int64_t stride, const T* weight, const T* bias, T* states, int64_t slot_stride,
    const int32_t* slots, const int32_t* step_slots, const int32_t* cu_seqlens, T* out,
    int64_t rows, int64_t sequences, int64_t channels, bool activated, int threads) {
    int64_t blocks = (channels + CHANNELS - 1) / CHANNELS;
#pragma omp parallel for schedule(static) num_threads(threads_for(4 * rows * channels, threads))
    for (int64_t item = 0; item < sequences * blocks; item++) {
        int64_t sequence = item / blocks, first = item % blocks * CHANNELS;
        int64_t count = channels - first < CHANNELS ? channels - first : CHANNELS;
        int64_t row = cu_seqlens ? cu_seqlens[sequence] : sequence;
        int64_t end = cu_seqlens ? cu_seqlens[sequence + 1] : sequence + 1;
        T* windows = states + first * (WIDTH - 1);
        const T* before = windows + slots[sequence] * slot_stride;
        for (; row < end; row++) {
            T* after = windows + step_slots[row] * slot_stride;
            convolve<T, WIDTH>(
                x + row * stride + first, weight + first * WIDTH, bias ? bias + first : nullptr,
                before, after, out + row * channels + first, count, activated);
            before = after;
        }
    }
}

#define CONVOLUTIONS(T, NAME)                                                                  \
    EXPORT void decode_conv1d_##NAME(                                                          \
        const T* x, int64_t stride, const T* weight, const T* bias, T* states,                 \
        int64_t slot_stride, const int32_t* slots, const int32_t* step_slots,                  \
        const int32_t* cu_seqlens, T* out, int64_t rows, int64_t sequences, int64_t channels,  \
        int64_t width, int64_t activated, int threads) {                                       \
        auto* function = width == 2 ? decode<T, 2> : width == 3 ? decode<T, 3> : decode<T, 4>; \
        function(                                                                              \
            x, stride, weight, bias, states, slot_stride, slots, step_slots, cu_seqlens, out,  \
            rows, sequences, channels, activated, threads);                                    \
    }

CONVOLUTIONS(float, float32)
CONVOLUTIONS(BFloat16, bfloat16)
