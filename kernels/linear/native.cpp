// x @ weight.T for a packed weight: panels of 64 outputs. A panel has, step after step, one 32-bit
// word of each output's row: a float32, two bfloat16 or four int8. Every output is summed word after
// word, in one register lane, for any number of rows and threads, so a row's bits do not depend on the
// batch. Tiles (amx.h) sum 16 words, then add them to an output's sum, also in one order. The blocking of
// rows and words below affects speed only.
#include "../amx.h"
#include "../experts.h"

#ifdef __AVX2__

constexpr int64_t PANEL = 64;        // outputs
constexpr int64_t TILE_ROWS = 6;     // their sums and operands fill the registers
constexpr int64_t FEW_ROWS = 8;      // minimum rows of integers that are faster in tiles
constexpr int64_t BLOCK_ROWS = 192;  // rows with sums in the cache
constexpr int64_t BLOCK_STEPS = 512; // steps of a panel kept in the cache while rows are processed

// Vectors of a panel that are summed at a time for `rows` rows.
constexpr int64_t vectors_of(int64_t rows) {
#ifdef TWO_REGISTERS
    return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
#else
    return 4;
#endif
}

// One step of 16 outputs: adds the product of a word of x with words of the weight to their sums.
struct Float32 {
    static constexpr int64_t WORDS = 1;  // words of x per step
    typedef Lanes Sum;
    static Lanes add(Lanes sum, const int32_t* x, Words w) {
        return multiply_add(all(*(const float*)x), (Lanes)w, sum);
    }
};

// Two bfloat16 of the weight times two float32.
struct BFloat16Halves : Float32 {
    static constexpr int64_t WORDS = 2;
    static Lanes add(Lanes sum, const int32_t* x, Words w) {
        sum = Float32::add(sum, x, w << 16);
        return Float32::add(sum, x + 1, w & 0xffff0000);
    }
};

#ifdef __AVX512BF16__
struct BFloat16Pairs : Float32 {
    static Lanes add(Lanes sum, const int32_t* x, Words w) {
        return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(*x), (__m512bh)w);
    }
};
#endif

// Four int8 of the weight times four of x, with RAISED added to them.
struct Int8Fours {
    static constexpr int64_t WORDS = 1;
    typedef Numbers Sum;
#if defined(__AVX512VNNI__)
    static constexpr int32_t RAISED = 128;
    static Numbers add(Numbers sum, const int32_t* x, Words w) {
        // GCC 12 spills the sums of its intrinsic to memory.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(*x)), "v"(w));
        return sum;
    }
#elif defined(__AVX512BW__)
    static constexpr int32_t RAISED = 0;
    static Numbers add(Numbers sum, const int32_t* x, Words w) {
        __m512i size = _mm512_abs_epi8((__m512i)w), word = _mm512_set1_epi32(*x);
        __m512i own = _mm512_mask_sub_epi8(
            word, _mm512_movepi8_mask((__m512i)w), _mm512_setzero_si512(), word);
        __m512i pairs = _mm512_maddubs_epi16(size, own);
        return sum + (Numbers)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    }
#else
    static constexpr int32_t RAISED = 0;
    static Numbers add(Numbers sum, const int32_t* x, Words w) {
        __m256i word = _mm256_set1_epi32(*x);
        return {half(sum.low, word, (__m256i)w.low), half(sum.high, word, (__m256i)w.high)};
    }
    static Numbers::Half half(Numbers::Half sum, __m256i x, __m256i w) {
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        return sum + (Numbers::Half)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#endif
};

template <class Sum>
static Sum read(const int32_t* from) {
    return (Sum)load((const float*)from);
}

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

// Adds some steps to the sums of a panel, which are 0 at `first`.
template <class Op, int ROWS>
static void tile(
    const int32_t* x, int64_t stride, const int32_t* weight, int64_t steps, int32_t* sums, bool first) {
    typedef typename Op::Sum Sum;
    constexpr int64_t VECTORS = vectors_of(ROWS);
    for (int64_t part = 0; part < PANEL; part += VECTORS * LANES) {
        const int32_t* w = weight + part;
        int32_t* own = sums + part;
        Sum acc[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                acc[r][v] = first ? Sum{} : read<Sum>(own + r * PANEL + v * LANES);
        for (int64_t s = 0; s < steps; s++, w += PANEL) {
            Words b[VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                _mm_prefetch((const char*)(w + 16 * PANEL + v * LANES), _MM_HINT_T0);
                b[v] = read<Words>(w + v * LANES);
            }
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++)
                    acc[r][v] = Op::add(acc[r][v], x + r * stride + s * Op::WORDS, b[v]);
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                store((float*)own + r * PANEL + v * LANES, (Lanes)acc[r][v]);
    }
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

// Calls finish(row, panel, sums) with the 64 sums of every row of panel p.
template <class Op, class Finish>
static void multiply_panel(
    const int32_t* x, int64_t stride, int64_t rows, const int32_t* w, int64_t steps, int64_t p,
    const Finish& finish) {
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
                    to - from, x + (begin + from) * stride + s * Op::WORDS, stride, panel + s * PANEL,
                    num_steps, sums + from * PANEL, s == 0);
            }
        }
        for (int64_t r = 0; r < count; r++) finish(begin + r, p, sums + r * PANEL);
    }
}

static int64_t panels_of(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

// The same for all panels.
template <class Op, class Finish>
static void multiply(
    const int32_t* x, int64_t stride, int64_t rows, const int32_t* w, int64_t steps,
    int64_t outputs, int threads, Finish finish) {
    int64_t panels = panels_of(outputs);
    for_each(panels, threads_for(panels * steps * (8 + 4 * rows), threads), [&](int64_t p) {
        multiply_panel<Op>(x, stride, rows, w, steps, p, finish);
    });
}

// Rows of x in tiles of M rows and 16 words, one after the other: a tile of x fills one register. Rows
// that are 4 KiB apart in x would evict each other from the cache. Missing rows and words are 0.
struct TiledRows {
    int64_t M, tiles, depth, rows;  // rows of a tile; tiles of rows; tiles of words; rows of x
    const int32_t* words;

    TiledRows(
        const int32_t* x, int64_t stride, int64_t rows, int64_t steps, int threads,
        std::vector<int32_t>& memory) : rows(rows) {
        tiles = (rows + TILE_SIZE - 1) / TILE_SIZE;
        M = (rows + tiles - 1) / tiles;
        depth = (steps + TILE_SIZE - 1) / TILE_SIZE;
        memory.resize(tiles * depth * M * TILE_SIZE + 16);
        auto* to = (int32_t*)((uintptr_t(memory.data()) + 63) / 64 * 64);
        words = to;
        for_each(tiles * M, threads_for(rows * steps / 4, threads), [&](int64_t row) {
            int32_t* first = to + (row / M * depth * M + row % M) * TILE_SIZE;
            for (int64_t d = 0; d < depth; d++) {
                int64_t left = steps - d * TILE_SIZE;
                int64_t count = row >= rows ? 0 : left < TILE_SIZE ? left : TILE_SIZE;
                int32_t* part = first + d * M * TILE_SIZE;
                if (count < TILE_SIZE) memset(part, 0, TILE_SIZE * 4);
                memcpy(part, (const char*)(x + row * stride + d * TILE_SIZE), count * 4);
            }
        });
    }

    const int32_t* tile(int64_t row_tile, int64_t d) const {
        return words + (row_tile * depth + d) * M * TILE_SIZE;
    }
};

// Operations on the registers of `Tiles`, for two bfloat16 or four int8 per word.
template <class Tiles>
struct BFloat16Tiles : Tiles {
    template <int SUM, int X, int W>
    static void multiply() {
        Tiles::template multiply_bfloat16<SUM, X, W>();
    }
};

template <class Tiles>
struct Int8Tiles : Tiles {
    template <int SUM, int X, int W>
    static void multiply() {
        Tiles::template multiply_int8<SUM, X, W>();
    }
};

constexpr int64_t BLOCK_TILES = 8;  // tiles of words, 32 KiB of a panel, kept in the cache for all rows
constexpr int64_t PANEL_BYTES = 4 * PANEL;

template <class Tiles, int T>
static void start(int32_t* sums, bool first) {
    if (first)
        Tiles::template zero<T>();
    else
        Tiles::template load<T>(sums, PANEL_BYTES);
}

// Adds `depth` tiles of words to the sums of two tiles of rows and 32 outputs.
template <class Tiles>
static void multiply_square(
    const TiledRows& x, int64_t row_tile, int64_t d, const int32_t* w, int64_t depth, int32_t* sums,
    bool first) {
    int32_t* below = sums + x.M * PANEL;
    start<Tiles, 0>(sums, first), start<Tiles, 1>(sums + 16, first);
    start<Tiles, 2>(below, first), start<Tiles, 3>(below + 16, first);
    for (int64_t end = d + depth; d < end; d++, w += TILE_SIZE * PANEL) {
        Tiles::template load<6>(w, PANEL_BYTES);
        Tiles::template load<4>(x.tile(row_tile, d), TILE_SIZE * 4);
        Tiles::template load<7>(w + 16, PANEL_BYTES);
        Tiles::template load<5>(x.tile(row_tile + 1, d), TILE_SIZE * 4);
        Tiles::template multiply<0, 4, 6>(), Tiles::template multiply<1, 4, 7>();
        Tiles::template multiply<2, 5, 6>(), Tiles::template multiply<3, 5, 7>();
    }
    Tiles::template store<0>(sums, PANEL_BYTES), Tiles::template store<1>(sums + 16, PANEL_BYTES);
    Tiles::template store<2>(below, PANEL_BYTES), Tiles::template store<3>(below + 16, PANEL_BYTES);
}

// The same for one tile of rows and 64 outputs, with weights that may come from memory.
template <class Tiles>
static void multiply_line(
    const TiledRows& x, int64_t row_tile, int64_t d, const int32_t* w, int64_t depth, int32_t* sums,
    bool first) {
    start<Tiles, 0>(sums, first), start<Tiles, 1>(sums + 16, first);
    start<Tiles, 2>(sums + 32, first), start<Tiles, 3>(sums + 48, first);
    for (int64_t end = d + depth; d < end; d++, w += TILE_SIZE * PANEL) {
        for (int64_t ahead = 0; ahead < TILE_SIZE * PANEL; ahead += 16)
            _mm_prefetch((const char*)(w + TILE_SIZE * PANEL + ahead), _MM_HINT_T0);
        Tiles::template load<4>(x.tile(row_tile, d), TILE_SIZE * 4);
        Tiles::template load<6>(w, PANEL_BYTES);
        Tiles::template load<7>(w + 16, PANEL_BYTES);
        Tiles::template multiply<0, 4, 6>(), Tiles::template multiply<1, 4, 7>();
        Tiles::template load<6>(w + 32, PANEL_BYTES);
        Tiles::template load<7>(w + 48, PANEL_BYTES);
        Tiles::template multiply<2, 4, 6>(), Tiles::template multiply<3, 4, 7>();
    }
    Tiles::template store<0>(sums, PANEL_BYTES), Tiles::template store<1>(sums + 16, PANEL_BYTES);
    Tiles::template store<2>(sums + 32, PANEL_BYTES), Tiles::template store<3>(sums + 48, PANEL_BYTES);
}

// Adds `depth` tiles of words of a panel to the sums of `count` tiles of rows.
template <class Tiles>
static void multiply_block(
    const TiledRows& x, int64_t row_tile, int64_t count, int64_t d, const int32_t* w, int64_t depth,
    int32_t* sums, bool first) {
    int64_t t = 0;
    for (; t + 2 <= count; t += 2)
        for (int64_t outputs = 0; outputs < PANEL; outputs += 32)
            multiply_square<Tiles>(
                x, row_tile + t, d, w + outputs, depth, sums + t * x.M * PANEL + outputs, first);
    if (t < count)
        multiply_line<Tiles>(x, row_tile + t, d, w, depth, sums + t * x.M * PANEL, first);
}

// The functions above, with tiles.
template <class Tiles, class Finish>
static void multiply_tiled_panel(
    const TiledRows& tiled, const int32_t* w, int64_t steps, int64_t p, const Finish& finish) {
    int64_t whole = steps / TILE_SIZE, last = steps % TILE_SIZE;
    constexpr int64_t BLOCK = BLOCK_ROWS / TILE_SIZE;
    alignas(64) int32_t sums[BLOCK_ROWS * PANEL], end[TILE_SIZE * PANEL];
    const int32_t* panel = w + p * steps * PANEL;
    if (last) {  // the next panel's words, times 0, could be NaN
        memset(end, 0, sizeof end);
        memcpy(end, panel + whole * TILE_SIZE * PANEL, last * PANEL_BYTES);
    }
    for (int64_t begin = 0; begin < tiled.tiles; begin += BLOCK) {
        int64_t count = tiled.tiles - begin < BLOCK ? tiled.tiles - begin : BLOCK;
        for (int64_t d = 0; d < whole; d += BLOCK_TILES) {
            int64_t depth = whole - d < BLOCK_TILES ? whole - d : BLOCK_TILES;
            multiply_block<Tiles>(
                tiled, begin, count, d, panel + d * TILE_SIZE * PANEL, depth, sums, d == 0);
        }
        if (last) multiply_block<Tiles>(tiled, begin, count, whole, end, 1, sums, whole == 0);
        int64_t row = begin * tiled.M, left = tiled.rows - row;
        for (int64_t r = 0; r < count * tiled.M && r < left; r++)
            finish(row + r, p, sums + r * PANEL);
    }
}

template <class Tiles, class Finish>
static void multiply_tiles(
    const int32_t* x, int64_t stride, int64_t rows, const int32_t* w, int64_t steps,
    int64_t outputs, int threads, Finish finish) {
    if (rows == 0) return;
    static thread_local std::vector<int32_t> memory;
    TiledRows tiled(x, stride, rows, steps, threads, memory);
    int64_t panels = panels_of(outputs), cycles = panels * steps * (8 + rows / 2);
    auto work = [&](int64_t p) { multiply_tiled_panel<Tiles>(tiled, w, steps, p, finish); };
    for_each<TileRegion<Tiles>>(panels, threads_for(cycles, threads), work, tiled.M);
}

// Ways to multiply, as a parameter of the exported functions.
template <class Op_>
struct ByLanes {
    typedef Op_ Op;
    typedef void Tiles;
    template <class... Arguments>
    static void multiply(Arguments... arguments) {
        ::multiply<Op>(arguments...);
    }
};

// Rows of two bfloat16 per word are widened once.
struct ByHalves {
    typedef BFloat16Halves Op;
    typedef void Tiles;
    template <class... Arguments>
    static void multiply(
        const int32_t* x, int64_t stride, int64_t rows, const int32_t* w, int64_t steps,
        int64_t outputs, int threads, Arguments... arguments) {
        static thread_local std::vector<float> memory;
        memory.resize(rows * steps * 2);
        float* wide = memory.data();
        for_each(rows, threads_for(rows * steps, threads), [&](int64_t row) {
            auto* from = (const BFloat16*)(x + row * stride);
            float* to = wide + row * steps * 2;
            for (int64_t i = 0; i < steps * 2; i++) to[i] = widen(from[i]);
        });
        ::multiply<BFloat16Halves>(
            (const int32_t*)wide, steps * 2, rows, w, steps, outputs, threads, arguments...);
    }
};

// Few rows of integers, which have the same sums in any order, are faster in lanes.
template <class Tiles_, class FewRows = void>
struct ByTiles {
    typedef FewRows Op;
    typedef Tiles_ Tiles;
    template <class... Arguments>
    static void multiply(const int32_t* x, int64_t stride, int64_t rows, Arguments... arguments) {
        if constexpr (!std::is_void_v<FewRows>)
            if (rows < FEW_ROWS) return ::multiply<FewRows>(x, stride, rows, arguments...);
        multiply_tiles<Tiles>(x, stride, rows, arguments...);
    }
};

// Results of sums of floats. scale: one per output, or null.
template <class T>
struct FloatResults {
    const float* scale;
    const T* bias;
    T* y;
    int64_t y_stride, outputs;

    void operator()(int64_t row, int64_t panel, const int32_t* sums) const {
        int64_t first = panel * PANEL, count = outputs - first < PANEL ? outputs - first : PANEL;
        T* to = y + row * y_stride + first;
        for (int64_t i = 0; i < count; i += LANES) {
            Lanes wide = load((const float*)sums + i);
            if (scale) wide *= load_part(scale + first + i, count - i);
            if (bias) wide += load_part(bias + first + i, count - i);
            store_part(to + i, wide, count - i);
        }
    }
};

template <class Product, class T>
static void multiply_float(
    const T* x, int64_t stride, int64_t rows, const int32_t* w, const float* scale, const T* bias,
    T* y, int64_t y_stride, int64_t steps, int64_t outputs, int threads) {
    constexpr int64_t PER_WORD = 4 / sizeof(T);
    FloatResults<T> finish = {scale, bias, y, y_stride, outputs};
    Product::multiply((const int32_t*)x, stride / PER_WORD, rows, w, steps, outputs, threads, finish);
}

// --- Eight bits ------------------------------------------------------------------------------------------

constexpr float MIN_LARGEST = 1e-30f;  // as int8.py has it

// The lowest bytes of numbers of 8 bits, rounded to nearest even.
static inline __m128i rounded_bytes(Lanes x) {
#ifdef TWO_REGISTERS
    __m256i low = _mm256_cvtps_epi32((__m256)x.low), high = _mm256_cvtps_epi32((__m256)x.high);
    __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
#else
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)x));
#endif
}

// Converts rows to int8 + RAISED; the same values as int8.quantize_rows.
template <class T>
static void quantize_row(const T* x, int64_t size, int64_t padded, uint8_t* to, float* scale) {
    Lanes most = {}, nothing = {};  // nothing stays 0 unless an element is infinite or NaN
    for (int64_t i = 0; i < size; i += LANES) {
        Lanes b = load_part(x + i, size - i);
        nothing += b * 0.0f;
        most = larger((Lanes)((Words)b & 0x7fffffff), most);
    }
    float row = largest(most), step = (row > MIN_LARGEST ? row : MIN_LARGEST) / 127.0f;
    __m128i raised = _mm_set1_epi8(char(Int8Fours::RAISED));
    for (int64_t i = 0; i < padded; i += LANES) {
        alignas(16) uint8_t bytes[LANES];
        __m128i own = _mm_add_epi8(rounded_bytes(load_part(x + i, size - i) / step), raised);
        _mm_store_si128((__m128i*)bytes, own);
        memcpy(to + i, bytes, padded - i < LANES ? padded - i : LANES);
    }
    *scale = step + sum(nothing);
}

// Results of sums of integers, with the scale of row r at row_scale[r * scale_stride].
template <class T>
struct IntegerResults {
    const float* row_scale;
    int64_t scale_stride;
    const int32_t* offsets;
    FloatResults<T> rest;

    void operator()(int64_t row, int64_t panel, const int32_t* sums) const {
        alignas(64) float wide[PANEL];
        int64_t first = panel * PANEL, left = rest.outputs - first, count = left < PANEL ? left : PANEL;
        for (int64_t i = 0; i < count; i += LANES) {
            Numbers whole = read<Numbers>(sums + i);
            if (Int8Fours::RAISED)
                whole -= (Numbers)load_part((const float*)offsets + first + i, count - i);
            Lanes scale = load_part(rest.scale + first + i, count - i);
            store(wide + i, floats(whole) * scale * row_scale[row * scale_stride]);
        }
        FloatResults<T> last = rest;
        last.scale = nullptr;
        last(row, panel, (const int32_t*)wide);
    }
};

template <class Product, class T>
static void multiply_int8(
    const T* x, int64_t stride, int64_t rows, int64_t size, const int32_t* w,
    const int32_t* offsets, const float* scale, const T* bias, T* y, int64_t y_stride,
    int64_t outputs, int threads) {
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
    IntegerResults<T> finish = {row_scale, 1, offsets, {scale, bias, y, y_stride, outputs}};
    Product::multiply(quantized, steps, rows, w, steps, outputs, threads, finish);
}

// --- Experts ---------------------------------------------------------------------------------------------

// A weight without a bias, as native.py describes it.
struct PackedWords {
    const int32_t *words, *offsets;
    const float* scale;
    int64_t outputs, columns, steps;
};

// The kind of weight of experts.h. A row of x is words, and the scale of eight bits.
template <class Way, class T, bool IS_INTEGER>
struct WordExperts {
    typedef PackedWords Weight;
    typedef int32_t Element;
    typedef typename Way::Op Op;
    typedef typename Way::Tiles Tiles;
    static constexpr bool ALWAYS_TILED = std::is_void_v<Op>;
    static constexpr bool IS_WIDENED = std::is_same_v<Op, BFloat16Halves>;

    static int64_t padded(int64_t rows) { return rows; }
    static int64_t stride(const PackedWords& w) { return w.steps * (1 + IS_WIDENED) + IS_INTEGER; }

    static void prepare(const T* row, const PackedWords& w, int32_t* to) {
        if constexpr (IS_INTEGER)
            quantize_row(row, w.columns, w.steps * 4, (uint8_t*)to, (float*)(to + w.steps));
        else if constexpr (IS_WIDENED)
            for (int64_t i = 0; i < w.columns; i++) ((float*)to)[i] = widen(row[i]);
        else
            memcpy(to, row, w.steps * 4);
    }

    struct Product {
        const PackedWords& w;
        const int32_t* x;
        int64_t rows;
        T* y;
        std::vector<int32_t> memory;
        std::vector<TiledRows> tiled;  // none, or one

        int64_t items() const { return panels_of(w.outputs); }
        int64_t cycles() const { return items() * w.steps * (8 + 4 * rows); }

        void alone(int64_t p) const {
            FloatResults<T> finish = {w.scale, nullptr, y, w.outputs, w.outputs};
            if constexpr (IS_INTEGER)
                multiply(p, IntegerResults<T>{
                    (const float*)x + w.steps, stride(w), w.offsets, finish});
            else
                multiply(p, finish);
        }

        template <class Results>
        void multiply(int64_t p, const Results& finish) const {
            if constexpr (!std::is_void_v<Tiles>)
                if (!tiled.empty()) {
                    TileRegion<Tiles> region(tiled[0].M);
                    return multiply_tiled_panel<Tiles>(tiled[0], w.words, w.steps, p, finish);
                }
            if constexpr (!ALWAYS_TILED)
                multiply_panel<Op>(x, stride(w), rows, w.words, w.steps, p, finish);
        }
    };

    static Product product(
        const PackedWords& w, const int32_t* x, int64_t rows, T* y, int threads) {
        Product made = {w, x, rows, y, {}, {}};
        if (!std::is_void_v<Tiles> && (ALWAYS_TILED || rows >= FEW_ROWS))
            made.tiled.emplace_back(x, stride(w), rows, w.steps, threads, made.memory);
        return made;
    }
};

#define LINEAR(NAME, T, ...)                                                                      \
    EXPORT void linear_##NAME(                                                                    \
        const T* x, int64_t stride, int64_t rows, const int32_t* w, const float* scale,           \
        const T* bias, T* y, int64_t y_stride, int64_t steps, int64_t outputs, int threads) {     \
        multiply_float<__VA_ARGS__>(                                                              \
            x, stride, rows, w, scale, bias, y, y_stride, steps, outputs, threads);               \
    }                                                                                             \
    EXPERTS(NAME, T, WordExperts<__VA_ARGS__, T, false>)

LINEAR(float32_lanes, float, ByLanes<Float32>)
LINEAR(bfloat16_halves, BFloat16, ByHalves)
#ifdef PLAIN_TILES
LINEAR(bfloat16_plain_tiles, BFloat16, ByTiles<BFloat16Tiles<PlainTiles>>)
#endif
#ifdef __AVX512BF16__
LINEAR(bfloat16_pairs, BFloat16, ByLanes<BFloat16Pairs>)
#endif
EXPORT void has_fast_pairs(int64_t* answer) {
#ifdef __AVX512BF16__
    __builtin_cpu_init();
    *answer = __builtin_cpu_is("amd") != 0;  // twice as fast as float32 there, and half elsewhere
#else
    *answer = 0;
#endif
}

#ifdef HAS_AMX
LINEAR(bfloat16_amx, BFloat16, ByTiles<BFloat16Tiles<AmxTiles>>)

EXPORT void permit_amx(int64_t* answer) { *answer = AmxTiles::are_permitted(); }
#endif

#define LINEAR_INT8(NAME, T, ...)                                                                \
    EXPORT void linear_int8_##NAME(                                                              \
        const T* x, int64_t stride, int64_t rows, int64_t size, const int32_t* w,                \
        const int32_t* offsets, const float* scale, const T* bias, T* y, int64_t y_stride,       \
        int64_t outputs, int threads) {                                                          \
        multiply_int8<__VA_ARGS__>(                                                              \
            x, stride, rows, size, w, offsets, scale, bias, y, y_stride, outputs, threads);      \
    }                                                                                            \
    EXPERTS(int8_##NAME, T, WordExperts<__VA_ARGS__, T, true>)

LINEAR_INT8(lanes_float32, float, ByLanes<Int8Fours>)
LINEAR_INT8(lanes_bfloat16, BFloat16, ByLanes<Int8Fours>)
#if defined(__AVX512VNNI__) && defined(PLAIN_TILES)
LINEAR_INT8(plain_tiles_float32, float, ByTiles<Int8Tiles<PlainTiles>>)
#endif
#ifdef HAS_AMX
LINEAR_INT8(amx_float32, float, ByTiles<Int8Tiles<AmxTiles>, Int8Fours>)
LINEAR_INT8(amx_bfloat16, BFloat16, ByTiles<Int8Tiles<AmxTiles>, Int8Fours>)
#endif
#endif
