// Root-mean-square norms, one row at a time: see reference.py. Rows are [outer, inner, size] with any
// outer stride.
#include "../native.h"

template <class T>
static float factor_of(const T* x, int64_t size, float eps) {
    Lanes squares[4] = {};
    for (int64_t i = 0, turn = 0; i < size; i += LANES, turn = (turn + 1) % 4) {
        Lanes b = load_part(x + i, size - i);
        squares[turn] = multiply_add(b, b, squares[turn]);
    }
    float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    return 1.0f / __builtin_sqrtf(total / float(size) + eps);
}

// residual may be null; sums is then null too.
template <class T>
static void rms_norm(
    const T* x, int64_t stride, const T* residual, int64_t residual_stride, const float* weight,
    T* normed, T* sums, int64_t outer, int64_t inner, int64_t size, float eps, int threads) {
    for_each(outer * inner, threads_for(outer * inner * size / 4, threads), [&](int64_t row) {
        int64_t place = row % inner * size;
        const T* from = x + row / inner * stride + place;
        if (residual) {
            const T* other = residual + row / inner * residual_stride + place;
            T* total = sums + row * size;
            for (int64_t i = 0; i < size; i++)
                total[i] = narrow<T>(widen(from[i]) + widen(other[i]));
            from = total;
        }
        float factor = factor_of(from, size, eps);
        T* to = normed + row * size;
        for (int64_t i = 0; i < size; i++) to[i] = narrow<T>(widen(from[i]) * factor * weight[i]);
    });
}

// weight_stride: elements between the weights of two inner rows. gate_first: the gate is applied
// before the norm.
template <class T>
static void gated_rms_norm(
    const T* x, int64_t stride, const T* gate, int64_t gate_stride, const float* weight,
    int64_t weight_stride, T* out, int64_t outer, int64_t inner, int64_t size, float eps,
    bool gate_first, int threads) {
    for_each(outer * inner, threads_for(2 * outer * inner * size, threads), [&](int64_t row) {
        static thread_local std::vector<float> gated;
        int64_t place = row % inner * size;
        const T* from = x + row / inner * stride + place;
        const T* open = gate + row / inner * gate_stride + place;
        const float* own = weight + row % inner * weight_stride;
        T* to = out + row * size;
        if (gate_first) {
            gated.resize(size);
            float* wide = gated.data();
            for (int64_t i = 0; i < size; i++) wide[i] = silu(widen(open[i])) * widen(from[i]);
            float factor = factor_of(wide, size, eps);
            for (int64_t i = 0; i < size; i++) to[i] = narrow<T>(wide[i] * factor * own[i]);
        } else {
            float factor = factor_of(from, size, eps);
            for (int64_t i = 0; i < size; i++)
                to[i] = narrow<T>(widen(from[i]) * factor * own[i] * silu(widen(open[i])));
        }
    });
}

#define NORMS(T, NAME)                                                                            \
    EXPORT void rms_norm_##NAME(                                                                  \
        const T* x, int64_t stride, const T* residual, int64_t residual_stride,                   \
        const float* weight, T* normed, T* sums, int64_t outer, int64_t inner, int64_t size,      \
        float eps, int threads) {                                                                 \
        rms_norm(                                                                                 \
            x, stride, residual, residual_stride, weight, normed, sums, outer, inner, size, eps,  \
            threads);                                                                             \
    }                                                                                             \
    EXPORT void gated_rms_norm_##NAME(                                                            \
        const T* x, int64_t stride, const T* gate, int64_t gate_stride, const float* weight,      \
        int64_t weight_stride, T* out, int64_t outer, int64_t inner, int64_t size, float eps,     \
        int64_t gate_first, int threads) {                                                        \
        gated_rms_norm(                                                                           \
            x, stride, gate, gate_stride, weight, weight_stride, out, outer, inner, size, eps,    \
            gate_first, threads);                                                                 \
    }

NORMS(float, float32)
NORMS(BFloat16, bfloat16)
