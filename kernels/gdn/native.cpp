// Gated delta rule token by token: see reference.decode_gdn.
#include "../delta.h"

struct Tokens {
    int64_t stride;       // elements between two tokens of query, key and value
    int64_t gate_stride;  // elements between two tokens of a and b
    int64_t rows, sequences, H, HV, K, V;
    float scale, max_beta;
};

// One token of one value head.
template <class T, class S>
static void advance(
    const T* query, const T* key, const T* value, float a, float b, float A_log, float dt_bias,
    const S* before, S* after, T* out, const Tokens& tokens) {
    float decay = expf(-expf(A_log) * softplus(a + dt_bias));
    float beta = tokens.max_beta / (1.0f + expf(-b));
    recall_and_write(
        query, key, value, OneDecay{decay}, beta, tokens.scale, before, after, out, tokens.K,
        tokens.V);
}

// cu_seqlens: null if every sequence has one token. The state after row r goes to step_slots[r].
template <class T, class S>
static void decode(
    const T* query, const T* key, const T* value, const T* a, const T* b, const float* A_log,
    const float* dt_bias, S* states, int64_t slot_stride, const int32_t* slots,
    const int32_t* step_slots, const int32_t* cu_seqlens, T* out, const Tokens& tokens,
    int threads) {
    int64_t K = tokens.K, V = tokens.V, HV = tokens.HV, group = HV / tokens.H;
#pragma omp parallel for schedule(static) num_threads(threads_for(tokens.rows * HV * K * V / 2, threads))
    for (int64_t item = 0; item < tokens.sequences * HV; item++) {
        int64_t sequence = item / HV, head = item % HV, key_head = head / group;
        int64_t row = cu_seqlens ? cu_seqlens[sequence] : sequence;
        int64_t end = cu_seqlens ? cu_seqlens[sequence + 1] : sequence + 1;
        S* first = states + head * K * V;
        const S* before = first + slots[sequence] * slot_stride;
        for (; row < end; row++) {
            S* after = first + step_slots[row] * slot_stride;
            int64_t at = row * tokens.stride, gate = row * tokens.gate_stride + head;
            advance(
                query + at + key_head * K, key + at + key_head * K, value + at + head * V,
                widen(a[gate]), widen(b[gate]), A_log[head], dt_bias[head], before, after,
                out + (row * HV + head) * V, tokens);
            before = after;
        }
    }
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
