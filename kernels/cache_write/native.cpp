// Writes the KV of new tokens to rows of the pools: see reference.write_kv and write_rows.
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

// Indices are int32_t if index_bytes is 4, else int64_t.
EXPORT void write_rows(
    const char* from, int64_t from_stride, char* pool, int64_t pool_stride, const void* indices,
    int64_t index_bytes, int64_t rows, int64_t row_bytes) {
    for (int64_t row = 0; row < rows; row++) {
        int64_t to = index_bytes == 4 ? ((const int32_t*)indices)[row]
                                      : ((const int64_t*)indices)[row];
        memcpy(pool + to * pool_stride, from + row * from_stride, row_bytes);
    }
}
