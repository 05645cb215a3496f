// x @ weight.T for a packed weight: panels of 64 outputs. A panel has, step after step, one 32-bit
// word of each output's row: a float32, two bfloat16 or four int8. Every output is summed word after
// word, in one register lane, for any number of rows and threads, so a row's bits do not depend on the
// batch. The blocking of rows and words below affects speed only.
#include "../native.h"

#ifdef __AVX512F__

constexpr int64_t PANEL = 64;        // outputs
constexpr int64_t VECTORS = 4;       // registers per step of a panel
constexpr int64_t TILE_ROWS = 6;     // 24 sums and their operands fill the registers
constexpr int64_t BLOCK_ROWS = 192;  // rows with sums in the cache
constexpr int64_t BLOCK_STEPS = 512; // steps of a panel kept in the cache while rows are processed

struct Float32 {
    typedef __m512 Sum;
    static Sum zero() { return _mm512_setzero_ps(); }
    static Sum add(Sum sum, int32_t x, __m512i w) {
        return _mm512_fmadd_ps(
            _mm512_castsi512_ps(_mm512_set1_epi32(x)), _mm512_castsi512_ps(w), sum);
    }
    static Sum read(const int32_t* from) { return _mm512_loadu_ps((const float*)from); }
    static void write(int32_t* to, Sum sum) { _mm512_storeu_ps((float*)to, sum); }
};

#ifdef __AVX512BF16__
struct BFloat16Pairs : Float32 {
    static Sum add(Sum sum, int32_t x, __m512i w) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
    }
};
#endif

#ifdef __AVX512VNNI__
struct Int8Fours {
    typedef __m512i Sum;
    static Sum zero() { return _mm512_setzero_si512(); }
    static Sum add(Sum sum, int32_t x, __m512i w) {
        // GCC 12 spills the sums of its intrinsic to memory.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(x)), "v"(w));
        return sum;
    }
    static Sum read(const int32_t* from) { return _mm512_loadu_si512(from); }
    static void write(int32_t* to, Sum sum) { _mm512_storeu_si512(to, sum); }
};
#endif

// Packs rows of words, one per output, into panels. Missing outputs of the last panel are 0.
EXPORT void pack_words(
    const int32_t* rows, int32_t* packed, int64_t outputs, int64_t words, int threads) {
    constexpr int64_t STEPS = 64;  // steps of all rows at a time, since rows can be 4 KiB apart
    int64_t panels = (outputs + PANEL - 1) / PANEL;
    for_each(panels, threads_for(outputs * words, threads), [&](int64_t p) {
        int32_t block[PANEL * STEPS] = {};
        const int32_t* from = rows + p * PANEL * words;
        int64_t count = outputs - p * PANEL < PANEL ? outputs - p * PANEL : PANEL;
        for (int64_t begin = 0; begin < words; begin += STEPS) {
            int64_t steps = words - begin < STEPS ? words - begin : STEPS;
            for (int64_t o = 0; o < count; o++)
                memcpy(block + o * STEPS, from + o * words + begin, steps * 4);
            int32_t* to = packed + (p * words + begin) * PANEL;
            for (int64_t s = 0; s < steps; s++)
                for (int64_t o = 0; o < PANEL; o++) to[s * PANEL + o] = block[o * STEPS + s];
        }
    });
}

template <class Op, int ROWS>
static void tile(
    const int32_t* x, int64_t stride, const int32_t* w, int64_t steps, int32_t* sums, bool first) {
    typename Op::Sum acc[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++)
            acc[r][v] = first ? Op::zero() : Op::read(sums + r * PANEL + v * 16);
    for (int64_t s = 0; s < steps; s++, w += PANEL) {
        __m512i b[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            _mm_prefetch((const char*)(w + 16 * PANEL + v * 16), _MM_HINT_T0);
            b[v] = _mm512_loadu_si512(w + v * 16);
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) acc[r][v] = Op::add(acc[r][v], x[r * stride + s], b[v]);
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) Op::write(sums + r * PANEL + v * 16, acc[r][v]);
}

template <class Op>
static void tiles(
    int64_t rows, const int32_t* x, int64_t stride, const int32_t* w, int64_t steps, int32_t* sums,
    bool first) {
    switch (rows) {
        case 1: return tile<Op, 1>(x, stride, w, steps, sums, first);
        case 2: return tile<Op, 2>(x, stride, w, steps, sums, first);
        case 3: return tile<Op, 3>(x, stride, w, steps, sums, first);
        case 4: return tile<Op, 4>(x, stride, w, steps, sums, first);
        case 5: return tile<Op, 5>(x, stride, w, steps, sums, first);
        default: return tile<Op, 6>(x, stride, w, steps, sums, first);
    }
}

// Calls finish(row, panel, sums) with the 64 sums of every row and panel.
template <class Op, class Finish>
static void multiply(
    const int32_t* x, int64_t stride, int64_t rows, const int32_t* w, int64_t steps,
    int64_t outputs, int threads, Finish finish) {
    int64_t panels = (outputs + PANEL - 1) / PANEL;
    for_each(panels, threads_for(panels * steps * (8 + 4 * rows), threads), [&](int64_t p) {
        alignas(64) int32_t sums[BLOCK_ROWS * PANEL];
        const int32_t* panel = w + p * steps * PANEL;
        for (int64_t begin = 0; begin < rows; begin += BLOCK_ROWS) {
            int64_t count = rows - begin < BLOCK_ROWS ? rows - begin : BLOCK_ROWS;
            int64_t parts = (count + TILE_ROWS - 1) / TILE_ROWS;
            for (int64_t s = 0; s < steps; s += BLOCK_STEPS) {
                int64_t num_steps = steps - s < BLOCK_STEPS ? steps - s : BLOCK_STEPS;
                for (int64_t part = 0; part < parts; part++) {
                    int64_t from = count * part / parts, to = count * (part + 1) / parts;
                    tiles<Op>(
                        to - from, x + (begin + from) * stride + s, stride, panel + s * PANEL,
                        num_steps, sums + from * PANEL, s == 0);
                }
            }
            for (int64_t r = 0; r < count; r++) finish(begin + r, p, sums + r * PANEL);
        }
    });
}

// scale: one per output, or null.
template <class Op, class T>
static void multiply_float(
    const T* x, int64_t stride, int64_t rows, const int32_t* w, const float* scale, const T* bias,
    T* y, int64_t steps, int64_t outputs, int threads) {
    constexpr int64_t PER_WORD = 4 / sizeof(T);
    multiply<Op>(
        (const int32_t*)x, stride / PER_WORD, rows, w, steps, outputs, threads,
        [=](int64_t row, int64_t panel, const int32_t* sums) {
            int64_t first = panel * PANEL, count = outputs - first < PANEL ? outputs - first : PANEL;
            T* to = y + row * outputs + first;
            for (int64_t i = 0; i < count; i += LANES) {
                Lanes wide = load((const float*)sums + i);
                if (scale) wide *= load_part(scale + first + i, count - i);
                if (bias) wide += load_part(bias + first + i, count - i);
                store_part(to + i, wide, count - i);
            }
        });
}

EXPORT void linear_float32(
    const float* x, int64_t stride, int64_t rows, const int32_t* w, const float* scale,
    const float* bias, float* y, int64_t steps, int64_t outputs, int threads) {
    multiply_float<Float32>(x, stride, rows, w, scale, bias, y, steps, outputs, threads);
}

#ifdef __AVX512BF16__
EXPORT void linear_bfloat16(
    const BFloat16* x, int64_t stride, int64_t rows, const int32_t* w, const float* scale,
    const BFloat16* bias, BFloat16* y, int64_t steps, int64_t outputs, int threads) {
    multiply_float<BFloat16Pairs>(x, stride, rows, w, scale, bias, y, steps, outputs, threads);
}
#endif

#ifdef __AVX512VNNI__
constexpr float MIN_LARGEST = 1e-30f;  // as int8.py has it

// Converts rows to int8 + 128, as the instruction requires; the same values as int8.quantize_rows.
template <class T>
static void quantize_row(const T* x, int64_t size, int64_t padded, uint8_t* to, float* scale) {
    Lanes most = {}, nothing = {};  // nothing stays 0 unless an element is infinite or NaN
    for (int64_t i = 0; i < size; i += LANES) {
        Lanes b = load_part(x + i, size - i);
        nothing += b * 0.0f;
        most = larger((Lanes)((Words)b & 0x7fffffff), most);
    }
    float largest = _mm512_reduce_max_ps((__m512)most);
    float step = (largest > MIN_LARGEST ? largest : MIN_LARGEST) / 127.0f;
    __m512i raised = _mm512_set1_epi32(128);
    memset(to + size / LANES * LANES, 128, padded - size / LANES * LANES);
    for (int64_t i = 0; i < size; i += LANES) {
        Lanes b = load_part(x + i, size - i) / step;
        __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32((__m512)b), raised);
        __mmask16 mask = size - i < LANES ? (1u << (size - i)) - 1 : 0xffff;
        _mm512_mask_cvtepi32_storeu_epi8(to + i, mask, whole);
    }
    *scale = step + sum(nothing);
}

template <class T>
static void multiply_int8(
    const T* x, int64_t stride, int64_t rows, int64_t size, const int32_t* w,
    const int32_t* offsets, const float* scale, const T* bias, T* y, int64_t outputs,
    int threads) {
    int64_t steps = (size + 3) / 4;
    static thread_local std::vector<int32_t> words;
    static thread_local std::vector<float> steps_of_rows;
    words.resize(rows * steps);
    steps_of_rows.resize(rows);
    int32_t* quantized = words.data();
    float* row_scale = steps_of_rows.data();
    for_each(rows, threads_for(rows * size / 2, threads), [&](int64_t r) {
        auto* to = (uint8_t*)(quantized + r * steps);
        quantize_row(x + r * stride, size, steps * 4, to, row_scale + r);
    });
    multiply<Int8Fours>(
        quantized, steps, rows, w, steps, outputs, threads,
        [=](int64_t row, int64_t panel, const int32_t* sums) {
            int64_t first = panel * PANEL, count = outputs - first < PANEL ? outputs - first : PANEL;
            T* to = y + row * outputs + first;
            float factor = row_scale[row];
            for (int64_t i = 0; i < count; i += LANES) {
                __mmask16 mask = count - i < LANES ? (1u << (count - i)) - 1 : 0xffff;
                __m512i offset = _mm512_maskz_loadu_epi32(mask, offsets + first + i);
                __m512i whole = _mm512_sub_epi32(_mm512_load_si512(sums + i), offset);
                Lanes wide = (Lanes)_mm512_cvtepi32_ps(whole);
                wide = wide * load_part(scale + first + i, count - i) * factor;
                if (bias) wide += load_part(bias + first + i, count - i);
                store_part(to + i, wide, count - i);
            }
        });
}

EXPORT void linear_int8_float32(
    const float* x, int64_t stride, int64_t rows, int64_t size, const int32_t* w,
    const int32_t* offsets, const float* scale, const float* bias, float* y, int64_t outputs,
    int threads) {
    multiply_int8(x, stride, rows, size, w, offsets, scale, bias, y, outputs, threads);
}

EXPORT void linear_int8_bfloat16(
    const BFloat16* x, int64_t stride, int64_t rows, int64_t size, const int32_t* w,
    const int32_t* offsets, const float* scale, const BFloat16* bias, BFloat16* y,
    int64_t outputs, int threads) {
    multiply_int8(x, stride, rows, size, w, offsets, scale, bias, y, outputs, threads);
}
#endif
#endif
