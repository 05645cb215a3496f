// Mamba-2 token by token: see reference.decode_mamba2. A head's state is read and written once.
#include "../decode.h"

constexpr int64_t MAX_KEY = 512;

struct Tokens {
    int64_t stride;  // elements between two tokens of x, B and C
    int64_t step_stride;
    int64_t rows, sequences, H, HV, K, V;
    float shortest, longest;
};

// COLUMNS * 16 columns of a state [K, V]. `after` may alias `before`.
template <class T, class S, int COLUMNS>
static void advance(
    const S* before, S* after, int64_t V, int64_t K, const float* B, const float* C, float decay,
    float step, float D, const T* x, T* out) {
    Lanes written[COLUMNS], read[COLUMNS] = {};
    for (int c = 0; c < COLUMNS; c++) written[c] = load(x + c * LANES) * step;
    for (int64_t k = 0; k < K; k++)
        for (int c = 0; c < COLUMNS; c++) {
            int64_t at = k * V + c * LANES;
            Lanes s = multiply_add(written[c], all(B[k]), load(before + at) * decay);
            read[c] = multiply_add(s, all(C[k]), read[c]);
            store(after + at, s);
        }
    for (int c = 0; c < COLUMNS; c++)
        store(out + c * LANES, multiply_add(load(x + c * LANES), all(D), read[c]));
}

template <class T, class S>
static void decode(
    const T* x, const T* B, const T* C, const T* dt, const float* A_log, const float* dt_bias,
    const float* D, S* states, int64_t slot_stride, const int32_t* slots,
    const int32_t* step_slots, const int32_t* cu_seqlens, T* out, const Tokens& tokens,
    int threads) {
    int64_t K = tokens.K, V = tokens.V, HV = tokens.HV, group = HV / tokens.H;
    auto token = [&](int64_t row, int64_t head, const S* before, S* after) {
        int64_t at = row * tokens.stride, keys = at + head / group * K;
        float wide_B[MAX_KEY], wide_C[MAX_KEY];
        for (int64_t k = 0; k < K; k++) wide_B[k] = widen(B[keys + k]);
        for (int64_t k = 0; k < K; k++) wide_C[k] = widen(C[keys + k]);
        float step = softplus(widen(dt[row * tokens.step_stride + head]) + dt_bias[head]);
        step = step < tokens.shortest ? tokens.shortest : step;
        step = step > tokens.longest ? tokens.longest : step;
        float decay = expf(-expf(A_log[head]) * step);
        const T* from = x + at + head * V;
        T* to = out + (row * HV + head) * V;
        int64_t v = 0;
        for (; v + 4 * LANES <= V; v += 4 * LANES)
            advance<T, S, 4>(
                before + v, after + v, V, K, wide_B, wide_C, decay, step, D[head], from + v,
                to + v);
        for (; v < V; v += LANES)
            advance<T, S, 1>(
                before + v, after + v, V, K, wide_B, wide_C, decay, step, D[head], from + v,
                to + v);
    };
    each_token(states, slot_stride, slots, step_slots, cu_seqlens, tokens, threads, token);
}

#define DECODES(T, S, NAME)                                                                       \
    EXPORT void decode_mamba2_##NAME(                                                             \
        const T* x, const T* B, const T* C, const T* dt, const float* A_log,                      \
        const float* dt_bias, const float* D, S* states, int64_t slot_stride,                     \
        const int32_t* slots, const int32_t* step_slots, const int32_t* cu_seqlens, T* out,       \
        int64_t stride, int64_t step_stride, int64_t rows, int64_t sequences, int64_t H,          \
        int64_t HV, int64_t K, int64_t V, float shortest, float longest, int threads) {           \
        decode(                                                                                   \
            x, B, C, dt, A_log, dt_bias, D, states, slot_stride, slots, step_slots, cu_seqlens,   \
            out, {stride, step_stride, rows, sequences, H, HV, K, V, shortest, longest},          \
            threads);                                                                             \
    }

DECODES(float, float, float32_float32)
DECODES(BFloat16, float, bfloat16_float32)
DECODES(float, BFloat16, float32_bfloat16)
DECODES(BFloat16, BFloat16, bfloat16_bfloat16)
