// One token of the gated delta rule: see reference.decode_gdn. A value head's state is read twice,
// the second time from the cache, and written once.
#include "../native.h"

constexpr float L2_EPS = 1e-6f;
constexpr int64_t MAX_KEY = 512;

template <class T>
static float unit(const T* from, float* to, int64_t size, float scale) {
    Lanes squares = {};
    for (int64_t i = 0; i < size; i += LANES) {
        Lanes b = load(from + i);
        squares = multiply_add(b, b, squares);
    }
    float factor = scale / __builtin_sqrtf(sum(squares) + L2_EPS);
    for (int64_t i = 0; i < size; i++) to[i] = widen(from[i]) * factor;
    return factor;
}

// COLUMNS * 16 columns of a state [K, V].
template <class T, class S, int COLUMNS>
static void step(
    S* state, int64_t V, int64_t K, const float* key, const float* query, float overlap,
    float decay, float beta, const T* value, T* out) {
    Lanes recalled[COLUMNS] = {}, read[COLUMNS] = {};
    for (int64_t k = 0; k < K; k++)
        for (int c = 0; c < COLUMNS; c++) {
            Lanes s = load(state + k * V + c * LANES) * decay;
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
            S* at = state + k * V + c * LANES;
            store(at, multiply_add(delta[c], all(key[k]), load(at) * decay));
        }
}

struct Token {
    int64_t stride;       // of query, key and value, from a sequence to the next
    int64_t gate_stride;  // of a and b
    int64_t rows, H, HV, K, V;
    float scale, max_beta;
};

template <class T, class S>
static void decode(
    const T* query, const T* key, const T* value, const T* a, const T* b, const float* A_log,
    const float* dt_bias, S* states, int64_t slot_stride, const int32_t* slots, T* out,
    const Token& token, int threads) {
    int64_t K = token.K, V = token.V, HV = token.HV, group = HV / token.H;
#pragma omp parallel for schedule(static) num_threads(threads_for(token.rows * HV * K * V / 2, threads))
    for (int64_t item = 0; item < token.rows * HV; item++) {
        int64_t row = item / HV, head = item % HV, key_head = head / group;
        float unit_key[MAX_KEY], unit_query[MAX_KEY];
        unit(key + row * token.stride + key_head * K, unit_key, K, 1.0f);
        unit(query + row * token.stride + key_head * K, unit_query, K, token.scale);
        Lanes products = {};
        for (int64_t k = 0; k < K; k += LANES)
            products = multiply_add(load(unit_key + k), load(unit_query + k), products);
        float x = widen(a[row * token.gate_stride + head]) + dt_bias[head];
        float softplus = (x > 0.0f ? x : 0.0f) + log1pf(expf(-__builtin_fabsf(x)));
        float decay = expf(-expf(A_log[head]) * softplus);
        float beta = token.max_beta / (1.0f + expf(-widen(b[row * token.gate_stride + head])));
        S* state = states + slots[row] * slot_stride + head * K * V;
        const T* from = value + row * token.stride + head * V;
        T* to = out + item * V;
        int64_t v = 0;
        for (; v + 4 * LANES <= V; v += 4 * LANES)
            step<T, S, 4>(
                state + v, V, K, unit_key, unit_query, sum(products), decay, beta, from + v,
                to + v);
        for (; v < V; v += LANES)
            step<T, S, 1>(
                state + v, V, K, unit_key, unit_query, sum(products), decay, beta, from + v,
                to + v);
    }
}

#define DECODES(T, S, NAME)                                                                      \
    EXPORT void decode_gdn_##NAME(                                                               \
        const T* query, const T* key, const T* value, const T* a, const T* b,                    \
        const float* A_log, const float* dt_bias, S* states, int64_t slot_stride,                \
        const int32_t* slots, T* out, int64_t stride, int64_t gate_stride, int64_t rows,         \
        int64_t H, int64_t HV, int64_t K, int64_t V, float scale, float max_beta, int threads) {                 \
        decode(                                                                                  \
            query, key, value, a, b, A_log, dt_bias, states, slot_stride, slots, out,            \
            {stride, gate_stride, rows, H, HV, K, V, scale, max_beta}, threads);                           \
    }

DECODES(float, float, float32_float32)
DECODES(BFloat16, float, bfloat16_float32)
DECODES(float, BFloat16, float32_bfloat16)
DECODES(BFloat16, BFloat16, bfloat16_bfloat16)
