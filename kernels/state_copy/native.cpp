// Copies states between slots in every layer of a pool, and to compressed checkpoints and back: see
// reference.copy_states, narrow_states and widen_states.
#include "../native.h"

EXPORT void copy_states(
    char* pool, int64_t layers, int64_t layer_stride, int64_t slot_stride, int64_t bytes,
    const int32_t* sources, const int32_t* targets, int64_t copies, int threads) {
    for_each(layers * copies, threads_for(layers * copies * bytes / 8, threads), [&](int64_t item) {
        char* layer = pool + item / copies * layer_stride;
        int64_t copy = item % copies;
        memcpy(layer + targets[copy] * slot_stride, layer + sources[copy] * slot_stride, bytes);
    });
}

struct Int8 {
    static constexpr float LARGEST = 127.0f;
    int8_t bits;
};

// e4m3: four bits of exponent, three of mantissa, no infinity.
struct Float8 {
    static constexpr float LARGEST = 448.0f;
    uint8_t bits;
};

// Returns the code nearest to x within +-LARGEST, ties to even.
static inline Int8 encode(float x, Int8) { return {int8_t(int32_t(rintf(x)))}; }

static inline Float8 encode(float x, Float8) {
    uint32_t bits, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 24 & 0x80;
    bits &= 0x7fffffff;
    // Below 2^-6 a code counts steps of 2^-9, the precision of the sum with 2^14.
    float magnitude, sum;
    memcpy(&magnitude, &bits, 4);
    sum = magnitude + 16384.0f;
    uint32_t steps;
    memcpy(&steps, &sum, 4);
    steps -= 0x46800000;
    uint32_t rounded = (bits + 0x7ffff + (bits >> 20 & 1) - (uint32_t(120) << 23)) >> 20;
    return {uint8_t(sign | (magnitude < 0.015625f ? steps : rounded))};
}

static inline float decode(Int8 code) { return float(code.bits); }

static inline float decode(Float8 code) {
    float magnitude = code.bits & 0x78 ? float(8 + (code.bits & 7)) : float(code.bits & 7);
    uint32_t exponent = code.bits & 0x78 ? code.bits >> 3 & 15 : 1;
    uint32_t bits = (exponent + 127 - 10) << 23;
    float step;
    memcpy(&step, &bits, 4);
    return (code.bits & 0x80 ? -magnitude : magnitude) * step;
}

template <class S>
static float largest_of(const S* x, int64_t count) {
    Lanes most = {};
    for (int64_t i = 0; i < count; i += LANES) {
        Lanes value = (Lanes)((Words)load_part(x + i, count - i) & 0x7fffffff);
        most = larger(value, most);
    }
    float found = 0.0f;
    for (int64_t i = 0; i < LANES; i++) found = most[i] > found ? most[i] : found;
    return found;
}

template <class S, class Code>
static void narrow_run(const S* x, int64_t count, Code* codes, float* scale) {
    float by = largest_of(x, count) / Code::LARGEST;
    by = by < 1e-30f ? 1e-30f : by;
    for (int64_t i = 0; i < count; i++) {
        float ratio = widen(x[i]) / by;
        ratio = ratio < -Code::LARGEST ? -Code::LARGEST : ratio;
        codes[i] = encode(ratio > Code::LARGEST ? Code::LARGEST : ratio, Code{});
    }
    memcpy(scale, &by, 4);
}

template <class S, class Code>
static void widen_run(const Code* codes, int64_t count, const float* scale, S* x) {
    float by;
    memcpy(&by, scale, 4);
    for (int64_t i = 0; i < count; i++) x[i] = narrow<S>(decode(codes[i]) * by);
}

// Elements [rows, columns] with one scale per column.
template <class S, class Code>
static void narrow_columns(const S* x, int64_t rows, int64_t columns, Code* codes, float* scales) {
    std::vector<float> by(columns, 0.0f);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) {
            float magnitude = fabsf(widen(x[r * columns + c]));
            by[c] = magnitude > by[c] ? magnitude : by[c];
        }
    for (float& scale : by) {
        scale = scale / Code::LARGEST;
        scale = scale < 1e-30f ? 1e-30f : scale;
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) {
            float ratio = widen(x[r * columns + c]) / by[c];
            ratio = ratio < -Code::LARGEST ? -Code::LARGEST : ratio;
            codes[r * columns + c] = encode(ratio > Code::LARGEST ? Code::LARGEST : ratio, Code{});
        }
    memcpy(scales, by.data(), columns * 4);
}

template <class S, class Code>
static void widen_columns(
    const Code* codes, int64_t rows, int64_t columns, const float* scales, S* x) {
    std::vector<float> by(columns);
    memcpy(by.data(), scales, columns * 4);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++)
            x[r * columns + c] = narrow<S>(decode(codes[r * columns + c]) * by[c]);
}

// Location of one layer of one state in its pool and in its checkpoint.
struct Places {
    char *pool, *slots;
    int64_t layers, layer_stride, pool_stride, slot_stride;
    const int64_t *own, *kept;
    int64_t count, first, first_scale;
    int threads;

    template <class Work>
    void each(int64_t numbers, int64_t code_bytes, int64_t scales, const Work& work) const {
        for_each(layers * count, threads_for(layers * count * numbers, threads), [&](int64_t item) {
            int64_t layer = item % layers, copy = item / layers;
            char* slot = slots + kept[copy] * slot_stride;
            work(pool + layer * layer_stride + own[copy] * pool_stride,
                 slot + first + layer * numbers * code_bytes,
                 slot + first_scale + layer * scales * 4);
        });
    }
};

#define PLACES                                                                                  \
    char *pool, int64_t layers, int64_t layer_stride, int64_t pool_stride, char *slots,         \
        int64_t slot_stride, const int64_t *own, const int64_t *kept, int64_t count,            \
        int64_t first, int64_t first_scale
#define GIVEN                                                                                   \
    Places {                                                                                    \
        pool, slots, layers, layer_stride, pool_stride, slot_stride, own, kept, count, first,   \
            first_scale, threads                                                                \
    }

EXPORT void pack_states(PLACES, int64_t bytes, int threads) {
    GIVEN.each(bytes, 1, 0, [&](char* state, char* kept, char*) { memcpy(kept, state, bytes); });
}

EXPORT void unpack_states(PLACES, int64_t bytes, int threads) {
    GIVEN.each(bytes, 1, 0, [&](char* state, char* kept, char*) { memcpy(state, kept, bytes); });
}

#define CODED(S, Code, name)                                                                    \
    EXPORT void narrow_states_##name(PLACES, int64_t runs, int64_t run, int threads) {          \
        GIVEN.each(runs * run, 1, runs, [&](char* state, char* codes, char* scales) {           \
            for (int64_t i = 0; i < runs; i++)                                                  \
                narrow_run((const S*)state + i * run, run, (Code*)codes + i * run,              \
                           (float*)scales + i);                                                 \
        });                                                                                     \
    }                                                                                           \
    EXPORT void widen_states_##name(PLACES, int64_t runs, int64_t run, int threads) {           \
        GIVEN.each(runs * run, 1, runs, [&](char* state, char* codes, char* scales) {           \
            for (int64_t i = 0; i < runs; i++)                                                  \
                widen_run((const Code*)codes + i * run, run, (const float*)scales + i,          \
                          (S*)state + i * run);                                                 \
        });                                                                                     \
    }                                                                                           \
    EXPORT void narrow_columns_##name(                                                          \
        PLACES, int64_t heads, int64_t rows, int64_t columns, int threads) {                    \
        GIVEN.each(heads * rows * columns, 1, heads * columns,                                  \
                   [&](char* state, char* codes, char* scales) {                                \
            for (int64_t i = 0; i < heads; i++)                                                 \
                narrow_columns((const S*)state + i * rows * columns, rows, columns,             \
                               (Code*)codes + i * rows * columns, (float*)scales + i * columns);\
        });                                                                                     \
    }                                                                                           \
    EXPORT void widen_columns_##name(                                                           \
        PLACES, int64_t heads, int64_t rows, int64_t columns, int threads) {                    \
        GIVEN.each(heads * rows * columns, 1, heads * columns,                                  \
                   [&](char* state, char* codes, char* scales) {                                \
            for (int64_t i = 0; i < heads; i++)                                                 \
                widen_columns((const Code*)codes + i * rows * columns, rows, columns,           \
                              (const float*)scales + i * columns,                               \
                              (S*)state + i * rows * columns);                                  \
        });                                                                                     \
    }

CODED(float, Int8, float32_int8)
CODED(float, Float8, float32_fp8)
CODED(BFloat16, Int8, bfloat16_int8)
CODED(BFloat16, Float8, bfloat16_fp8)
