// Attention of the newest tokens of each sequence, reading KV rows in place: see
// reference.decode_attention and verify_attention. Tasks are pairs of a sequence and a KV head;
// positions are processed in order for every query.
#include "../native.h"

#include <algorithm>

constexpr int64_t MAX_HEAD = 512;
constexpr int64_t MAX_QUERIES = 4;  // queries that share loaded KV

struct Cached {
    int64_t stride;       // elements between two rows of a pool
    const int32_t* rows;  // row of each position
    int64_t D;
    float scale;

    int64_t padded() const { return (D + LANES - 1) / LANES * LANES; }
};

// One query, its number of visible positions, and the memory of its weights and result.
template <class T>
struct Query {
    const T* from;
    int64_t length;
    float* weights;  // one per position, padded to a multiple of LANES
    T* to;
};

static void soften(float* weights, int64_t length, float* factor) {
    int64_t padded = (length + LANES - 1) / LANES * LANES;
    for (int64_t j = length; j < padded; j++) weights[j] = weights[0];
    Lanes most = load(weights), totals = {};
    for (int64_t j = LANES; j < padded; j += LANES) most = larger(load(weights + j), most);
    float largest = most[0];
    for (int l = 1; l < LANES; l++) largest = most[l] > largest ? most[l] : largest;
    for (int64_t j = 0; j < padded; j++) weights[j] = exponential(weights[j] - largest);
    for (int64_t j = length; j < padded; j++) weights[j] = 0.0f;
    for (int64_t j = 0; j < padded; j += LANES) totals += load(weights + j);
    *factor = 1.0f / sum(totals);
}

// BLOCKS * 16 elements of a value from d on. The last 16 may be incomplete.
template <class T, int G, int BLOCKS>
static void blend(
    const Query<T>* queries, const T* values, const Cached& cached, const float* factors,
    int64_t d) {
    int64_t last = std::min(cached.D - d - (BLOCKS - 1) * LANES, LANES);
    Lanes sums[G][BLOCKS] = {};
    int64_t shared = queries[0].length;
    for (int64_t j = 0; j < shared; j++) {
        const T* value = values + cached.rows[j] * cached.stride + d;
#pragma GCC unroll 4
        for (int i = 0; i < BLOCKS; i++) {
            Lanes part = load_part(value + i * LANES, i < BLOCKS - 1 ? LANES : last);
#pragma GCC unroll 4
            for (int g = 0; g < G; g++)
                sums[g][i] = multiply_add(all(queries[g].weights[j]), part, sums[g][i]);
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
        for (int64_t j = shared; j < queries[g].length; j++) {
            const T* value = values + cached.rows[j] * cached.stride + d;
#pragma GCC unroll 4
            for (int i = 0; i < BLOCKS; i++) {
                Lanes part = load_part(value + i * LANES, i < BLOCKS - 1 ? LANES : last);
                sums[g][i] = multiply_add(all(queries[g].weights[j]), part, sums[g][i]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < BLOCKS; i++)
            store_part(
                queries[g].to + d + i * LANES, sums[g][i] * factors[g],
                i < BLOCKS - 1 ? LANES : last);
    }
}

// Products of G queries with the keys of positions j, j+4, j+8 and j+12, folded. Those of the next
// query follow at distance four.
template <class T, int G>
static inline void multiply_four(
    const float* wide, const T* keys, int64_t j, const Cached& cached, Lanes* folded) {
    const T* key[4];
    for (int i = 0; i < 4; i++) key[i] = keys + cached.rows[j + 4 * i] * cached.stride;
    Lanes totals[G][4] = {};
    for (int64_t d = 0; d < cached.D; d += LANES) {
        Lanes parts[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) parts[i] = load_part(key[i] + d, cached.D - d);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
            Lanes own = load(wide + g * cached.padded() + d);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) totals[g][i] = multiply_add(own, parts[i], totals[g][i]);
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) folded[4 * g] = fold(totals[g]);
}

// G queries of one KV head. The first one has the fewest visible positions.
template <class T, int G>
static void attend(
    const Query<T>* queries, const T* keys, const T* values, const Cached& cached) {
    int64_t D = cached.D, shared = queries[0].length, padded = cached.padded();
    float wide[G * MAX_HEAD], factors[G];
    for (int g = 0; g < G; g++) {
        float* to = wide + g * padded;
        for (int64_t d = 0; d < D; d++) to[d] = widen(queries[g].from[d]) * cached.scale;
        for (int64_t d = D; d < padded; d++) to[d] = 0.0f;
    }
    int64_t j = 0;
    for (; j + LANES <= shared; j += LANES) {
        Lanes folded[G][4];
        for (int k = 0; k < 4; k++) multiply_four<T, G>(wide, keys, j + k, cached, &folded[0][k]);
        for (int g = 0; g < G; g++) store(queries[g].weights + j, sums(folded[g]));
    }
    for (; j < shared; j++) {
        const T* key = keys + cached.rows[j] * cached.stride;
        Lanes products[G] = {};
        for (int64_t d = 0; d < D; d += LANES) {
            Lanes part = load_part(key + d, D - d);
#pragma GCC unroll 4
            for (int g = 0; g < G; g++)
                products[g] = multiply_add(load(wide + g * padded + d), part, products[g]);
        }
        for (int g = 0; g < G; g++) queries[g].weights[j] = sum(products[g]);
    }
    for (int g = 0; g < G; g++) {
        for (int64_t j = shared; j < queries[g].length; j++) {
            const T* key = keys + cached.rows[j] * cached.stride;
            Lanes products = {};
            for (int64_t d = 0; d < D; d += LANES)
                products = multiply_add(
                    load(wide + g * padded + d), load_part(key + d, D - d), products);
            queries[g].weights[j] = sum(products);
        }
        soften(queries[g].weights, queries[g].length, factors + g);
    }
    int64_t d = 0;
    for (; d + 4 * LANES <= D; d += 4 * LANES) blend<T, G, 4>(queries, values, cached, factors, d);
    int64_t left = (D - d + LANES - 1) / LANES;
    if (left == 4) blend<T, G, 4>(queries, values, cached, factors, d);
    if (left == 3) blend<T, G, 3>(queries, values, cached, factors, d);
    if (left == 2) blend<T, G, 2>(queries, values, cached, factors, d);
    if (left == 1) blend<T, G, 1>(queries, values, cached, factors, d);
}

// lengths: of the sequences with this step's tokens; cu_seqlens: null if each has one token.
template <class T>
static void decode(
    const T* query, int64_t query_stride, const T* keys, const T* values, int64_t stride,
    const int32_t* table, int64_t table_stride, const int32_t* rows, const int32_t* lengths,
    const int32_t* cu_seqlens, T* out, int64_t sequences, int64_t kv_heads, int64_t G, int64_t D,
    float scale, int threads) {
    int64_t cycles = 0;
    for (int64_t b = 0; b < sequences; b++) cycles += lengths[b] * kv_heads * G * D / 4;
    for_each_unequal(sequences * kv_heads, threads_for(cycles, threads), [&](int64_t item) {
        static thread_local std::vector<float> weights;
        int64_t b = item / kv_heads, head = item % kv_heads;
        int64_t first = cu_seqlens ? cu_seqlens[b] : b;
        int64_t tokens = cu_seqlens ? cu_seqlens[b + 1] - first : 1;
        int64_t room = (lengths[b] + LANES - 1) / LANES * LANES;
        weights.resize(MAX_QUERIES * room);
        Cached cached = {stride, table + rows[b] * table_stride, D, scale};
        Query<T> queries[MAX_QUERIES];
        for (int64_t q = 0, count; q < tokens * G; q += count) {
            count = std::min(MAX_QUERIES, tokens * G - q);
            if (count == 3) count = 2;
            for (int64_t i = 0; i < count; i++) {
                int64_t token = (q + i) / G, place = head * G + (q + i) % G;
                queries[i] = {
                    query + (first + token) * query_stride + place * D,
                    lengths[b] - tokens + token + 1, weights.data() + i * room,
                    out + ((first + token) * kv_heads * G + place) * D};
            }
            auto* some = count == 4 ? attend<T, 4> : count == 2 ? attend<T, 2> : attend<T, 1>;
            some(queries, keys + head * D, values + head * D, cached);
        }
    });
}

#define ATTENTION(T, NAME)                                                                        \
    EXPORT void decode_attention_##NAME(                                                          \
        const T* query, int64_t query_stride, const T* keys, const T* values, int64_t stride,     \
        const int32_t* table, int64_t table_stride, const int32_t* rows, const int32_t* lengths,  \
        const int32_t* cu_seqlens, T* out, int64_t sequences, int64_t kv_heads, int64_t G,        \
        int64_t D, float scale, int threads) {                                                    \
        decode(                                                                                   \
            query, query_stride, keys, values, stride, table, table_stride, rows, lengths,        \
            cu_seqlens, out, sequences, kv_heads, G, D, scale, threads);                          \
    }

ATTENTION(float, float32)
ATTENTION(BFloat16, bfloat16)
