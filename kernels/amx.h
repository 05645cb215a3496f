// Products of tiles: eight registers of at most 16 rows of 64 bytes, as AMX has them, and the same
// operations in plain C++, so that the code above them is tested on every processor.
//
// Registers 0 to 3 are sums [M, 16], 4 and 5 rows of x [M, K words], 6 and 7 weights [K words, 16].
// A word is two bfloat16 or four int8. M and K, at most 16, are set when the registers are configured.
#pragma once

#include "native.h"

constexpr int TILE_SIZE = 16;  // rows of a register, and words of a row

// Operand of LDTILECFG.
struct alignas(64) TileLayout {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileLayout(int64_t sum_rows, int64_t words) {
        for (int t = 0; t < 8; t++) {
            row_bytes[t] = 4 * (t == 4 || t == 5 ? words : TILE_SIZE);
            rows[t] = uint8_t(t < 6 ? sum_rows : words);
        }
    }
};
static_assert(sizeof(TileLayout) == 64, "the size that LDTILECFG reads");

// The registers of this thread in plain C++. Sums are made in the order of the processor's manual: a
// bfloat16 product sums the first and the second elements of the 16 words separately, then adds both
// to the register. Subnormal numbers are 0, in a region of `for_each`. Methods with it are for tests, and
// are compiled with PLAIN_TILES.
struct PlainTiles {
    struct Registers {
        uint8_t rows[8], row_bytes[8];
        int32_t words[8][TILE_SIZE][TILE_SIZE];
    };

    static Registers& registers() {
        static thread_local Registers own;
        return own;
    }

    static void configure(const TileLayout& layout) {
        for (int t = 0; t < 8; t++) {
            if (layout.palette != 1 || layout.row_bytes[t] > 64 || layout.rows[t] > 16)
                __builtin_trap();
            registers().rows[t] = layout.rows[t];
            registers().row_bytes[t] = uint8_t(layout.row_bytes[t]);
        }
        memset(registers().words, 0, sizeof registers().words);
    }

    static void release() { memset(&registers(), 0, sizeof registers()); }

    static void zero(int t) { memset(registers().words[t], 0, sizeof registers().words[t]); }

    static void load(int t, const void* from, int64_t stride) {
        for (int r = 0; r < registers().rows[t]; r++)
            memcpy(registers().words[t][r], (const char*)from + r * stride, registers().row_bytes[t]);
    }

    static void store(int t, void* to, int64_t stride) {
        for (int r = 0; r < registers().rows[t]; r++)
            memcpy((char*)to + r * stride, registers().words[t][r], registers().row_bytes[t]);
    }

    template <int T>
    static void zero() {
        zero(T);
    }

    template <int T>
    static void load(const void* from, int64_t stride) {
        load(T, from, stride);
    }

    template <int T>
    static void store(void* to, int64_t stride) {
        store(T, to, stride);
    }

    template <int SUM, int X, int W>
    static void multiply_bfloat16() {
        multiply_bfloat16(SUM, X, W);
    }

    // Unsigned bytes of x times signed bytes of w.
    template <int SUM, int X, int W>
    static void multiply_int8() {
        multiply_bytes<uint8_t, int8_t>(SUM, X, W);
    }

    // Signed bytes of x times unsigned bytes of w.
    template <int SUM, int X, int W>
    static void multiply_codes() {
        multiply_bytes<int8_t, uint8_t>(SUM, X, W);
    }

    static void check(int sum, int x, int w) {
        const uint8_t *rows = registers().rows, *bytes = registers().row_bytes;
        if (rows[sum] == 0 || rows[sum] != rows[x] || bytes[sum] != 64 || bytes[w] != 64 ||
            bytes[x] != 4 * rows[w])
            __builtin_trap();
    }

    static void multiply_bfloat16(int sum, int x, int w) {
        check(sum, x, w);
        auto& words = registers().words;
        auto half = [](int32_t word, int h) { return widen(BFloat16{uint16_t(word >> (16 * h))}); };
        for (int r = 0; r < registers().rows[sum]; r++)
            for (int n = 0; n < TILE_SIZE; n++) {
                float sums[2] = {}, total;
                for (int k = 0; k < registers().rows[w]; k++)
                    for (int h = 0; h < 2; h++)
                        sums[h] = __builtin_fmaf(
                            half(words[x][r][k], h), half(words[w][k][n], h), sums[h]);
                memcpy(&total, &words[sum][r][n], 4);
                total += sums[0] + sums[1];
                memcpy(&words[sum][r][n], &total, 4);
            }
    }

    template <class FromX, class FromW>
    static void multiply_bytes(int sum, int x, int w) {
        check(sum, x, w);
        auto& words = registers().words;
        for (int r = 0; r < registers().rows[sum]; r++)
            for (int n = 0; n < TILE_SIZE; n++)
                for (int k = 0; k < registers().rows[w]; k++)
                    for (int b = 0; b < 32; b += 8)
                        words[sum][r][n] +=
                            int32_t(FromX(words[x][r][k] >> b)) * FromW(words[w][k][n] >> b);
    }
};

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define HAS_AMX

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Assembly, because GCC's intrinsics do not say that they read and write memory.
struct AmxTiles {
    static void configure(const TileLayout& layout) {
        asm volatile("ldtilecfg %0" ::"m"(layout) : "memory");
    }

    static void release() { asm volatile("tilerelease" ::: "memory"); }

    template <int T>
    static void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(T) : "memory");
    }

    template <int T>
    static void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
    }

    template <int T>
    static void store(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
    }

    template <int SUM, int X, int W>
    static void multiply_bfloat16() {
        asm volatile(
            "tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(W) : "memory");
    }

    template <int SUM, int X, int W>
    static void multiply_int8() {
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(W) : "memory");
    }

    template <int SUM, int X, int W>
    static void multiply_codes() {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(W) : "memory");
    }

    // Asks the system to let all threads of this process use the registers (Linux 5.16 or newer).
    static bool are_permitted() {
        unsigned a, b, c, d, low, high;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
        asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        constexpr unsigned STATES = 3 << 17, INSTRUCTIONS = 1 << 22 | 1 << 24 | 1 << 25;
        if ((low & STATES) != STATES) return false;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
        if ((d & INSTRUCTIONS) != INSTRUCTIONS) return false;
        constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
        return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    }
};
#endif

// Region of a thread that uses the registers. They are released at its end, because other libraries
// expect that of each other.
template <class Tiles>
struct TileRegion {
    Arithmetic mode;

    explicit TileRegion(int64_t sum_rows, int64_t words = TILE_SIZE) {
        Tiles::configure(TileLayout(sum_rows, words));
    }
    ~TileRegion() { Tiles::release(); }
};
