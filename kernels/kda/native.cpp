// Kimi Delta Attention token by token: see reference.decode_kda.
#include "../decode.h"
#include "../delta.h"

struct Tokens {
    int64_t stride;  // elements between two tokens of query, key and value
    int64_t decay_stride, beta_stride;
    int64_t rows, sequences, HV, K, V;
    float scale;
};

template <class T, class S>
static void decode(
    const T* query, const T* key, const T* value, const T* a, const T* b, const float* A_log,
    const float* dt_bias, S* states, int64_t slot_stride, const int32_t* slots,
    const int32_t* step_slots, const int32_t* cu_seqlens, T* out, const Tokens& tokens,
    int threads) {
    int64_t K = tokens.K, V = tokens.V, HV = tokens.HV;
    auto token = [&](int64_t row, int64_t head, const S* before, S* after) {
        const T* from = a + row * tokens.decay_stride + head * K;
        float decay[MAX_KEY], rate = -expf(A_log[head]);
        for (int64_t k = 0; k < K; k++)
            decay[k] = expf(rate * softplus(widen(from[k]) + dt_bias[head * K + k]));
        float beta = 1.0f / (1.0f + expf(-widen(b[row * tokens.beta_stride + head])));
        int64_t at = row * tokens.stride, keys = at + head * K;
        recall_and_write<T, S, const float*>(
            query + keys, key + keys, value + at + head * V, decay, beta, tokens.scale, before,
            after, out + (row * HV + head) * V, K, V);
    };
    each_token(states, slot_stride, slots, step_slots, cu_seqlens, tokens, threads, token);
}

#define DECODES(T, S, NAME)                                                                       \
    EXPORT void decode_kda_##NAME(                                                                \
        const T* query, const T* key, const T* value, const T* a, const T* b, const float* A_log, \
        const float* dt_bias, S* states, int64_t slot_stride, const int32_t* slots,               \
        const int32_t* step_slots, const int32_t* cu_seqlens, T* out, int64_t stride,             \
        int64_t decay_stride, int64_t beta_stride, int64_t rows, int64_t sequences, int64_t H,    \
        int64_t K, int64_t V, float scale, int threads) {                                         \
        decode(                                                                                   \
            query, key, value, a, b, A_log, dt_bias, states, slot_stride, slots, step_slots,      \
            cu_seqlens, out,                                                                      \
            {stride, decay_stride, beta_stride, rows, sequences, H, K, V, scale}, threads);       \
    }

DECODES(float, float, float32_float32)
DECODES(BFloat16, float, bfloat16_float32)
DECODES(float, BFloat16, float32_bfloat16)
DECODES(BFloat16, BFloat16, bfloat16_bfloat16)
