// Causal convolution token by token: see reference. Tokens of a prompt have the same bits as decoded
// tokens.
#include "../native.h"

constexpr int64_t CHANNELS = 512;  // channels summed before the activation

template <class T>
static void finish(float* totals, const T* bias, T* out, int64_t count, bool activated) {
    if (bias)
        for (int64_t c = 0; c < count; c++) totals[c] += widen(bias[c]);
    if (activated)
        for (int64_t c = 0; c < count; c++) totals[c] = silu(totals[c]);
    for (int64_t c = 0; c < count; c++) out[c] = narrow<T>(totals[c]);
}

// `after` may alias `before`.
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
    finish(totals, bias, out, count, activated);
}

// cu_seqlens: null if every sequence has one token. The window after row r goes to step_slots[r].
template <class T, int WIDTH>
static void decode(
    const T* x, int64_t stride, const T* weight, const T* bias, T* states, int64_t slot_stride,
    const int32_t* slots, const int32_t* step_slots, const int32_t* cu_seqlens, T* out,
    int64_t rows, int64_t sequences, int64_t channels, bool activated, int threads) {
    int64_t blocks = (channels + CHANNELS - 1) / CHANNELS;
    for_each(sequences * blocks, threads_for(4 * rows * channels, threads), [&](int64_t item) {
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
    });
}

// Some channels of one sequence, from the window `before`. The windows after `ends` tokens, and
// after the last one, go to `slots`.
template <class T, int WIDTH>
static void convolve_all(
    const T* x, int64_t stride, const T* weight, const T* bias, const T* before, int64_t tokens,
    T* windows, int64_t slot_stride, const int32_t* ends, const int32_t* slots, int64_t exports,
    int64_t own_slot, T* out, int64_t channels, int64_t count, bool activated) {
    float taps[WIDTH][CHANNELS], inputs[WIDTH][CHANNELS], totals[CHANNELS];
    for (int64_t c = 0; c < count; c++)
        for (int w = 0; w < WIDTH; w++) {
            taps[w][c] = widen(weight[c * WIDTH + w]);
            if (w < WIDTH - 1) inputs[w][c] = before ? widen(before[c * (WIDTH - 1) + w]) : 0.0f;
        }
    auto save = [&](int64_t end, int64_t slot) {
        T* to = windows + slot * slot_stride;
        for (int64_t c = 0; c < count; c++)
            for (int w = 0; w < WIDTH - 1; w++)
                to[c * (WIDTH - 1) + w] = narrow<T>(inputs[(end + w) % WIDTH][c]);
    };
    for (int64_t t = 0; t < tokens; t++) {
        float* newest = inputs[(t + WIDTH - 1) % WIDTH];
        for (int64_t c = 0; c < count; c++) newest[c] = widen(x[t * stride + c]);
        for (int64_t c = 0; c < count; c++) totals[c] = 0.0f;
        for (int w = 0; w < WIDTH; w++) {
            const float* input = inputs[(t + w) % WIDTH];
            for (int64_t c = 0; c < count; c++)
                totals[c] = __builtin_fmaf(input[c], taps[w][c], totals[c]);
        }
        finish(totals, bias, out + t * channels, count, activated);
        for (; exports && *ends == t + 1; exports--, ends++, slots++) save(t + 1, *slots);
    }
    save(tokens, own_slot);
}

// The slot of a sequence without tokens is not changed.
template <class T, int WIDTH>
static void prefill(
    const T* x, int64_t stride, const T* weight, const T* bias, T* states, int64_t slot_stride,
    const int32_t* slots, const bool* resumed, const int32_t* cu_seqlens, const int32_t* ends,
    const int32_t* export_slots, const int32_t* cu_exports, T* out, int64_t sequences,
    int64_t channels, bool activated, int threads) {
    int64_t blocks = (channels + CHANNELS - 1) / CHANNELS;
    int64_t cycles = 4 * cu_seqlens[sequences] * channels;
    for_each(sequences * blocks, threads_for(cycles, threads), [&](int64_t item) {
        int64_t sequence = item / blocks, first = item % blocks * CHANNELS;
        int64_t count = channels - first < CHANNELS ? channels - first : CHANNELS;
        int64_t row = cu_seqlens[sequence], tokens = cu_seqlens[sequence + 1] - row;
        if (!tokens) return;
        int64_t exported = cu_exports[sequence], slot = slots[sequence];
        T* windows = states + first * (WIDTH - 1);
        convolve_all<T, WIDTH>(
            x + row * stride + first, stride, weight + first * WIDTH,
            bias ? bias + first : nullptr, resumed[sequence] ? windows + slot * slot_stride : nullptr,
            tokens, windows, slot_stride, ends + exported, export_slots + exported,
            cu_exports[sequence + 1] - exported, slot, out + row * channels + first, channels, count,
            activated);
    });
}

#define PREFILLS(T, NAME)                                                                        \
    EXPORT void prefill_conv1d_##NAME(                                                           \
        const T* x, int64_t stride, const T* weight, const T* bias, T* states,                   \
        int64_t slot_stride, const int32_t* slots, const bool* resumed,                          \
        const int32_t* cu_seqlens, const int32_t* ends, const int32_t* export_slots,             \
        const int32_t* cu_exports, T* out, int64_t sequences, int64_t channels, int64_t width,   \
        int64_t activated, int threads) {                                                        \
        auto* function =                                                                         \
            width == 2 ? prefill<T, 2> : width == 3 ? prefill<T, 3> : prefill<T, 4>;             \
        function(                                                                                \
            x, stride, weight, bias, states, slot_stride, slots, resumed, cu_seqlens, ends,      \
            export_slots, cu_exports, out, sequences, channels, activated, threads);             \
    }

PREFILLS(float, float32)
PREFILLS(BFloat16, bfloat16)

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
