// Attention of one token per sequence over KV rows where they lie: see reference.decode_attention.
// A sequence and KV head are one piece of work, positions are taken in order.
#include "../native.h"

constexpr int64_t MAX_HEAD = 512;

// The G queries of one KV head; weights [G, length].
template <class T>
static void attend(
    const T* query, const T* keys, const T* values, int64_t stride, const int32_t* rows,
    int64_t length, int64_t G, int64_t D, float scale, float* weights, T* out) {
    int64_t parts = D / LANES;
    for (int64_t j = 0; j < length; j++) {
        const T* key = keys + int64_t(rows[j]) * stride;
        for (int64_t g = 0; g < G; g++) {
            Lanes products[2] = {};
            for (int64_t part = 0; part < parts; part++)
                products[part % 2] = multiply_add(
                    load(query + g * D + part * LANES), load(key + part * LANES),
                    products[part % 2]);
            weights[g * length + j] = sum(products[0] + products[1]) * scale;
        }
    }
    for (int64_t g = 0; g < G; g++) {
        float* row = weights + g * length;
        float largest = row[0], total = 0.0f;
        for (int64_t j = 1; j < length; j++) largest = row[j] > largest ? row[j] : largest;
        for (int64_t j = 0; j < length; j++) row[j] = exponential(row[j] - largest);
        for (int64_t j = 0; j < length; j++) total += row[j];
        float factor = 1.0f / total;
        Lanes sums[MAX_HEAD / LANES] = {};
        for (int64_t j = 0; j < length; j++) {
            const T* value = values + int64_t(rows[j]) * stride;
            Lanes weight = all(row[j]);
            for (int64_t part = 0; part < parts; part++)
                sums[part] = multiply_add(load(value + part * LANES), weight, sums[part]);
        }
        for (int64_t part = 0; part < parts; part++)
            store(out + g * D + part * LANES, sums[part] * factor);
    }
}

template <class T>
static void decode(
    const T* query, int64_t query_stride, const T* keys, const T* values, int64_t stride,
    const int32_t* table, int64_t table_stride, const int32_t* rows, const int32_t* lengths,
    T* out, int64_t sequences, int64_t kv_heads, int64_t G, int64_t D, float scale,
    int threads) {
    int64_t operations = 0;
    for (int64_t b = 0; b < sequences; b++) operations += 4 * lengths[b] * kv_heads * G * D;
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(operations, threads))
    for (int64_t item = 0; item < sequences * kv_heads; item++) {
        static thread_local std::vector<float> weights;
        int64_t b = item / kv_heads, head = item % kv_heads;
        weights.resize(G * lengths[b]);
        attend(
            query + b * query_stride + head * G * D, keys + head * D, values + head * D, stride,
            table + rows[b] * table_stride, lengths[b], G, D, scale, weights.data(),
            out + item * G * D);
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
