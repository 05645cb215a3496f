// Keys and values of new tokens into their rows of the pools: see reference.write_kv.
#include "../native.h"

EXPORT void write_kv(
    const char* key, int64_t key_stride, const char* value, int64_t value_stride, char* key_pool,
    char* value_pool, int64_t pool_stride, const int64_t* indices, int64_t rows,
    int64_t row_bytes) {
    for (int64_t row = 0; row < rows; row++) {
        memcpy(key_pool + indices[row] * pool_stride, key + row * key_stride, row_bytes);
        memcpy(value_pool + indices[row] * pool_stride, value + row * value_stride, row_bytes);
    }
}
