// Shared parts of the native kernels. No sum depends on the position of a row, on the number of rows or
// on the number of threads. Loops over a row run in one order, and elementwise functions consist of
// exactly rounded operations only, so that a vectorised and a scalar loop give the same bits.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

constexpr int64_t LANES = 16;

// 16 elements of 32 bits, in one register of 512 bits or in two: GCC keeps vectors that are larger than a
// register in memory.
#if defined(__AVX2__) && !defined(__AVX512F__)
#define TWO_REGISTERS
template <class T>
struct Sixteen {
    typedef T Half __attribute__((vector_size(32)));
    Half low, high;

    Sixteen() = default;
    constexpr Sixteen(Half low, Half high) : low(low), high(high) {}
    Sixteen(T x) : low(x - Half{}), high(low) {}
    template <class Other>
    explicit Sixteen(const Sixteen<Other>& x) : low((Half)x.low), high((Half)x.high) {}

    T operator[](int64_t i) const { return i < 8 ? low[i] : high[i - 8]; }
    Sixteen operator-() const { return {-low, -high}; }
    Sixteen operator~() const { return {~low, ~high}; }

#define OPERATOR(SIGN)                                                                              \
    friend Sixteen operator SIGN(Sixteen a, Sixteen b) {                                            \
        return {a.low SIGN b.low, a.high SIGN b.high};                                              \
    }                                                                                              \
    Sixteen& operator SIGN##=(Sixteen b) { return *this = *this SIGN b; }
    OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(/) OPERATOR(&) OPERATOR(|)
#undef OPERATOR
    Sixteen operator<<(int count) const { return {low << count, high << count}; }
    Sixteen operator>>(int count) const { return {low >> count, high >> count}; }

#define COMPARISON(SIGN)                                                                            \
    friend Sixteen<int32_t> operator SIGN(Sixteen a, Sixteen b) {                                   \
        return {a.low SIGN b.low, a.high SIGN b.high};                                              \
    }
    COMPARISON(<) COMPARISON(<=) COMPARISON(>)
#undef COMPARISON
};
typedef Sixteen<float> Lanes;
typedef Sixteen<uint32_t> Words;
typedef Sixteen<int32_t> Numbers;

static inline Lanes choose(Numbers is_first, Lanes a, Lanes b) {
    return {is_first.low ? a.low : b.low, is_first.high ? a.high : b.high};
}
static inline Numbers whole(Lanes x) {
    return {
        (Numbers::Half)_mm256_cvttps_epi32((__m256)x.low),
        (Numbers::Half)_mm256_cvttps_epi32((__m256)x.high)};
}
static inline Lanes floats(Numbers x) {
    return {
        (Lanes::Half)_mm256_cvtepi32_ps((__m256i)x.low),
        (Lanes::Half)_mm256_cvtepi32_ps((__m256i)x.high)};
}
#else
typedef float Lanes __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Numbers __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

static inline Lanes choose(Numbers is_first, Lanes a, Lanes b) { return is_first ? a : b; }
static inline Numbers whole(Lanes x) { return __builtin_convertvector(x, Numbers); }
static inline Lanes floats(Numbers x) { return __builtin_convertvector(x, Lanes); }
#endif

struct BFloat16 {
    uint16_t bits;
};

static inline float widen(float x) { return x; }

static inline float widen(BFloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

template <class T>
T narrow(float x);

template <>
inline float narrow<float>(float x) {
    return x;
}

template <>
inline BFloat16 narrow<BFloat16>(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

#ifdef TWO_REGISTERS
static inline Lanes load(const float* from) {
    return {(Lanes::Half)_mm256_loadu_ps(from), (Lanes::Half)_mm256_loadu_ps(from + 8)};
}
static inline void store(float* to, Lanes x) {
    _mm256_storeu_ps(to, (__m256)x.low), _mm256_storeu_ps(to + 8, (__m256)x.high);
}
#else
static inline Lanes load(const float* from) { return *(const Lanes*)from; }
static inline void store(float* to, Lanes x) { *(Lanes*)to = x; }
#endif

static inline Lanes load(const BFloat16* from) {
#ifdef TWO_REGISTERS
    auto half = [](const BFloat16* own) {
        __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)own));
        return (Lanes::Half)_mm256_slli_epi32(words, 16);
    };
    return {half(from), half(from + 8)};
#elif defined(__AVX512F__)
    __m256i halves = _mm256_loadu_si256((const __m256i*)from);
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
    return (Lanes)(__builtin_convertvector(*(const Halves*)from, Words) << 16);
#endif
}

// The bits of narrow, in the lower halves.
static inline Words narrow_bits(Lanes x) {
    Words bits = (Words)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Words no_number = (Words)((bits & 0x7fffffff) > 0x7f800000);
    return (no_number & 0x7fc0) | (~no_number & rounded);
}

static inline void store(BFloat16* to, Lanes x) {
#ifdef TWO_REGISTERS
    Words bits = narrow_bits(x);
    __m256i mixed = _mm256_packus_epi32((__m256i)bits.low, (__m256i)bits.high);
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(mixed, 0xd8));
#else
    *(Halves*)to = __builtin_convertvector(narrow_bits(x), Halves);
#endif
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
static inline Lanes load_first(const float* from, int64_t count) {
    return (Lanes)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
}

static inline Lanes load_first(const BFloat16* from, int64_t count) {
    __m256i halves = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from);
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
#else
template <class T>
static inline Lanes load_first(const T* from, int64_t count) {
    float x[LANES] = {};
    for (int64_t i = 0; i < count; i++) x[i] = widen(from[i]);
    return load(x);
}
#endif

// The first count of 16 elements, then zeros.
template <class T>
static inline Lanes load_part(const T* from, int64_t count) {
    return count >= LANES ? load(from) : load_first(from, count);
}

template <class T>
static inline void store_part(T* to, Lanes x, int64_t count) {
    if (count >= LANES) return store(to, x);
    T values[LANES];
    store(values, x);
    memcpy(to, values, count > 0 ? count * sizeof(T) : 0);
}

static inline Lanes all(float x) {
#ifdef __AVX512F__
    return (Lanes)_mm512_set1_ps(x);
#else
    return x - Lanes{};
#endif
}

static inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
#ifdef __AVX512F__
    return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(TWO_REGISTERS)
    auto half = [](auto a, auto b, auto c) {
        return (Lanes::Half)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    };
    return {half(a.low, b.low, c.low), half(a.high, b.high, c.high)};
#else
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

// Returns b if one of them is NaN.
static inline Lanes larger(Lanes a, Lanes b) {
#ifdef __AVX512F__
    return (Lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

static inline float largest(Lanes x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

#ifdef TWO_REGISTERS
static inline __m128 quarters(Lanes::Half x) {
    return _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
}
#endif

static inline float sum(Lanes x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(TWO_REGISTERS)
    __m128 four = quarters(x.low + x.high), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
#endif
}

// Each quarter of the result is the partial `sum` of one of four registers before its last two steps.
static inline Lanes fold(const Lanes* x) {
    Lanes found;
#ifdef __AVX512F__
    auto halves = [](Lanes a, Lanes b) {
        return _mm512_add_ps(
            _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44),
            _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee));
    };
    __m512 first = halves(x[0], x[1]), second = halves(x[2], x[3]);
    found = (Lanes)_mm512_add_ps(
        _mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
#elif defined(TWO_REGISTERS)
    auto two = [](Lanes a, Lanes b) {
        __m128 first = quarters(a.low + a.high), second = quarters(b.low + b.high);
        return (Lanes::Half)_mm256_set_m128(second, first);
    };
    found = {two(x[0], x[1]), two(x[2], x[3])};
#else
    for (int q = 0; q < 4; q++)
        for (int i = 0; i < 4; i++)
            found[4 * q + i] = (x[q][i] + x[q][i + 8]) + (x[q][i + 4] + x[q][i + 12]);
#endif
    return found;
}

// Sums of 16 registers, with the bits of `sum`. x[i] is `fold` of registers i, i+4, i+8, i+12.
static inline Lanes sums(const Lanes* x) {
    Lanes found;
#ifdef __AVX512F__
    auto halves = [](Lanes a, Lanes b) {
        return _mm512_add_ps(
            _mm512_shuffle_ps((__m512)a, (__m512)b, 0x44),
            _mm512_shuffle_ps((__m512)a, (__m512)b, 0xee));
    };
    __m512 first = halves(x[0], x[1]), second = halves(x[2], x[3]);
    found = (Lanes)_mm512_add_ps(
        _mm512_shuffle_ps(first, second, 0x88), _mm512_shuffle_ps(first, second, 0xdd));
#elif defined(TWO_REGISTERS)
    auto pairs = [](auto x, auto y) {
        __m256 a = (__m256)x, b = (__m256)y;
        return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    };
    auto fours = [](__m256 a, __m256 b) {
        return (Lanes::Half)_mm256_add_ps(
            _mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
    };
    found = {
        fours(pairs(x[0].low, x[1].low), pairs(x[2].low, x[3].low)),
        fours(pairs(x[0].high, x[1].high), pairs(x[2].high, x[3].high))};
#else
    for (int i = 0; i < 4; i++)
        for (int q = 0; q < 4; q++) {
            const float* part = (const float*)&x[i] + 4 * q;
            found[4 * q + i] = (part[0] + part[2]) + (part[1] + part[3]);
        }
#endif
    return found;
}

// e^x to two units in the last place. Overflow and underflow give the extreme normal numbers.
static inline float exponential(float x) {
    x = x > 88.3f ? 88.3f : x;
    x = x < -87.3f ? -87.3f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = __builtin_fmaf(n, -0.693359375f, x);
    r = __builtin_fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = __builtin_fmaf(p, r, 1.3981999507e-3f);
    p = __builtin_fmaf(p, r, 8.3334519073e-3f);
    p = __builtin_fmaf(p, r, 4.1665795894e-2f);
    p = __builtin_fmaf(p, r, 1.6666665459e-1f);
    p = __builtin_fmaf(p, r, 5.0000001201e-1f);
    p = __builtin_fmaf(p, r * r, r) + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

// The same for each lane.
static inline Lanes exponential(Lanes x) {
    x = choose(x > 88.3f, all(88.3f), x);
    x = choose(x < -87.3f, all(-87.3f), x);
    constexpr float ROUNDER = 12582912.0f;  // numbers of its size have no fractions
    Lanes n = (x * 1.44269504f + ROUNDER) - ROUNDER;
    Lanes r = multiply_add(n, all(-0.693359375f), x);
    r = multiply_add(n, all(2.12194440e-4f), r);
    Lanes p = multiply_add(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
    p = multiply_add(p, r, all(8.3334519073e-3f));
    p = multiply_add(p, r, all(4.1665795894e-2f));
    p = multiply_add(p, r, all(1.6666665459e-1f));
    p = multiply_add(p, r, all(5.0000001201e-1f));
    p = multiply_add(p, r * r, r) + 1.0f;
    return p * (Lanes)((whole(n) + 127) << 23);
}

static inline float silu(float x) { return x / (1.0f + exponential(-x)); }

// Computed by libm, for the few numbers that scale a whole state.
static inline float softplus(float x) {
    return (x > 0.0f ? x : 0.0f) + log1pf(expf(-__builtin_fabsf(x)));
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Floating-point mode of this thread while the object lives: round to nearest, and subnormal operands
// and results are 0. A product of small decays is often subnormal, which takes a hundred times as long.
// The former mode returns, and the bits of a kernel do not depend on it. On other processors
// nothing changes.
class Arithmetic {
  public:
#if defined(__x86_64__)
    Arithmetic() : former(_mm_getcsr()) { _mm_setcsr(0x9fc0); }
    ~Arithmetic() { _mm_setcsr(former); }

  private:
    unsigned former;
#elif defined(__aarch64__)
    Arithmetic() {
        asm volatile("mrs %0, fpcr" : "=r"(former));
        asm volatile("msr fpcr, %0" ::"r"(uint64_t(1) << 24) : "memory");
    }
    ~Arithmetic() { asm volatile("msr fpcr, %0" ::"r"(former) : "memory"); }

  private:
    uint64_t former;
#else
    Arithmetic() {}
#endif
};

// Minimum estimated cycles of work that justify a second thread.
constexpr int64_t FEW_CYCLES = 1 << 14;

static inline int threads_for(int64_t cycles, int threads) {
    return cycles < FEW_CYCLES ? 1 : threads;
}

// Separate functions, so that no arithmetic is moved out of the region with its mode.
template <class Work>
__attribute__((noinline)) static void run_static(int64_t count, const Work& work) {
#pragma omp for schedule(static) nowait
    for (int64_t item = 0; item < count; item++) work(item);
}

template <class Work>
__attribute__((noinline)) static void run_dynamic(int64_t count, const Work& work) {
#pragma omp for schedule(dynamic) nowait
    for (int64_t item = 0; item < count; item++) work(item);
}

// Calls work(item) for each of `count` items, divided equally among the threads. Each thread makes a
// Region of `settings`, which lives until its last item is done.
template <class Region = Arithmetic, class Work, class... Settings>
static void for_each(int64_t count, int threads, const Work& work, Settings... settings) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Region region(settings...);
        run_static(count, work);
    }
}

// The same for items of unequal cost.
template <class Region = Arithmetic, class Work>
static void for_each_unequal(int64_t count, int threads, const Work& work) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Region region;
        run_dynamic(count, work);
    }
}
