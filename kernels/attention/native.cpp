// Attention of one token per sequence over KV rows where they lie: see reference.decode_attention.
// A sequence and KV head are one piece of work, positions are taken in order.
#include "../native.h"

constexpr int64_t MAX_HEAD = 512;

// G queries of one KV head; weights [G, length].
template <class T, int G>
static void attend(
    const T* query, const T* keys, const T* values, int64_t stride, const int32_t* rows,
    int64_t length, int64_t D, float scale, float* weights, T* out) {
    float wide[G * MAX_HEAD];
    for (int64_t i = 0; i < G * D; i++) wide[i] = widen(query[i]) * scale;
    for (int64_t j = 0; j < length; j++) {
        const T* key = keys + int64_t(rows[j]) * stride;
        Lanes products[G] = {};
        for (int64_t d = 0; d < D; d += LANES) {
            Lanes part = load(key + d);
            for (int g = 0; g < G; g++)
                products[g] = multiply_add(load(wide + g * D + d), part, products[g]);
        }
        for (int g = 0; g < G; g++) weights[g * length + j] = sum(products[g]);
    }
    float factors[G];
    for (int g = 0; g < G; g++) {
        float *row = weights + g * length, largest = row[0], total = 0.0f;
        for (int64_t j = 1; j < length; j++) largest = row[j] > largest ? row[j] : largest;
        for (int64_t j = 0; j < length; j++) row[j] = exponential(row[j] - largest);
        for (int64_t j = 0; j < length; j++) total += row[j];
        factors[g] = 1.0f / total;
    }
    for (int64_t d = 0; d < D; d += LANES) {
        Lanes sums[G] = {};
        for (int64_t j = 0; j < length; j++) {
            Lanes part = load(values + int64_t(rows[j]) * stride + d);
            for (int g = 0; g < G; g++)
                sums[g] = multiply_add(all(weights[g * length + j]), part, sums[g]);
        }
        for (int g = 0; g < G; g++) store(out + g * D + d, sums[g] * factors[g]);
    }
}

template <class T>
static void decode(
    const T* query, int64_t query_stride, const T* keys, const T* values, int64_t stride,
    const int32_t* table, int64_t table_stride, const int32_t* rows, const int32_t* lengths,
    T* out, int64_t sequences, int64_t kv_heads, int64_t G, int64_t D, float scale,
    int threads) {
    int64_t cycles = 0;
    for (int64_t b = 0; b < sequences; b++) cycles += lengths[b] * kv_heads * G * D / 4;
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(cycles, threads))
    for (int64_t item = 0; item < sequences * kv_heads; item++) {
        static thread_local std::vector<float> weights;
        int64_t b = item / kv_heads, head = item % kv_heads;
        weights.resize(4 * lengths[b]);
        auto some = [&](auto function, int64_t g) {
            function(
                query + b * query_stride + (head * G + g) * D, keys + head * D,
                values + head * D, stride, table + rows[b] * table_stride, lengths[b], D, scale,
                weights.data(), out + (item * G + g) * D);
        };
        int64_t g = 0;
        for (; g + 4 <= G; g += 4) some(attend<T, 4>, g);
        for (; g + 2 <= G; g += 2) some(attend<T, 2>, g);
        for (; g < G; g++) some(attend<T, 1>, g);
    }
}

#define ATTENTION(T, NAME)                                                                        \
    EXPORT void decode_attention_##NAME(                                                          \
        const T* query, int64_t query_stride, const T* keys, const T* values, int64_t stride,     \
        const int32_t* table, int64_t table_stride, const int32_t* rows, const int32_t* lengths,  \
        T* out, int64_t sequences, int64_t kv_heads, int64_t G, int64_t D, float scale,           \
        int threads) {                                                                            \
        decode(                                                                                   \
            query, query_stride, keys, values, stride, table, table_stride, rows, lengths, out,   \
            sequences, kv_heads, G, D, scale, threads);                                           \
    }

ATTENTION(float, float32)
ATTENTION(BFloat16, bfloat16)
