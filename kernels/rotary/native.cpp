// Rotary embedding of the first R dimensions of every head: see reference.py.
#include "../native.h"

template <class T>
static void rotate(
    const T* x, int64_t stride, const T* cos, const T* sin, T* out, int64_t tokens, int64_t heads,
    int64_t D, int64_t R) {
    int64_t half = R / 2;
    for_each(tokens * heads, 1, [&](int64_t item) {
        int64_t token = item / heads;
        const T *from = x + token * stride + item % heads * D, *c = cos + token * R,
                *s = sin + token * R;
        T* to = out + item * D;
        for (int64_t i = 0; i < half; i++) {
            float a = widen(from[i]), b = widen(from[half + i]);
            to[i] = narrow<T>(a * widen(c[i]) - b * widen(s[i]));
            to[half + i] = narrow<T>(b * widen(c[half + i]) + a * widen(s[half + i]));
        }
        memcpy(to + R, from + R, (D - R) * sizeof(T));
    });
}

#define ROTATIONS(T, NAME)                                                                       \
    EXPORT void rotate_##NAME(                                                                   \
        const T* query, int64_t query_stride, const T* key, int64_t key_stride, const T* cos,    \
        const T* sin, T* new_query, T* new_key, int64_t tokens, int64_t query_heads,             \
        int64_t key_heads, int64_t D, int64_t R) {                                               \
        rotate(query, query_stride, cos, sin, new_query, tokens, query_heads, D, R);             \
        rotate(key, key_stride, cos, sin, new_key, tokens, key_heads, D, R);                     \
    }

ROTATIONS(float, float32)
ROTATIONS(BFloat16, bfloat16)
