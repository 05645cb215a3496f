// One token of the delta rule, with a decay of the whole state or of each row. A state is read
// twice, the second time from the cache, and written once.
#pragma once

#include "native.h"

constexpr float L2_EPS = 1e-6f;
constexpr int64_t MAX_KEY = 512;

// Factor that gives a row the length `scale`.
template <class T>
static float unit_factor(const T* from, int64_t size, float scale) {
    Lanes squares = {};
    for (int64_t i = 0; i < size; i += LANES) {
        Lanes b = load(from + i);
        squares = multiply_add(b, b, squares);
    }
    return scale / __builtin_sqrtf(sum(squares) + L2_EPS);
}

template <class T>
static void unit(const T* from, float* to, int64_t size, float scale) {
    float factor = unit_factor(from, size, scale);
    for (int64_t i = 0; i < size; i++) to[i] = widen(from[i]) * factor;
}

struct OneDecay {
    float value;
    float operator[](int64_t) const { return value; }
};

// COLUMNS * 16 columns of a state [K, V]. `after` may alias `before`. decay[k] is the decay of row k.
template <class T, class S, int COLUMNS, class Decay>
static void step(
    const S* before, S* after, int64_t V, int64_t K, const float* key, const float* query,
    float overlap, Decay decay, float beta, const T* value, T* out) {
    Lanes recalled[COLUMNS] = {}, read[COLUMNS] = {};
    for (int64_t k = 0; k < K; k++)
        for (int c = 0; c < COLUMNS; c++) {
            Lanes s = load(before + k * V + c * LANES) * decay[k];
            recalled[c] = multiply_add(s, all(key[k]), recalled[c]);
            read[c] = multiply_add(s, all(query[k]), read[c]);
        }
    Lanes delta[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
        delta[c] = (load(value + c * LANES) - recalled[c]) * beta;
        store(out + c * LANES, multiply_add(delta[c], all(overlap), read[c]));
    }
    for (int64_t k = 0; k < K; k++)
        for (int c = 0; c < COLUMNS; c++) {
            int64_t at = k * V + c * LANES;
            store(after + at, multiply_add(delta[c], all(key[k]), load(before + at) * decay[k]));
        }
}

// One token of a head, with a key of length 1 and a query of length `scale`.
template <class T, class S, class Decay>
static void recall_and_write(
    const T* query, const T* key, const T* value, Decay decay, float beta, float scale,
    const S* before, S* after, T* out, int64_t K, int64_t V) {
    float unit_key[MAX_KEY], unit_query[MAX_KEY];
    unit(key, unit_key, K, 1.0f);
    unit(query, unit_query, K, scale);
    Lanes products = {};
    for (int64_t k = 0; k < K; k += LANES)
        products = multiply_add(load(unit_key + k), load(unit_query + k), products);
    float overlap = sum(products);
    int64_t v = 0;
    for (; v + 4 * LANES <= V; v += 4 * LANES)
        step<T, S, 4>(
            before + v, after + v, V, K, unit_key, unit_query, overlap, decay, beta, value + v,
            out + v);
    for (; v < V; v += LANES)
        step<T, S, 1>(
            before + v, after + v, V, K, unit_key, unit_query, overlap, decay, beta, value + v,
            out + v);
}
