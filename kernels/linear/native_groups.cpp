// x @ weight.T for small integers in groups of columns (groups.py), with x in int8.
//
// A unit is 32 columns. Activations of a row and a unit are integers of 8 bits with one scale. Sums of
// integers within a unit are exact in any order; units, then blocks, are added in one order, in one
// lane per output, for any number of rows and threads. So a row's bits do not depend on the batch, and
// are equal with all registers:
//
//     part[block] = sum of units (sum of halves factor * (sum of columns (code - zero) x)) * step
//     y = sum of blocks part * scale - (sum of units (sum of halves minima * (step * sum of x))) * minimum
//
// Weights are packed in panels of 16 outputs. A panel has, unit after unit, one 32-bit word of each
// output, several times. Four words have the lower 4 bits of 8 codes each: byte b of word j has code
// 4 j + b, and in its upper half code 16 + 4 j + b. Further words have the fifth bits (bit s of byte b
// is that of code 4 s + b), or two bits more of 16 codes each (bits 2 s of byte b). Codes of 2 and 3 bits
// have two words like the latter, and one with the third bits. Codes of 8 bits fill eight words.
#include "../amx.h"
#include "../experts.h"

#ifdef __AVX2__

constexpr int64_t PANEL = 16;        // outputs
constexpr int64_t WORD_BYTES = 64;   // of a word of each output
constexpr int64_t UNIT = 32;         // columns
constexpr int64_t BLOCK_ROWS = 24;   // rows that are kept in the cache, with their sums
constexpr int64_t MOST_ROWS = 32;    // the same with tiles
constexpr int64_t MANY_ROWS = 16;    // rows for which codes are unpacked once, without AVX-512
constexpr int64_t CHUNK = 32;        // units of a panel that are used for all of these rows
constexpr int64_t MANY_PANELS = 8;   // panels for which these rows are used, if there are many rows
constexpr int64_t AHEAD = 4096;      // bytes of codes between a load and its prefetch

// Activations of a row: 32 integers and their scale.
struct alignas(64) Unit {
    int32_t words[8];
    float step;
    int32_t starts[2];  // of the sums of each half of the columns, or sums of x if outputs have zeros
    float sums[2], sum;  // step times sum of x of each half, and of both
    int32_t start;       // both starts
    int32_t halves;      // sums of the integers of each half, in 16 bits each
};
static_assert(sizeof(Unit) == 64, "a line of the cache");

// Packed weights, as native.py makes them. Arrays are by panel, then by unit, group or block, then by
// output. Those that a format does not have are null.
struct PackedGroups {
    const uint8_t *codes, *scale, *minimum, *zeros;
    const int8_t *factors;
    const uint8_t *minima;
    const int8_t *table;
    int64_t outputs, columns, units, block, bits, zero, scale_kind, halves;  // block: in units

    // Units between rows of x. An odd number, so that rows are not in the same place of the cache.
    int64_t stride() const { return units | 1; }
};

enum ScaleKind { HALF, BFLOAT16, FLOAT32, EXPONENT };

// --- Registers -------------------------------------------------------------------------------------

// Types of a register of 32-bit words, and conversions that are the same for all.
#define REGISTER(WIDTH)                                                                            \
    typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));                                  \
    typedef float Floats __attribute__((vector_size(4 * WIDTH)));                                  \
    typedef uint16_t Shorts __attribute__((vector_size(4 * WIDTH)));                               \
    typedef Ints Unaligned __attribute__((aligned(4)));                                            \
    typedef Floats UnalignedFloats __attribute__((aligned(4)));                                    \
    static Ints load(const void* from) { return *(const Unaligned*)from; }                         \
    static Ints all(int32_t x) { return Ints{} + x; }                                              \
    static Floats all(float x) { return x - Floats{}; }                                            \
    static Floats floats(Ints x) { return __builtin_convertvector(x, Floats); }

// 256 bits.
struct HalfLanes {
    REGISTER(8)
    typedef struct ByHalves Few;  // the way to multiply few rows

    // Codes of 8 bits and values of tables are used as numbers with signs.
    static constexpr int BIAS = 128;

    static Ints look_up(Ints table, Ints index) {
        return (Ints)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
    }
    static Ints table(const int8_t* from) {
        return (Ints)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
    }
    static Ints numbers(Ints codes) { return codes ^ all(int32_t(0x80808080)); }

    // Pairs of numbers of 16 bits: sums of two products each. MOST: the largest code, or 128 for numbers
    // with signs.
    template <int MOST>
    static Ints product(Ints w, int32_t word) {
        __m256i x = _mm256_set1_epi32(word), own = (__m256i)w;
        if (MOST < 128) return (Ints)_mm256_maddubs_epi16(own, x);
        return (Ints)_mm256_maddubs_epi16(_mm256_abs_epi8(own), _mm256_sign_epi8(x, own));
    }
    static Ints add_shorts(Ints a, Ints b) { return (Ints)((Shorts)a + (Shorts)b); }
    static Ints pairs(Ints low, Ints high) { return (low & all(0xffff)) | high << 16; }
    static Ints times(Ints pairs, int16_t x) {
        return (Ints)_mm256_mullo_epi16((__m256i)pairs, _mm256_set1_epi16(x));
    }
    // Sum of both products of each pair.
    static Ints multiply_pairs(Ints a, Ints b) {
        return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
    }

    // Numbers of 8 and 16 bits, one per word.
    static Ints widened(const int8_t* from) {
        return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
    }
    static Ints widened(const uint8_t* from) {
        return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
    }
    static Ints widened(const uint16_t* from) {
        return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
    }
    static Floats multiply_add(Floats a, Floats b, Floats c) {
        return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    }
    static Floats from_half(const void* from) {
        return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
    }
};

#ifdef __AVX512VNNI__
// 512 bits. Codes are used without signs, and tables have 128 added.
struct FullLanes {
    REGISTER(16)
    typedef struct ByLanes Few;

    static constexpr int BIAS = 0;

    static Ints look_up(Ints table, Ints index) {
        return (Ints)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
    }
    static Ints table(const int8_t* from) {
        return (Ints)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from)) ^
            all(int32_t(0x80808080));
    }
    static Ints numbers(Ints codes) { return codes; }

    template <int COUNT>
    static Ints add(Ints sum, const Ints* w, const int32_t* x) {
        for (int s = 0; s < COUNT; s++)  // GCC 12 spills the sums of its intrinsic to memory.
            asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w[s]), "m"(x[s]));
        return sum;
    }
    static Ints widened(const int8_t* from) {
        return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
    }
    static Ints widened(const uint8_t* from) {
        return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
    }
    static Ints widened(const uint16_t* from) {
        return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    }
    static Floats multiply_add(Floats a, Floats b, Floats c) {
        return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    }
    static Floats from_half(const void* from) {
        return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
    }
};
#endif

template <class R>
static typename R::Floats load_scales(const uint8_t* scale, int64_t first, int64_t kind) {
    typedef typename R::Floats Floats;
    switch (kind) {
        case HALF: return R::from_half(scale + 2 * first);
        case BFLOAT16: return (Floats)(R::widened((const uint16_t*)scale + first) << 16);
        case FLOAT32: return (Floats)R::load(scale + 4 * first);
        default: {  // 2^(e - 128); subnormal numbers are 0
            auto exponent = R::widened(scale + first);
            return (Floats)(((exponent > 1) & (exponent - 1)) << 23);
        }
    }
}

// --- Codes -------------------------------------------------------------------------------------------

// Makes eight words of codes of 32 columns from the words of a unit.
template <int BITS, bool TABLE>
struct Codes {
    static constexpr int WORDS = BITS;
    static constexpr bool IS_SIGNED = BITS == 8 || TABLE;  // with HalfLanes
    static constexpr int MOST = IS_SIGNED ? 128 : (1 << BITS) - 1;
    static constexpr bool IN_TWO_PARTS = BITS == 3 || BITS == 5 || BITS == 6;

    template <class R>
    static void unpack(const uint8_t* from, typename R::Ints table, typename R::Ints* codes) {
        prefetch(from);
        for (int s = 0; s < 8; s++) codes[s] = word<R>(from, table, s);
    }

    static void prefetch(const uint8_t* from) {
        for (int64_t i = 0; i < WORDS; i++) _mm_prefetch((const char*)from + AHEAD + 64 * i, _MM_HINT_T0);
    }

    template <class R>
    static typename R::Ints word(const uint8_t* from, typename R::Ints table, int s) {
        typedef typename R::Ints Ints;
        if constexpr (BITS == 8) return R::numbers(R::load(from + 64 * s));
        if constexpr (BITS < 4) {
            Ints code = bits<R, 2, 0>(from, s);
            return BITS == 3 ? code | bits<R, 1, 2>(from + 128, s) : code;
        }
        Ints both = R::load(from + s % 4 * 64);
        Ints code = (s < 4 ? both : (Ints)((typename R::Shorts)both >> 4)) & R::all(0x0f0f0f0f);
        if constexpr (TABLE) return R::look_up(table, code);
        if constexpr (BITS > 4) return code | bits<R, BITS - 4, 4>(from + 256, s);
        return code;
    }

    // COUNT bits of each code of a word, moved to PLACE. Byte b has those of the codes 4 s + b.
    template <class R, int COUNT, int PLACE>
    static typename R::Ints bits(const uint8_t* from, int s) {
        constexpr int PER_BYTE = 8 / COUNT;
        auto packed = (typename R::Shorts)R::load(from + s / PER_BYTE * 64);
        int shift = s % PER_BYTE * COUNT - PLACE;
        auto moved = (typename R::Ints)(shift < 0 ? packed << -shift : packed >> shift);
        return moved & R::all(((1 << COUNT) - 1) * 0x01010101 << PLACE);
    }
};

// The same codes, each of which has a byte already.
template <class Packed>
struct Unpacked : Packed {
    static constexpr int WORDS = 8;

    static void prefetch(const uint8_t*) {}

    template <class R>
    static typename R::Ints word(const uint8_t* from, typename R::Ints, int s) {
        return R::load(from + 64 * s);
    }
};

// Packs codes [outputs, columns], one byte each. Columns are a multiple of 32.
EXPORT void pack_codes(
    const uint8_t* rows, uint32_t* packed, int64_t outputs, int64_t columns, int64_t bits, int threads) {
    int64_t units = columns / UNIT, words = bits;
    for_each((outputs + PANEL - 1) / PANEL, threads, [&](int64_t p) {
        for (int64_t u = 0; u < units; u++) {
            uint32_t* to = packed + (p * units + u) * words * PANEL;
            for (int64_t o = 0; o < PANEL; o++) {
                uint32_t own[8] = {}, made[8] = {};
                int64_t row = p * PANEL + o;
                if (row < outputs) memcpy(own, rows + row * columns + u * UNIT, UNIT);
                for (int s = 0; s < 8; s++) {
                    uint32_t lower = own[s] & (bits < 4 ? 0x03030303 : 0x0f0f0f0f), upper = own[s] ^ lower;
                    if (bits == 8)
                        made[s] = own[s];
                    else if (bits < 4)
                        made[s / 4] |= lower << s % 4 * 2;
                    else
                        made[s % 4] |= lower << s / 4 * 4;
                    if (bits == 3) made[2] |= upper >> 2 << s;
                    if (bits == 5) made[4] |= upper >> 4 << s;
                    if (bits == 6) made[4 + s / 4] |= upper >> 4 << s % 4 * 2;
                }
                for (int64_t i = 0; i < words; i++) to[i * PANEL + o] = made[i];
            }
        }
    });
}

// --- Blocks of GGUF files ------------------------------------------------------------------------------

// A word of each row of a panel.
typedef uint32_t RowWords __attribute__((vector_size(4 * PANEL)));

// Places of a block in the packed weight. Those that the format does not have are not used.
struct PackedBlock {
    RowWords* codes;
    uint8_t *scale, *minimum, *factors, *minima;
};

// Not inlined: each format is compiled once for packing and for all look-ups.
#define APART __attribute__((noinline))

// Sizes of a format of blocks.py: BYTES and UNITS of a block, WORDS of a packed unit, FACTORS of a block.
// MINIMUM: true if a block has one.
template <
    int64_t BYTES_, int64_t UNITS_, int64_t WORDS_, int64_t FACTORS_, bool MINIMUM_ = false,
    class Scale_ = uint16_t>
struct BlockSizes {
    static constexpr int64_t BYTES = BYTES_, UNITS = UNITS_, WORDS = WORDS_, FACTORS = FACTORS_;
    static constexpr bool MINIMUM = MINIMUM_;
    typedef Scale_ Scale;
};

static RowWords bytes_of(uint32_t x) { return RowWords{} + x * 0x01010101; }

// The words at OFFSET of each row's block. The last one may not reach beyond the block.
template <int OFFSET, int COUNT>
static void read_words(const uint8_t* const* rows, RowWords* to) {
    for (int64_t o = 0; o < PANEL; o++)
        for (int i = 0; i < COUNT; i++) memcpy((uint32_t*)(to + i) + o, rows[o] + OFFSET + 4 * i, 4);
}
template <int OFFSET>
static RowWords read_word(const uint8_t* const* rows) {
    RowWords word;
    return read_words<OFFSET, 1>(rows, &word), word;
}

template <class T>
static void write_lowest(RowWords from, void* to, int64_t place = 0) {
    for (int64_t o = 0; o < PANEL; o++) ((T*)to)[place * PANEL + o] = T(from[o]);
}
static void write_bytes(RowWords from, void* to, int64_t first) {
    for (int64_t i = 0; i < 4; i++) write_lowest<uint8_t>(from >> 8 * i, to, first + i);
}

// Adds the COUNT bits from `shift` on of eight words to packed ones.
template <int COUNT>
static void add_packed(const RowWords* from, int shift, RowWords* to) {
    constexpr int PER_BYTE = 8 / COUNT;
    for (int s = 0; s < 8; s++)
        to[s / PER_BYTE] |= (from[s] >> shift & bytes_of((1 << COUNT) - 1)) << s % PER_BYTE * COUNT;
}
// Packs the lower or upper halves of the bytes of eight words.
static void pack_halves(const RowWords* from, int shift, RowWords* to) {
    for (int j = 0; j < 4; j++)
        to[j] = (from[j] >> shift & bytes_of(15)) | (from[4 + j] >> shift & bytes_of(15)) << 4;
}

// A unit with codes at CODES in the packed order, and their fifth bits at HIGH.
template <int BITS, int CODES, bool MINIMUM = false, int HIGH = 0, class Scale = uint16_t>
struct OneUnit : BlockSizes<CODES + (BITS == 8 ? 32 : 16), 1, BITS, 0, MINIMUM, Scale> {
    static APART void pack(const uint8_t* const* rows, const PackedBlock& to) {
        RowWords first = read_word<0>(rows);
        write_lowest<Scale>(first, to.scale);
        if (MINIMUM) write_lowest<uint16_t>(first >> 16 ^ 0x8000, to.minimum);
        read_words<CODES, BITS == 8 ? 8 : 4>(rows, to.codes);
        for (int64_t i = 0; BITS == 8 && i < 8; i++) to.codes[i] ^= bytes_of(128);
        if (!HIGH) return;
        RowWords bits = read_word<HIGH>(rows), high = {};  // bit 4 s + b becomes bit s of byte b
        for (int s = 0; s < 8; s++) high |= ((bits >> 4 * s & 15) * 0x204081 & bytes_of(1)) << s;
        to.codes[4] = high;
    }
};

// Eight units of 2 bits at CODES, and the third bits in the first words.
template <int BITS, int CODES>
static void pack_twos(const uint8_t* const* rows, RowWords* to) {
    RowWords low[16], high[8];
    read_words<CODES, 16>(rows, low);
    if (BITS == 3) read_words<0, 8>(rows, high);
    for (int u = 0; u < 8; u++, to += BITS) {
        to[0] = to[1] = to[BITS - 1] = RowWords{};
        add_packed<2>(low + u / 4 * 8, u % 4 * 2, to);
        if (BITS == 3) add_packed<1>(high, u, to + 2);
    }
}

struct Q2K : BlockSizes<84, 8, 2, 16, true> {
    static APART void pack(const uint8_t* const* rows, const PackedBlock& to) {
        pack_twos<2, 16>(rows, to.codes);
        RowWords scales[4], both = read_word<80>(rows);
        read_words<0, 4>(rows, scales);
        for (int i = 0; i < 4; i++) {
            write_bytes(scales[i] & bytes_of(15), to.factors, 4 * i);
            write_bytes(scales[i] >> 4 & bytes_of(15), to.minima, 4 * i);
        }
        write_lowest<uint16_t>(both, to.scale);
        write_lowest<uint16_t>(both >> 16, to.minimum);
    }
};

struct Q3K : BlockSizes<110, 8, 3, 16> {
    static APART void pack(const uint8_t* const* rows, const PackedBlock& to) {
        pack_twos<3, 32>(rows, to.codes);
        RowWords own[3];
        read_words<96, 3>(rows, own);
        for (int i = 0; i < 4; i++) {
            RowWords low = own[i % 2] >> i / 2 * 4 & bytes_of(15), high = own[2] >> 2 * i & bytes_of(3);
            write_bytes(((low | high << 4 | bytes_of(128)) - bytes_of(32)) ^ bytes_of(128), to.factors, 4 * i);
        }
        write_lowest<uint16_t>(read_word<106>(rows) >> 16, to.scale);
    }
};

// Q4_K and Q5_K.
template <int BITS>
struct FourK : BlockSizes<16 + 32 * BITS, 8, BITS, 8, true> {
    static APART void pack(const uint8_t* const* rows, const PackedBlock& to) {
        RowWords head[4], high[8], codes[32], *packed = to.codes;
        read_words<0, 4>(rows, head);
        read_words<FourK::BYTES - 128, 32>(rows, codes);
        if (BITS == 5) read_words<16, 8>(rows, high);
        for (int u = 0; u < 8; u++, packed += BITS) {
            pack_halves(codes + u / 2 * 8, u % 2 * 4, packed);
            if (BITS == 5) packed[BITS - 1] = RowWords{}, add_packed<1>(high, u, packed + 4);
        }
        write_lowest<uint16_t>(head[0], to.scale);
        write_lowest<uint16_t>(head[0] >> 16, to.minimum);
        write_bytes(head[1] & bytes_of(63), to.factors, 0);
        write_bytes((head[3] & bytes_of(15)) | (head[1] >> 2 & bytes_of(48)), to.factors, 4);
        write_bytes(head[2] & bytes_of(63), to.minima, 0);
        write_bytes((head[3] >> 4 & bytes_of(15)) | (head[2] >> 2 & bytes_of(48)), to.minima, 4);
    }
};

struct Q6K : BlockSizes<210, 8, 6, 16> {
    static APART void pack(const uint8_t* const* rows, const PackedBlock& to) {
        RowWords codes[52], *packed = to.codes;
        read_words<0, 52>(rows, codes);
        for (int u = 0; u < 8; u++, packed += 6) {
            pack_halves(codes + u / 4 * 16 + u % 2 * 8, u % 4 / 2 * 4, packed);
            packed[4] = packed[5] = RowWords{};
            add_packed<2>(codes + 32 + u / 4 * 8, u % 4 * 2, packed + 4);
        }
        for (int i = 0; i < 4; i++) write_bytes(codes[48 + i], to.factors, 4 * i);
        write_lowest<uint16_t>(read_word<206>(rows) >> 16, to.scale);
    }
};

struct Iq4Xs : BlockSizes<136, 8, 4, 8> {
    static APART void pack(const uint8_t* const* rows, const PackedBlock& to) {
        RowWords head[2];
        read_words<0, 2>(rows, head);
        read_words<8, 32>(rows, to.codes);
        write_lowest<uint16_t>(head[0], to.scale);
        for (int g = 0; g < 8; g++) {
            RowWords factors = (head[1] >> 4 * g & 15) | (head[0] >> (16 + 2 * g) & 3) << 4;
            write_lowest<uint8_t>(factors - 32, to.factors, g);
        }
    }
};

// The code of a column of a packed unit, in the order of pack_codes.
template <int64_t BITS>
static int64_t code_at(const RowWords* unit, int64_t lane, int64_t column) {
    int64_t s = column / 4, shift = column % 4 * 8;
    auto bits = [&](int64_t word, int64_t place, int64_t count) {
        return int64_t(unit[word][lane] >> (shift + place)) & ((1 << count) - 1);
    };
    if (BITS == 8) return bits(s, 0, 8);
    int64_t code = BITS < 4 ? bits(s / 4, s % 4 * 2, 2) : bits(s % 4, s / 4 * 4, 4);
    if (BITS == 3) code |= bits(2, s, 1) << 2;
    if (BITS == 5) code |= bits(4, s, 1) << 4;
    if (BITS == 6) code |= bits(4 + s / 4, s % 4 * 2, 2) << 4;
    return code;
}

// A float16 number, or 2^(e - 128) for one byte.
static float widened_scale(const uint8_t* from, int64_t bytes) {
    if (bytes == 1) return ldexpf(1.0f, *from - 128);
    uint16_t half;
    memcpy(&half, from, 2);
    return _cvtsh_ss(half);
}

// Packs rows of `blocks` blocks each. Outputs that the last panel does not have repeat the last one.
template <class Format>
static void pack_rows(
    const uint8_t* rows, int64_t stride, int64_t outputs, int64_t blocks, const PackedBlock& packed,
    int threads) {
    for_each((outputs + PANEL - 1) / PANEL, threads, [&](int64_t p) {
        const uint8_t* own[PANEL];
        for (int64_t o = 0; o < PANEL; o++)
            own[o] = rows + (p * PANEL + o < outputs ? p * PANEL + o : outputs - 1) * stride;
        for (int64_t b = p * blocks; b < (p + 1) * blocks; b++) {
            int64_t factors = b * Format::FACTORS * PANEL;
            Format::pack(own, {
                packed.codes + b * Format::UNITS * Format::WORDS,
                packed.scale + b * PANEL * sizeof(typename Format::Scale),
                packed.minimum + b * PANEL * 2, packed.factors + factors, packed.minima + factors});
            for (int64_t o = 0; o < PANEL; o++) own[o] += Format::BYTES;
        }
    });
}

// Writes the widened rows `ids` of a matrix to y, in the order of operations of groups.py. Rows are packed
// 16 at a time, so that all formats have one order of codes. table: null if codes less `zero` are values.
template <class Format, class T>
static void look_up_rows(
    const uint8_t* rows, int64_t stride, int64_t blocks, const int64_t* ids, int64_t count,
    const int8_t* table, int64_t zero, T* y) {
    constexpr int64_t BLOCK = Format::UNITS * UNIT, SIZE = Format::FACTORS ? Format::FACTORS : 1;
    constexpr int64_t BYTES = sizeof(typename Format::Scale);
    for (int64_t first = 0; first < count; first += PANEL) {
        int64_t some = count - first < PANEL ? count - first : PANEL;
        for (int64_t b = 0; b < blocks; b++) {
            RowWords codes[Format::UNITS * Format::WORDS];
            uint8_t scale[PANEL * BYTES], minimum[PANEL * 2], factors[SIZE * PANEL], minima[SIZE * PANEL];
            const uint8_t* own[PANEL];
            for (int64_t o = 0; o < PANEL; o++)
                own[o] = rows + ids[first + (o < some ? o : 0)] * stride + b * Format::BYTES;
            Format::pack(own, {codes, scale, minimum, factors, minima});
            for (int64_t o = 0; o < some; o++) {
                T* to = y + ((first + o) * blocks + b) * BLOCK;
                float step = widened_scale(scale + o * BYTES, BYTES);
                float low = Format::MINIMUM ? widened_scale(minimum + 2 * o, 2) : 0.0f;
                for (int64_t i = 0; i < BLOCK; i++) {
                    int64_t code = code_at<Format::WORDS>(codes + i / UNIT * Format::WORDS, o, i % UNIT);
                    int64_t group = i * SIZE / BLOCK * PANEL + o;
                    float factor = Format::FACTORS ? step * float(int8_t(factors[group])) : step;
                    float value = factor * float(table ? table[code] : code - zero);
                    if (Format::MINIMUM) value -= Format::FACTORS ? low * float(minima[group]) : low;
                    to[i] = narrow<T>(value);
                }
            }
        }
    }
}

#define PACK(NAME, ...)                                                                            \
    EXPORT void look_up_##NAME##_float32(                                                          \
        const uint8_t* rows, int64_t stride, int64_t blocks, const int64_t* ids, int64_t count,    \
        const int8_t* table, int64_t zero, float* y) {                                             \
        look_up_rows<__VA_ARGS__>(rows, stride, blocks, ids, count, table, zero, y);               \
    }                                                                                              \
    EXPORT void look_up_##NAME##_bfloat16(                                                         \
        const uint8_t* rows, int64_t stride, int64_t blocks, const int64_t* ids, int64_t count,    \
        const int8_t* table, int64_t zero, BFloat16* y) {                                          \
        look_up_rows<__VA_ARGS__>(rows, stride, blocks, ids, count, table, zero, y);               \
    }                                                                                              \
    EXPORT void pack_##NAME(                                                                       \
        const uint8_t* rows, int64_t stride, int64_t outputs, int64_t blocks, RowWords* codes,        \
        uint8_t* scale, uint8_t* minimum, uint8_t* factors, uint8_t* minima, int threads) {        \
        pack_rows<__VA_ARGS__>(                                                                    \
            rows, stride, outputs, blocks, {codes, scale, minimum, factors, minima}, threads);     \
    }

PACK(q4_0, OneUnit<4, 2>)
PACK(q4_1, OneUnit<4, 4, true>)
PACK(q5_0, OneUnit<5, 6, false, 2>)
PACK(q5_1, OneUnit<5, 8, true, 4>)
PACK(q8_0, OneUnit<8, 2>)
PACK(q2_k, Q2K)
PACK(q3_k, Q3K)
PACK(q4_k, FourK<4>)
PACK(q5_k, FourK<5>)
PACK(q6_k, Q6K)
PACK(iq4_nl, OneUnit<4, 2>)
PACK(iq4_xs, Iq4Xs)
PACK(mxfp4, OneUnit<4, 1, false, 0, uint8_t>)

// --- Products ------------------------------------------------------------------------------------------

// The outputs of one register, which start at `lane` of a panel, and the arithmetic of their sums.
template <class R, class C, int FACTORS, bool MINIMA>
struct Place {
    typedef typename R::Ints Ints;
    typedef typename R::Floats Floats;
    static constexpr int HALVES = FACTORS == 2 ? 2 : 1;
    const PackedGroups& w;
    const uint8_t* codes;
    int64_t units, blocks;  // places of the first ones
    Ints table = {}, factors[2];
    Floats minima[2], scale, minimum;

    Place(const PackedGroups& w, int64_t panel, int64_t lane)
        : w(w), codes(w.codes + (panel * w.units * C::WORDS * PANEL + lane) * 4),
          units(panel * w.units * HALVES * PANEL + lane),
          blocks(panel * (w.units / w.block) * PANEL + lane) {
        if constexpr (C::IS_SIGNED)
            if (w.table) table = R::table(w.table);
    }

    void unpack(int64_t u, Ints* to) const {
        C::template unpack<R>(codes + u * C::WORDS * PANEL * 4, table, to);
    }

    Ints zeros(int64_t b) const {
        return R::all(C::IS_SIGNED ? R::BIAS : 0) - R::widened(w.zeros + blocks + b * PANEL);
    }

    void load_factors(int64_t u) {
        for (int h = 0; FACTORS && h < HALVES; h++)
            factors[h] = R::widened(w.factors + units + (u * HALVES + h) * PANEL);
    }
    void load_minima(int64_t u) {
        for (int h = 0; FACTORS && MINIMA && h < HALVES; h++)
            minima[h] = R::floats(R::widened(w.minima + units + (u * HALVES + h) * PANEL));
    }

    // Adds the sums of both halves of a unit, or of all of it, to those of a block.
    void add(const Ints* found, const Unit& row, Floats& part) const {
        Ints whole = FACTORS == 2 ? found[0] * factors[0] + found[1] * factors[1] : found[0];
        if (FACTORS == 1) whole *= factors[0];
        part = R::multiply_add(R::floats(whole), R::all(row.step), part);
    }
    void add_minima(const Unit& row, Floats& low) const {
        if (FACTORS == 0) low += row.sum;
        if (FACTORS == 1) low = R::multiply_add(minima[0], R::all(row.sum), low);
        for (int h = 0; FACTORS == 2 && h < 2; h++)
            low = R::multiply_add(minima[h], R::all(row.sums[h]), low);
    }

    void load_scales(int64_t b) {
        scale = ::load_scales<R>(w.scale, blocks + b * PANEL, w.scale_kind);
        if (MINIMA) minimum = ::load_scales<R>(w.minimum, blocks + b * PANEL, HALF);
    }

    Floats with_block(Floats total, Floats part, Floats low) const {
        total = R::multiply_add(part, scale, total);
        return MINIMA ? R::multiply_add(-low, minimum, total) : total;
    }
};

// Ways to multiply all rows with a panel, for some blocks. Sums are [rows, 16].
//
// Both halves of a panel and at most four rows, for 16 registers of 256 bits.
struct ByHalves {
    typedef HalfLanes R;
    typedef R::Ints Ints;
    typedef R::Floats Floats;
    static constexpr int64_t WIDTH = PANEL / 2;

    template <class C, int FACTORS, bool MINIMA, bool ZEROS = false>
    static void multiply(
        const PackedGroups& w, int64_t panel, const Unit* x, int64_t rows, int64_t, int64_t begin,
        int64_t end, float* sums) {
        const uint8_t* codes = w.codes + panel * w.units * C::WORDS * WORD_BYTES;
        int64_t r = 0, first = begin * w.block, units = (end - begin) * w.block;
        if constexpr (C::IN_TWO_PARTS)
            if (rows >= MANY_ROWS && units <= CHUNK) {
                Ints unpacked[CHUNK][8][2];
                for (int64_t u = 0; u < units; u++) {
                    const uint8_t* from = codes + (first + u) * C::WORDS * WORD_BYTES;
                    C::prefetch(from);
                    for (int s = 0; s < 8; s++)
                        for (int i = 0; i < 2; i++)
                            unpacked[u][s][i] = C::template word<R>(from + i * sizeof(Ints), Ints{}, s);
                }
                for (; rows - r > 3; r += 4)
                    multiply_rows<Unpacked<C>, FACTORS, MINIMA, ZEROS, 4>(
                        w, (const uint8_t*)(unpacked - first), panel, x + r * w.stride(), begin, end,
                        sums + r * PANEL);
            }
        for (int64_t count; r < rows; r += count) {
            count = rows - r > 3 ? 4 : rows - r > 1 ? 2 : 1;
            auto function = count == 4 ? multiply_rows<C, FACTORS, MINIMA, ZEROS, 4>
                : count == 2           ? multiply_rows<C, FACTORS, MINIMA, ZEROS, 2>
                                       : multiply_rows<C, FACTORS, MINIMA, ZEROS, 1>;
            function(w, codes, panel, x + r * w.stride(), begin, end, sums + r * PANEL);
        }
    }

  private:
    // codes: of the units of the panel.
    template <class C, int FACTORS, bool MINIMA, bool ZEROS, int ROWS>
    static void multiply_rows(
        const PackedGroups& w, const uint8_t* codes, int64_t panel, const Unit* x, int64_t begin,
        int64_t end, float* sums) {
        typedef Place<R, C, FACTORS, MINIMA> Own;
        constexpr int HALVES = Own::HALVES;
        // Sums of two products reach 2 * 127 * MOST. 16 bits have room for those of all words, two or one.
        constexpr int ROOM = C::MOST == 128 ? 1 : 32767 / (2 * 127 * C::MOST);
        constexpr bool ALL_FIT = HALVES == 1 && ROOM >= 8;
        constexpr int STEPS = ALL_FIT || ROOM == 1 ? 1 : 2;
        // Other formats have no codes that stand for negative numbers.
        constexpr bool HAS_START = !MINIMA && FACTORS != 1;
        int64_t stride = w.stride();
        Own places[2] = {Own(w, panel, 0), Own(w, panel, WIDTH)};
        for (int64_t b = begin; b < end; b++) {
            Floats part[2][ROWS] = {}, low[2][ROWS] = {};
            for (int64_t u = b * w.block; u < (b + 1) * w.block; u++) {
                const uint8_t* from = codes + u * C::WORDS * WORD_BYTES;
                Ints sum[2][ROWS] = {}, factors[2][2], starts[2];
                C::prefetch(from);
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) {
                    const Ints* own = places[i].factors;
                    places[i].load_factors(u);
#pragma GCC unroll 2
                    for (int h = 0; h < HALVES; h++)
                        factors[i][h] = FACTORS ? R::pairs(own[h], own[h]) : R::all(0x10001);
                    if (FACTORS == 2) starts[i] = R::times(R::pairs(own[0], own[1]), int16_t(-w.zero));
                }
#pragma GCC unroll 8
                for (int s = 0; s < 8; s += STEPS) {
                    Ints own[2][STEPS];
#pragma GCC unroll 2
                    for (int t = 0; t < STEPS; t++)
#pragma GCC unroll 2
                        for (int i = 0; i < 2; i++)
                            own[i][t] = C::template word<R>(
                                from + i * sizeof(Ints), places[i].table, s + t);
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                        for (int i = 0; i < 2; i++) {
                            const int32_t* words = x[r * stride + u].words + s;
                            Ints found = R::product<C::MOST>(own[i][0], words[0]);
                            if (STEPS == 2)
                                found = R::add_shorts(
                                    found, R::product<C::MOST>(own[i][STEPS - 1], words[STEPS - 1]));
                            if (ALL_FIT)
                                sum[i][r] = R::add_shorts(sum[i][r], found);
                            else
                                sum[i][r] += R::multiply_pairs(found, factors[i][s * HALVES / 8]);
                            // GCC would add later, and has no registers for that many products.
                            asm("" : "+x"(sum[i][r]));
                        }
                }
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                    for (int i = 0; i < 2; i++) {
                        const Unit& row = x[r * stride + u];
                        Ints whole = ALL_FIT ? R::multiply_pairs(sum[i][r], factors[i][0]) : sum[i][r];
                        if (HAS_START && FACTORS == 2)
                            whole += R::multiply_pairs(R::all(row.halves), starts[i]);
                        else if (HAS_START)
                            whole += ZEROS ? R::all(row.start) * places[i].zeros(b) : R::all(row.start);
                        part[i][r] = R::multiply_add(R::floats(whole), R::all(row.step), part[i][r]);
                    }
            }
            // In a loop of their own, because both sums and the codes do not fit the registers.
            for (int64_t u = b * w.block; MINIMA && u < (b + 1) * w.block; u++)
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) {
                    places[i].load_minima(u);
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++) places[i].add_minima(x[r * stride + u], low[i][r]);
                }
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                places[i].load_scales(b);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) {
                    auto& total = *(R::UnalignedFloats*)(sums + r * PANEL + i * WIDTH);
                    total = places[i].with_block(b ? (Floats)total : Floats{}, part[i][r], low[i][r]);
                }
            }
        }
    }
};

#ifdef __AVX512VNNI__
// Few rows at a time, whose sums stay in registers.
struct ByLanes {
    typedef FullLanes R;
    typedef R::Ints Ints;
    typedef R::Floats Floats;

    template <class C, int FACTORS, bool MINIMA, bool ZEROS = false>
    static void multiply(
        const PackedGroups& w, int64_t panel, const Unit* x, int64_t rows, int64_t, int64_t begin,
        int64_t end, float* sums) {
        for (int64_t r = 0, count; r < rows; r += count) {
            int64_t left = rows - r;
            count = left == 6 || left > 9 ? 6 : left > 3 ? 4 : left > 1 ? 2 : 1;
            auto function = count == 6 ? multiply_rows<C, FACTORS, MINIMA, ZEROS, 6>
                : count == 4           ? multiply_rows<C, FACTORS, MINIMA, ZEROS, 4>
                : count == 2           ? multiply_rows<C, FACTORS, MINIMA, ZEROS, 2>
                                       : multiply_rows<C, FACTORS, MINIMA, ZEROS, 1>;
            function(w, panel, x + r * w.stride(), begin, end, sums + r * PANEL);
        }
    }

  private:
    template <class C, int FACTORS, bool MINIMA, bool ZEROS, int ROWS>
    static void multiply_rows(
        const PackedGroups& w, int64_t panel, const Unit* x, int64_t begin, int64_t end, float* sums) {
        typedef Place<R, C, FACTORS, MINIMA> Own;
        constexpr int HALVES = Own::HALVES, WORDS = 8 / HALVES;
        int64_t stride = w.stride();
        Own place(w, panel, 0);
        Floats total[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            total[r] = begin ? (Floats)*(const R::UnalignedFloats*)(sums + r * PANEL) : Floats{};
        for (int64_t b = begin; b < end; b++) {
            Floats part[ROWS] = {}, low[ROWS] = {};
            Ints zeros = ZEROS ? place.zeros(b) : Ints{};
            for (int64_t u = b * w.block; u < (b + 1) * w.block; u++) {
                Ints own[8];
                place.unpack(u, own);
                place.load_factors(u);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const Unit& row = x[r * stride + u];
                    Ints found[2];
#pragma GCC unroll 2
                    for (int h = 0; h < HALVES; h++) {
                        Ints start = R::all(HALVES == 2 ? row.starts[h] : row.start);
                        if (ZEROS) start *= zeros;
                        found[h] = R::add<WORDS>(start, own + WORDS * h, row.words + WORDS * h);
                    }
                    place.add(found, row, part[r]);
                }
            }
            // In a loop of their own, because both sums and the codes do not fit the registers.
            for (int64_t u = b * w.block; MINIMA && u < (b + 1) * w.block; u++) {
                place.load_minima(u);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) place.add_minima(x[r * stride + u], low[r]);
            }
            place.load_scales(b);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) total[r] = place.with_block(total[r], part[r], low[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) *(R::UnalignedFloats*)(sums + r * PANEL) = total[r];
    }
};

// Codes are unpacked once for all rows. Tiles sum a unit or half of one, and lanes do the rest.
template <class Tiles>
struct ByTiles {
    typedef TileRegion<Tiles> Region;
    typedef FullLanes R;
    typedef R::Ints Ints;
    typedef R::Floats Floats;

    template <class C, int FACTORS, bool MINIMA, bool ZEROS = false>
    static void multiply(
        const PackedGroups& w, int64_t panel, const Unit* x, int64_t rows, int64_t tile_rows,
        int64_t begin, int64_t end, float* sums) {
        constexpr int SUMS = FACTORS == 2 ? 2 : 1;
        alignas(64) Ints codes[CHUNK][8], products[2][SUMS][TILE_SIZE];
        Floats part[TILE_SIZE], low[TILE_SIZE];
        Place<R, C, FACTORS, MINIMA> place(w, panel, 0);
        int64_t first = begin * w.block, last = end * w.block;
        for (int64_t u = first; u < last; u++) place.unpack(u, codes[u - first]);
        for (int64_t t = 0; t < rows; t += tile_rows) {
            const Unit* own = x + t * w.stride();
            int64_t count = rows - t < tile_rows ? rows - t : tile_rows;
            auto start = [&](int64_t u) {
                const Ints* code = codes[u - first];
                Ints(*to)[TILE_SIZE] = products[u % 2];
                Tiles::template zero<0>();
                Tiles::template load<4>(own[u].words, w.stride() * sizeof(Unit));
                Tiles::template load<6>(code, sizeof(Ints));
                Tiles::template multiply_codes<0, 4, 6>();
                Tiles::template store<0>(to[0], sizeof(Ints));
                if (SUMS == 1) return;
                Tiles::template zero<1>();
                Tiles::template load<5>(own[u].words + 4, w.stride() * sizeof(Unit));
                Tiles::template load<7>(code + 4, sizeof(Ints));
                Tiles::template multiply_codes<1, 5, 7>();
                Tiles::template store<1>(to[SUMS - 1], sizeof(Ints));
            };
            start(first);
            for (int64_t b = begin; b < end; b++) {
                for (int r = 0; r < count; r++) part[r] = low[r] = Floats{};
                Ints zeros = ZEROS ? place.zeros(b) : Ints{};
                for (int64_t u = b * w.block; u < (b + 1) * w.block; u++) {
                    if (u + 1 < last) start(u + 1);
                    place.load_factors(u), place.load_minima(u);
                    for (int r = 0; r < count; r++) {
                        const Unit& row = own[r * w.stride() + u];
                        Ints found[2] = {products[u % 2][0][r], products[u % 2][SUMS - 1][r]};
                        if constexpr (SUMS == 2) {
                            found[0] += row.starts[0], found[1] += row.starts[1];
                        } else {
                            Ints both = R::all(row.start);
                            found[0] += ZEROS ? both * zeros : both;
                        }
                        place.add(found, row, part[r]);
                        if (MINIMA) place.add_minima(row, low[r]);
                    }
                }
                place.load_scales(b);
                for (int r = 0; r < count; r++) {
                    auto* total = (Floats*)(sums + (t + r) * PANEL);
                    *total = place.with_block(b == 0 ? Floats{} : *total, part[r], low[r]);
                }
            }
        }
    }
};
#endif

typedef void (*Chunk)(
    const PackedGroups&, int64_t, const Unit*, int64_t, int64_t, int64_t, int64_t, float*);

// The combinations that formats have.
template <class Way>
static Chunk chunk_of(const PackedGroups& w) {
    typedef Codes<4, true> Table;
    typedef Codes<4, false> Four;
    typedef Codes<5, false> Five;
    typedef Codes<8, false> Eight;
    int64_t factors = w.factors ? w.halves : 0;
    bool minima = w.minimum != nullptr, zeros = w.zeros != nullptr;
    if (w.table)
        return factors ? Way::template multiply<Table, 1, false>
                       : Way::template multiply<Table, 0, false>;
    switch (w.bits) {
        case 2: return Way::template multiply<Codes<2, false>, 2, true>;
        case 3: return Way::template multiply<Codes<3, false>, 2, false>;
        case 5:
            return factors ? Way::template multiply<Five, 1, true>
                : minima   ? Way::template multiply<Five, 0, true>
                           : Way::template multiply<Five, 0, false>;
        case 6: return Way::template multiply<Codes<6, false>, 2, false>;
        case 8:
            return zeros ? Way::template multiply<Eight, 0, false, true>
                         : Way::template multiply<Eight, 0, false>;
    }
    return factors ? Way::template multiply<Four, 1, true>
        : minima   ? Way::template multiply<Four, 0, true>
        : zeros    ? Way::template multiply<Four, 0, false, true>
                   : Way::template multiply<Four, 0, false>;
}

// --- Activations -----------------------------------------------------------------------------------------

constexpr float MIN_LARGEST = 1e-30f;  // as in groups.py

// The values of groups.quantize_units. starts are sums of x times `factor`.
template <class T>
static void quantize_unit(const T* x, int64_t count, int32_t factor, Unit* to) {
    alignas(64) float wide[UNIT];
    for (int64_t i = 0; i < UNIT; i += LANES)
        store(wide + i, count > i ? load_part(x + i, count - i) : Lanes{});
    __m256i most = _mm256_setzero_si256(), size = _mm256_set1_epi32(0x7fffffff), numbers[4];
    for (int i = 0; i < 4; i++)  // as integers, in which NaN is larger than infinity
        most = _mm256_max_epi32(most, _mm256_load_si256((const __m256i*)wide + i) & size);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    float largest = _mm_cvtss_f32(_mm_castsi128_ps(four));
    largest = largest <= MIN_LARGEST ? MIN_LARGEST : largest;
    __m256 inverse = _mm256_set1_ps(127.0f / largest);
    for (int i = 0; i < 4; i++)
        numbers[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(wide + 8 * i), inverse));
    __m256i bytes = _mm256_packs_epi16(
        _mm256_packs_epi32(numbers[0], numbers[1]), _mm256_packs_epi32(numbers[2], numbers[3]));
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_store_si256((__m256i*)to->words, bytes);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
    __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    sums = _mm256_hadd_epi32(sums, sums);
    sums = _mm256_hadd_epi32(sums, sums);
    to->step = largest / 127.0f;
    uint16_t halves[2];
    for (int h = 0; h < 2; h++) {
        int32_t sum = h ? _mm256_extract_epi32(sums, 4) : _mm256_extract_epi32(sums, 0);
        to->starts[h] = factor * sum;
        halves[h] = uint16_t(sum);
        to->sums[h] = to->step * float(sum);
    }
    to->sum = to->sums[0] + to->sums[1];
    to->start = to->starts[0] + to->starts[1];
    to->halves = halves[0] | halves[1] << 16;
}

// Rows in int8 times a weight. Its items, some panels each, are independent of each other.
template <class R, class Way, class T>
struct Product {
    static constexpr bool IS_TILED = !std::is_same_v<Way, typename R::Few>;
    const PackedGroups& w;
    const T* bias;
    const Unit* units;
    int64_t rows, tile_rows;
    T* y;
    int64_t y_stride;
    Chunk chunk;
    int64_t panels, blocks, step, together, block_rows;

    // Few rows are faster in lanes.
    static bool has_tiles(int64_t rows) { return IS_TILED && rows >= 8; }
    static int64_t rows_of_tile(int64_t rows) {
        int64_t tiles = (rows + TILE_SIZE - 1) / TILE_SIZE;
        return has_tiles(rows) ? (rows + tiles - 1) / tiles : 1;
    }
    // Number of rows that `units` must have.
    static int64_t padded(int64_t rows) {
        int64_t multiple = rows_of_tile(rows);
        return (rows + multiple - 1) / multiple * multiple;
    }

    Product(
        const PackedGroups& w, const T* bias, const Unit* units, int64_t rows, T* y, int64_t y_stride)
        : w(w), bias(bias), units(units), rows(rows), tile_rows(rows_of_tile(rows)), y(y),
          y_stride(y_stride), chunk(has_tiles(rows) ? chunk_of<Way>(w) : chunk_of<typename R::Few>(w)),
          panels((w.outputs + PANEL - 1) / PANEL), blocks(w.units / w.block) {
        bool are_many = rows >= BLOCK_ROWS || has_tiles(rows);
        step = are_many ? CHUNK / w.block : blocks, together = are_many ? MANY_PANELS : 1;
        block_rows = has_tiles(rows) ? 2 * tile_rows : BLOCK_ROWS;
    }

    // Computes an item outside of `for_each`.
    void alone(int64_t item) const {
        if constexpr (IS_TILED)
            if (has_tiles(rows)) {
                typename Way::Region region(tile_rows, tile_words());
                return (*this)(item);
            }
        (*this)(item);
    }

    int64_t items() const { return (panels + together - 1) / together; }
    int64_t cycles() const { return panels * w.units * (16 + 10 * rows); }
    int64_t tile_words() const { return w.factors && w.halves == 2 ? 4 : 8; }

    void operator()(int64_t item) const {
        alignas(64) float sums[MANY_PANELS][MOST_ROWS * PANEL];
        int64_t own = item * together, count = panels - own < together ? panels - own : together;
        for (int64_t begin = 0; begin < rows; begin += block_rows) {
            int64_t some = rows - begin < block_rows ? rows - begin : block_rows;
            const Unit* from = units + begin * w.stride();
            for (int64_t b = 0; b < blocks; b += step)
                for (int64_t p = 0; p < count; p++) {
                    int64_t end = b + step < blocks ? b + step : blocks;
                    chunk(w, own + p, from, some, tile_rows, b, end, sums[p]);
                }
            for (int64_t r = 0; r < some; r++)
                for (int64_t p = 0; p < count; p++) {
                    int64_t first = (own + p) * PANEL, left = w.outputs - first;
                    Lanes wide = load(sums[p] + r * PANEL);
                    if (bias) wide += load_part(bias + first, left);
                    store_part(y + (begin + r) * y_stride + first, wide, left);
                }
        }
    }
};

// Quantises a row for products with w.
template <class R, class T>
static void quantize(const T* row, const PackedGroups& w, Unit* to) {
    bool is_signed = w.table || w.bits == 8;  // with HalfLanes, which subtract their bias
    int64_t zero = (w.table ? 128 : w.zero) - (is_signed ? R::BIAS : 0);
    int32_t factor = w.zeros ? 1 : int32_t(-zero);
    for (int64_t u = 0; u < w.units; u++, row += UNIT)
        quantize_unit(row, w.columns - u * UNIT, factor, to + u);
}

// At most AT_ONCE rows.
template <class R, class Way, class T>
static void multiply_some(
    const T* x, int64_t stride, int64_t rows, const PackedGroups& w, const T* bias, T* y,
    int64_t y_stride, int threads) {
    typedef Product<R, Way, T> Own;
    static thread_local std::vector<Unit> memory;
    memory.resize(Own::padded(rows) * w.stride());
    Unit* units = memory.data();
    for_each(rows, threads_for(rows * w.columns, threads), [&](int64_t r) {
        quantize<R>(x + r * stride, w, units + r * w.stride());
    });
    Own product(w, bias, units, rows, y, y_stride);
    int used = threads_for(product.cycles(), threads);
    if constexpr (Own::IS_TILED)
        if (Own::has_tiles(rows))
            return for_each<typename Way::Region>(
                product.items(), used, product, product.tile_rows, product.tile_words());
    for_each(product.items(), used, product);
}

template <class R, class Way, class T>
static void multiply_groups(
    const T* x, int64_t stride, int64_t rows, const PackedGroups& w, const T* bias, T* y,
    int64_t y_stride, int threads) {
    for (int64_t r = 0; r < rows; r += AT_ONCE) {
        int64_t count = rows - r < AT_ONCE ? rows - r : AT_ONCE;
        multiply_some<R, Way>(
            x + r * stride, stride, count, w, bias, y + r * y_stride, y_stride, threads);
    }
}

// The kind of weight of experts.h.
template <class R_, class Way, class T>
struct GroupExperts {
    typedef PackedGroups Weight;
    typedef Unit Element;
    typedef ::Product<R_, Way, T> Product;

    static int64_t padded(int64_t rows) { return Product::padded(rows); }
    static int64_t stride(const Weight& w) { return w.stride(); }
    static void prepare(const T* row, const Weight& w, Unit* to) { quantize<R_>(row, w, to); }
    static Product product(const Weight& w, const Unit* x, int64_t rows, T* y, int) {
        return {w, nullptr, x, rows, y, w.outputs};
    }
};

#define PRODUCTS(NAME, T, ...)                                                                \
    EXPORT void linear_groups_##NAME(                                                              \
        const T* x, int64_t stride, int64_t rows, const PackedGroups* w, const T* bias, T* y,      \
        int64_t y_stride, int threads) {                                                           \
        multiply_groups<__VA_ARGS__>(x, stride, rows, *w, bias, y, y_stride, threads);             \
    }                                                                                              \
    EXPERTS(groups_##NAME, T, GroupExperts<__VA_ARGS__, T>)

PRODUCTS(half_lanes_float32, float, HalfLanes, ByHalves)
PRODUCTS(half_lanes_bfloat16, BFloat16, HalfLanes, ByHalves)
#ifdef __AVX512VNNI__
PRODUCTS(lanes_float32, float, FullLanes, ByLanes)
PRODUCTS(lanes_bfloat16, BFloat16, FullLanes, ByLanes)
#ifdef PLAIN_TILES
PRODUCTS(plain_tiles_float32, float, FullLanes, ByTiles<PlainTiles>)
#endif
#ifdef HAS_AMX
PRODUCTS(amx_float32, float, FullLanes, ByTiles<AmxTiles>)
PRODUCTS(amx_bfloat16, BFloat16, FullLanes, ByTiles<AmxTiles>)
#endif
#endif
#endif
