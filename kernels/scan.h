// The frame of the scans over tiles of tokens: Gated DeltaNet, Kimi Delta Attention and Mamba-2. For a
// tile of R tokens and a head with the state S [K, V] before it, with rows W, Q and B of K numbers per
// token, a lower triangle A [R, R] and decays D of the rows of S:
//     N = X                                             Mamba-2
//     N = (I - L)^-1 beta (X - W S)                     delta rules, with a lower triangle L without diagonal
//     out = Q S + A N        S <- D S + B^T N
// Rows may have factors that are applied to products or to N, so that operands are exact.
#pragma once

#include "products.h"

#ifdef __AVX2__

constexpr int64_t TILE = 64;  // maximum tokens of a tile

struct Sizes {
    int64_t stride;  // elements between two tokens of the inputs
    int64_t H, HV, K, V;
};

// Layout of sequences and states: see packed.Packed and packed.Exports.
struct Walk {
    void* states;
    int64_t is_narrow;               // states are bfloat16, not float32
    int64_t slot_stride, head_size;  // elements between two slots; elements of a head in a state
    const int32_t *slots, *cu_seqlens, *ends, *export_slots, *cu_exports;
    const bool* resumed;
    int64_t tile_size;  // tokens

    // Calls step(first row, rows) for every tile of a sequence. `state` is the float32 state of one head.
    template <class Step>
    void each_tile(int64_t sequence, int64_t head, float* state, Step step) const {
        if (is_narrow)
            each((BFloat16*)states, sequence, head, state, step);
        else
            each((float*)states, sequence, head, state, step);
    }

  private:
    template <class S, class Step>
    void each(S* all, int64_t sequence, int64_t head, float* state, Step step) const {
        int64_t begin = cu_seqlens[sequence], end = cu_seqlens[sequence + 1];
        if (begin == end) return;
        S* own = all + head * head_size;
        S* slot = own + slots[sequence] * slot_stride;
        for (int64_t i = 0; i < head_size; i += LANES)
            store(state + i, resumed[sequence] ? load(slot + i) : Lanes{});
        int64_t exported = cu_exports[sequence];
        for (int64_t at = begin; at < end; at += tile_size) {
            int64_t count = end - at < tile_size ? end - at : tile_size;
            step(at, count);
            auto save = [&](S* to) {
                for (int64_t i = 0; i < head_size; i += LANES) store(to + i, load(state + i));
            };
            for (; exported < cu_exports[sequence + 1]; exported++) {
                if (ends[exported] != at + count - begin) break;
                save(own + export_slots[exported] * slot_stride);
            }
            if (at + count == end) save(slot);
            // Rounded, so that a checkpoint restores exactly the state of a cold run.
            for (int64_t i = 0; sizeof(S) < 4 && i < head_size; i += LANES) {
                S narrowed[LANES];
                store(narrowed, load(state + i));
                store(state + i, load(narrowed));
            }
        }
    }
};

// Memory of a tile. Left operands are [TILE, width] or [K, TILE]; rows without a token are 0.
template <class M>
struct Tile {
    typedef typename M::Element Element;
    int64_t K, V, width;  // width: K, padded
    std::vector<float> floats;
    std::vector<Element> elements;
    Element *query, *reader, *writer, *triangle;
    float *columns;            // right operand of TILE rows of K numbers
    float *weights, *system;   // A and L
    float *news, *read, *state, *state_words, *news_words;
    float *keep;               // D
    float query_factor[TILE], reader_factor[TILE], writer_factor[TILE], beta[TILE];

    void make(int64_t key_size, int64_t value_size) {
        K = key_size, V = value_size, width = padded(K);
        floats.resize(width * (TILE + V + 1) + 2 * TILE * TILE + 3 * TILE * V + K * V);
        elements.resize(TILE * (3 * width + TILE));
        float* next = floats.data();
        auto take = [&](int64_t count) { return (next += count) - count; };
        columns = take(width * TILE), state_words = take(width * V), keep = take(width);
        weights = take(TILE * TILE), system = take(TILE * TILE);
        news = take(TILE * V), read = take(TILE * V), news_words = take(TILE * V);
        state = take(K * V);
        query = elements.data(), reader = query + TILE * width, writer = reader + TILE * width;
        triangle = writer + TILE * width;
    }

    // The right operand and the transposed left operand of the rows of a left operand.
    void transpose_rows(const Element* rows) {
        transpose((const float*)rows, width / M::DEPTH, TILE, width / M::DEPTH, columns, TILE);
        for (int64_t k = 0; k < width; k += M::DEPTH)
            for (int64_t t = 0; t < TILE; t += LANES) {
                Lanes words = load(columns + k / M::DEPTH * TILE + t);
                if constexpr (M::DEPTH == 1) {
                    store(writer + k * TILE + t, words);
                } else {
                    store(writer + k * TILE + t, (Lanes)((Words)words << 16));
                    store(writer + (k + 1) * TILE + t, (Lanes)((Words)words & 0xffff0000));
                }
            }
    }

    // left [rows, width] times `columns`, each row at least up to the diagonal.
    void multiply_earlier(const Element* left, int64_t rows, float* to) const {
        for (int64_t r = 0; r < rows; r += M::ROWS_AT_ONCE) {
            int64_t count = rows - r < M::ROWS_AT_ONCE ? rows - r : M::ROWS_AT_ONCE;
            Product<M>::multiply(
                count, left + r * width, width, columns, TILE, width_of(r + count),
                width / M::DEPTH, to + r * TILE, TILE, nullptr);
        }
    }

    // Computes the tile from `news` = X. HAS_SYSTEM: delta rules.
    template <bool HAS_SYSTEM, class T>
    void advance(int64_t rows, T* out, int64_t out_stride) {
        int64_t steps = steps_of<M>(K);
        const float* words = right_operand<M>(state, K, V, state_words);
        if (HAS_SYSTEM) {
            Product<M>::multiply(
                rows, reader, width, words, V, V, steps, read, V, nullptr);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t v = r * V; v < (r + 1) * V; v += LANES)
                    store(news + v, (load(news + v) - load(read + v) * reader_factor[r]) * beta[r]);
            solve(rows);
        }
        Product<M>::multiply(rows, query, width, words, V, V, steps, read, V, nullptr);
        for (int64_t r = rows; r < padded(rows); r++) memset(news + r * V, 0, V * 4);
        words = right_operand<M>(news, padded(rows), V, news_words);
        for (int64_t i = 0; i < rows * TILE; i += LANES) store(triangle + i, load(weights + i));
        for (int64_t r = 0; r < rows; r += M::ROWS_AT_ONCE) {
            int64_t count = rows - r < M::ROWS_AT_ONCE ? rows - r : M::ROWS_AT_ONCE;
            Product<M>::multiply(
                count, triangle + r * TILE, TILE, words, V, V, steps_of<M>(r + count), read + r * V,
                V, query_factor + r);
        }
        for (int64_t r = 0; r < rows; r++)
            for (int64_t v = 0; v < V; v += LANES) {
                store(out + r * out_stride + v, load(read + r * V + v));
                store(news + r * V + v, load(news + r * V + v) * writer_factor[r]);
            }
        words = right_operand<M>(news, padded(rows), V, news_words);
        Product<M>::multiply(K, writer, TILE, words, V, V, steps_of<M>(rows), state, V, keep);
    }

    // Replaces the right side in `news` by N, row after row. `system` has L.
    void solve(int64_t rows) {
        static constexpr float ONES[ROWS] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
        for (int64_t r = 0; r < rows; r += ROWS) {
            int64_t count = rows - r < ROWS ? rows - r : ROWS;
            float* own = news + r * V;
            Product<Singles>::multiply(
                count, system + r * TILE, TILE, news, V, V, r, own, V, ONES);
            for (int64_t i = 1; i < count; i++)
                Product<Singles>::multiply(
                    1, system + (r + i) * TILE + r, TILE, own, V, V, i, own + i * V, V, ONES);
        }
    }
};

// Copies rows to a left operand [TILE, width], with zeros.
template <class T, class Element>
static void copy_rows(
    const T* from, int64_t stride, int64_t rows, int64_t size, Element* to, int64_t width) {
    for (int64_t r = 0; r < rows; r++) copy_row(from + r * stride, size, to + r * width, width);
    memset(to + rows * width, 0, (TILE - rows) * width * sizeof(Element));
}

// Sums of a tile's log-decays up to each token, and the decays from the start and to the end.
struct Decays {
    float total[TILE], opened[TILE], closing[TILE], last;

    Decays(const float* gate, int64_t stride, int64_t rows) {
        for (int64_t r = 0; r < rows; r++)
            total[r] = (r ? total[r - 1] : 0.0f) + gate[r * stride];
        last = total[rows - 1];
        for (int64_t r = rows; r < TILE; r++) total[r] = last;
        for (int64_t r = 0; r < TILE; r += LANES) {
            store(opened + r, exponential(load(total + r)));
            store(closing + r, exponential(last - load(total + r)));
        }
    }
    // Decays of 16 tokens up to token r.
    Lanes until(int64_t r, int64_t first) const { return exponential(total[r] - load(total + first)); }
};

// x in the lanes of the tokens up to r, which begin with token `first`; else 0.
static inline Lanes up_to(int64_t r, int64_t first, Lanes x) {
    return choose(PLACES <= int32_t(r - first), x, Lanes{});
}

// Parameters of an exported scan after its inputs, and the walk that they describe.
#define SCAN_PARAMETERS(T)                                                                        \
    void *states, int64_t is_narrow, int64_t slot_stride, const int32_t *slots,                   \
    const bool *resumed, const int32_t *cu_seqlens, const int32_t *ends,                          \
    const int32_t *export_slots, const int32_t *cu_exports, T *out, int64_t stride,               \
    int64_t tile_size, int64_t sequences, int64_t H, int64_t HV, int64_t K, int64_t V
#define WALK                                                                                      \
    Walk{states, is_narrow,    slot_stride, K * V,   slots,    cu_seqlens,                        \
         ends,   export_slots, cu_exports,  resumed, tile_size}

// An exported scan of a delta rule.
#define DELTA_SCAN(NAME, T, ...)                                                                  \
    EXPORT void NAME(                                                                             \
        const T* query, const T* key, const T* value, const float* gate, const float* beta,       \
        SCAN_PARAMETERS(T), float scale, int threads) {                                           \
        chunk<__VA_ARGS__>(                                                                       \
            query, key, value, gate, beta, WALK, out, sequences, {stride, H, HV, K, V}, scale,    \
            threads);                                                                             \
    }

#endif
