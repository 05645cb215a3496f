// Products of small matrices with float32 sums, for attention and for the scans over tiles. The operands
// are float32 or bfloat16. Each element of a result is summed in one order that depends on the method
// and the depth only, not on the number of rows and columns.
#pragma once

#include "amx.h"

#ifdef __AVX2__

constexpr int64_t ROWS = 6;  // rows at a time: with COLUMNS per row and operands, they fill the registers
#ifdef TWO_REGISTERS
constexpr int COLUMNS = 1;
constexpr Numbers PLACES = {Numbers::Half{0, 1, 2, 3, 4, 5, 6, 7}, Numbers::Half{8, 9, 10, 11, 12, 13, 14, 15}};
#else
constexpr int COLUMNS = 4;
constexpr Numbers PLACES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#endif
constexpr int64_t UNIT = 32;  // rows, columns and depth of all memory are multiples of it

static inline int64_t padded(int64_t count) { return (count + UNIT - 1) / UNIT * UNIT; }

// Registers of 16 columns of a row.
static inline int64_t width_of(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

typedef int32_t Word __attribute__((may_alias, aligned(2)));

// Methods. The left operand `a` has rows of Elements. The right operand `b` has rows of 32-bit words. A
// word has the elements of one column in DEPTH rows, which are one step of the product.
struct Singles {
    typedef float Element;
    typedef Arithmetic Region;
    static constexpr int64_t DEPTH = 1, STEPS = 1;  // the number of steps is a multiple of STEPS
    static constexpr int64_t ROWS_AT_ONCE = ROWS;

    static Lanes add(Lanes sum, const float* a, Lanes b) { return multiply_add(all(*a), b, sum); }
};

#ifdef __AVX512BF16__
struct Pairs {
    typedef BFloat16 Element;
    typedef Arithmetic Region;
    static constexpr int64_t DEPTH = 2, STEPS = 1, ROWS_AT_ONCE = ROWS;

    static Lanes add(Lanes sum, const BFloat16* a, Lanes b) {
        __m512bh both = (__m512bh)_mm512_set1_epi32(*(const Word*)a);
        return (Lanes)_mm512_dpbf16_ps((__m512)sum, both, (__m512bh)b);
    }
};
#endif

template <class Tiles>
struct SumRegion : TileRegion<Tiles> {
    SumRegion() : TileRegion<Tiles>(TILE_SIZE) {}
};

template <class Tiles>
struct TilePairs {
    typedef BFloat16 Element;
    typedef SumRegion<Tiles> Region;
    static constexpr int64_t DEPTH = 2, STEPS = TILE_SIZE, ROWS_AT_ONCE = 2 * TILE_SIZE;
};

// keep: factor of each row of the former contents of `to`, or null to ignore them.
template <class M, int R, int C>
static void multiply_block(
    const typename M::Element* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t steps,
    float* to, int64_t stride, const float* keep) {
    Lanes sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++)
            sums[r][c] = keep ? load(to + r * stride + c * LANES) * keep[r] : Lanes{};
    for (int64_t s = 0; s < steps; s++) {
        Lanes part[C];
        for (int c = 0; c < C; c++) part[c] = load(b + s * b_stride + c * LANES);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++)
                sums[r][c] = M::add(sums[r][c], a + r * a_stride + s * M::DEPTH, part[c]);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(to + r * stride + c * LANES, sums[r][c]);
}

template <class M, int C, class... Rest>
static void multiply_columns(int64_t rows, Rest... rest) {
    switch (rows) {
        case 1: return multiply_block<M, 1, C>(rest...);
        case 2: return multiply_block<M, 2, C>(rest...);
        case 3: return multiply_block<M, 3, C>(rest...);
        case 4: return multiply_block<M, 4, C>(rest...);
        case 5: return multiply_block<M, 5, C>(rest...);
        default: return multiply_block<M, 6, C>(rest...);
    }
}

// to [rows, columns] = keep * to + a b. columns: a multiple of LANES.
template <class M>
struct Product {
    typedef typename M::Element Element;

    static void multiply(
        int64_t rows, const Element* a, int64_t a_stride, const float* b, int64_t b_stride,
        int64_t columns, int64_t steps, float* to, int64_t stride, const float* keep) {
        for (int64_t r = 0; r < rows; r += ROWS) {
            int64_t count = rows - r < ROWS ? rows - r : ROWS, c = 0;
            const Element* from = a + r * a_stride;
            float* out = to + r * stride;
            const float* own = keep ? keep + r : nullptr;
            for (; c + COLUMNS * LANES <= columns; c += COLUMNS * LANES)
                multiply_columns<M, COLUMNS>(
                    count, from, a_stride, b + c, b_stride, steps, out + c, stride, own);
            for (; c < columns; c += LANES)
                multiply_columns<M, 1>(
                    count, from, a_stride, b + c, b_stride, steps, out + c, stride, own);
        }
    }
};

// The rows are computed in whole tiles: memory of `a` and `to` has a multiple of 16 rows.
template <class Tiles>
struct Product<TilePairs<Tiles>> {
    static void multiply(
        int64_t rows, const BFloat16* a, int64_t a_stride, const float* b, int64_t b_stride,
        int64_t columns, int64_t steps, float* to, int64_t stride, const float* keep) {
        for (int64_t r = 0; keep && r < rows; r++)
            for (int64_t c = 0; keep[r] != 1.0f && c < columns; c += LANES)
                store(to + r * stride + c, load(to + r * stride + c) * keep[r]);
        for (int64_t c = 0; c < columns; c += 2 * TILE_SIZE)
            for (int64_t r = 0; r < rows; r += 2 * TILE_SIZE) {
                auto* square = rows - r > TILE_SIZE
                    ? columns - c > TILE_SIZE ? multiply_square<2, 2> : multiply_square<2, 1>
                    : columns - c > TILE_SIZE ? multiply_square<1, 2> : multiply_square<1, 1>;
                square(
                    a + r * a_stride, a_stride * 2, b + c, b_stride * 4, steps,
                    to + r * stride + c, stride, keep != nullptr);
            }
    }

  private:
    // Strides of a and b in bytes.
    template <int R, int C>
    static void multiply_square(
        const BFloat16* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t steps,
        float* to, int64_t stride, bool add) {
        float* below = to + TILE_SIZE * stride;
        start<0>(to, stride, add);
        if (C > 1) start<1>(to + TILE_SIZE, stride, add);
        if (R > 1) start<2>(below, stride, add);
        if (R > 1 && C > 1) start<3>(below + TILE_SIZE, stride, add);
        for (int64_t s = 0; s < steps; s += TILE_SIZE) {
            auto* left = (const char*)(a + 2 * s);
            auto* right = (const char*)b + s * b_stride;
            Tiles::template load<6>(right, b_stride);
            Tiles::template load<4>(left, a_stride);
            Tiles::template multiply_bfloat16<0, 4, 6>();
            if (C > 1) {
                Tiles::template load<7>(right + 4 * TILE_SIZE, b_stride);
                Tiles::template multiply_bfloat16<1, 4, 7>();
            }
            if (R > 1) {
                Tiles::template load<5>(left + TILE_SIZE * a_stride, a_stride);
                Tiles::template multiply_bfloat16<2, 5, 6>();
                if (C > 1) Tiles::template multiply_bfloat16<3, 5, 7>();
            }
        }
        Tiles::template store<0>(to, 4 * stride);
        if (C > 1) Tiles::template store<1>(to + TILE_SIZE, 4 * stride);
        if (R > 1) Tiles::template store<2>(below, 4 * stride);
        if (R > 1 && C > 1) Tiles::template store<3>(below + TILE_SIZE, 4 * stride);
    }

    template <int T>
    static void start(const float* sums, int64_t stride, bool add) {
        if (add)
            Tiles::template load<T>(sums, 4 * stride);
        else
            Tiles::template zero<T>();
    }
};

// --- Operands ------------------------------------------------------------------------------------------

// Copies a row of a left operand and adds zeros.
template <class T, class Element>
static void copy_row(const T* from, int64_t size, Element* to, int64_t width) {
    if constexpr (std::is_same_v<T, Element>) {
        memcpy(to, from, size * sizeof(T));
        memset(to + size, 0, (width - size) * sizeof(T));
    } else {
        for (int64_t d = 0; d < width; d += LANES)
            store(to + d, d < size ? load_part(from + d, size - d) : Lanes{});
    }
}

// Transposes 16 x 16 words.
static inline void transpose_square(const float* from, int64_t from_stride, float* to, int64_t stride) {
#ifdef TWO_REGISTERS
    for (int r = 0; r < 16; r += 8)
        for (int c = 0; c < 16; c += 8) {
            const float* own = from + r * from_stride + c;
            __m256 a[8], b[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(own + i * from_stride);
#pragma GCC unroll 4
            for (int i = 0; i < 8; i += 2) {
                b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
                b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
            }
#pragma GCC unroll 2
            for (int i = 0; i < 8; i += 4) {
                a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
                a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
                a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
                a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                float* first = to + (c + j) * stride + r;
                _mm256_storeu_ps(first, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
                _mm256_storeu_ps(first + 4 * stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
            }
        }
#else
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * from_stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 g + j] has, in each quarter q, column 4 q + j of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i first = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        __m512i second = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        __m512i third = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        __m512i fourth = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_storeu_si512(to + j * stride, _mm512_shuffle_i32x4(first, second, 0x88));
        _mm512_storeu_si512(to + (4 + j) * stride, _mm512_shuffle_i32x4(third, fourth, 0x88));
        _mm512_storeu_si512(to + (8 + j) * stride, _mm512_shuffle_i32x4(first, second, 0xdd));
        _mm512_storeu_si512(to + (12 + j) * stride, _mm512_shuffle_i32x4(third, fourth, 0xdd));
    }
#endif
}

// Transposes words [rows, columns]; both are multiples of 16.
static void transpose(
    const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t stride) {
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < columns; c += 16)
            transpose_square(from + r * from_stride + c, from_stride, to + c * stride + r, stride);
}

// Words of two rows of bfloat16.
static inline Lanes pair(Lanes even, Lanes odd) {
    return (Lanes)(narrow_bits(even) | narrow_bits(odd) << 16);
}

// Right operand of float32 rows [rows, columns], with zeros after the last row: the rows themselves, or
// words in `room`. rows, columns: multiples of LANES.
template <class M>
static const float* right_operand(const float* from, int64_t rows, int64_t columns, float* room) {
    if constexpr (M::DEPTH == 1) return from;
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t c = 0; c < columns; c += LANES)
            store(
                room + r / 2 * columns + c,
                pair(load(from + r * columns + c), load(from + (r + 1) * columns + c)));
    for (int64_t r = rows; r < padded(rows); r += 2)
        memset(room + r / 2 * columns, 0, columns * 4);
    return room;
}

// Steps of a product with a depth of `count`.
template <class M>
static int64_t steps_of(int64_t count) {
    int64_t unit = M::DEPTH * M::STEPS;
    return (count + unit - 1) / unit * M::STEPS;
}

#ifdef __AVX512BF16__
#define OF_PAIRS(DEFINE) DEFINE(bfloat16_pairs, BFloat16, Pairs)
#else
#define OF_PAIRS(DEFINE)
#endif
#ifdef HAS_AMX
#define OF_AMX(DEFINE) DEFINE(bfloat16_amx, BFloat16, TilePairs<AmxTiles>)
#else
#define OF_AMX(DEFINE)
#endif

#ifdef PLAIN_TILES
#define OF_PLAIN(DEFINE) DEFINE(bfloat16_plain_tiles, BFloat16, TilePairs<PlainTiles>)
#else
#define OF_PLAIN(DEFINE)
#endif

// DEFINE(name, dtype, method) for each method that this compiler has.
#define EACH_METHOD(DEFINE)                                                                       \
    DEFINE(float32_lanes, float, Singles)                                                         \
    DEFINE(bfloat16_lanes, BFloat16, Singles) OF_PLAIN(DEFINE) OF_PAIRS(DEFINE) OF_AMX(DEFINE)

#endif
