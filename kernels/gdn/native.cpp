// Gated delta rule token by token: see reference.decode_gdn.
#include "../decode.h"
#include "../delta.h"

struct Tokens {
    int64_t stride;       // elements between two tokens of query, key and value
    int64_t gate_stride;  // elements between two tokens of a and b
    int64_t rows, sequences, H, HV, K, V;
    float scale, max_beta;
};

template <class T, class S>
static void decode(
    const T* query, const T* key, const T* value, const T* a, const T* b, const float* A_log,
    const float* dt_bias, S* states, int64_t slot_stride, const int32_t* slots,
    const int32_t* step_slots, const int32_t* cu_seqlens, T* out, const Tokens& tokens,
    int threads) {
    int64_t K = tokens.K, V = tokens.V, HV = tokens.HV, group = HV / tokens.H;
    auto token = [&](int64_t row, int64_t head, const S* before, S* after) {
        int64_t at = row * tokens.stride, gate = row * tokens.gate_stride + head;
        int64_t keys = at + head / group * K;
        float decay = expf(-expf(A_log[head]) * softplus(widen(a[gate]) + dt_bias[head]));
        float beta = tokens.max_beta / (1.0f + expf(-widen(b[gate])));
        recall_and_write(
            query + keys, key + keys, value + at + head * V, OneDecay{decay}, beta, tokens.scale,
            before, after, out + (row * HV + head) * V, K, V);
    };
    each_token(states, slot_stride, slots, step_slots, cu_seqlens, tokens, threads, token);
}

#define DECODES(T, S, NAME)                                                                      \
    EXPORT void decode_gdn_##NAME(                                                               \
        const T* query, const T* key, const T* value, const T* a, const T* b,                    \
        const float* A_log, const float* dt_bias, S* states, int64_t slot_stride,                \
        const int32_t* slots, const int32_t* step_slots, const int32_t* cu_seqlens, T* out,      \
        int64_t stride, int64_t gate_stride, int64_t rows, int64_t sequences, int64_t H,         \
        int64_t HV, int64_t K, int64_t V, float scale, float max_beta, int threads) {            \
        decode(                                                                                  \
            query, key, value, a, b, A_log, dt_bias, states, slot_stride, slots, step_slots,     \
            cu_seqlens, out,                                                                     \
            {stride, gate_stride, rows, sequences, H, HV, K, V, scale, max_beta}, threads);      \
    }

DECODES(float, float, float32_float32)
DECODES(BFloat16, float, bfloat16_float32)
DECODES(float, BFloat16, float32_bfloat16)
DECODES(BFloat16, BFloat16, bfloat16_bfloat16)
