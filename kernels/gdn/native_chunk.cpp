// Gated delta rule tile by tile: see reference.chunk_gdn and scan.h. Queries and keys are operands as
// they are; their lengths and the decays are factors of rows and of products.
#include "../scan.h"

#ifdef __AVX2__

#include "../delta.h"

template <class M, class T>
static void chunk(
    const T* query, const T* key, const T* value, const float* gate, const float* beta,
    const Walk& walk, T* out, int64_t sequences, const Sizes& sizes, float scale, int threads) {
    int64_t K = sizes.K, V = sizes.V, HV = sizes.HV, group = HV / sizes.H, stride = sizes.stride;
    auto task = [&](int64_t item) {
        static thread_local Tile<M> tile;
        tile.make(K, V);
        int64_t head = item % HV, keys = head / group * K;
        walk.each_tile(item / HV, head, tile.state, [&](int64_t at, int64_t rows) {
            const T *q = query + at * stride + keys, *k = key + at * stride + keys;
            Decays decays(gate + at * HV + head, HV, rows);
            float query_length[TILE] = {}, key_length[TILE] = {};
            for (int64_t r = 0; r < rows; r++) {
                query_length[r] = unit_factor(q + r * stride, K, scale);
                key_length[r] = unit_factor(k + r * stride, K, 1.0f);
                tile.query_factor[r] = query_length[r] * decays.opened[r];
                tile.reader_factor[r] = key_length[r] * decays.opened[r];
                tile.writer_factor[r] = key_length[r] * decays.closing[r];
                tile.beta[r] = beta[(at + r) * HV + head];
                for (int64_t v = 0; v < V; v += LANES)
                    store(tile.news + r * V + v, load(value + (at + r) * stride + head * V + v));
            }
            for (int64_t i = 0; i < K; i++) tile.keep[i] = decays.opened[rows - 1];
            copy_rows(q, stride, rows, K, tile.query, tile.width);
            copy_rows(k, stride, rows, K, tile.reader, tile.width);
            tile.transpose_rows(tile.reader);
            tile.multiply_earlier(tile.query, rows, tile.weights);
            tile.multiply_earlier(tile.reader, rows, tile.system);
            for (int64_t r = 0; r < rows; r++) {
                float step = -tile.beta[r] * key_length[r];
                for (int64_t j = 0; j < TILE; j += LANES) {
                    float *weights = tile.weights + r * TILE + j, *system = tile.system + r * TILE + j;
                    Lanes decay = decays.until(r, j) * load(key_length + j);
                    store(weights, up_to(r, j, load(weights) * decay * query_length[r]));
                    store(system, up_to(r - 1, j, load(system) * decay * step));
                }
            }
            tile.template advance<true>(rows, out + (at * HV + head) * V, HV * V);
        });
    };
    for_each_unequal<typename M::Region>(sequences * HV, threads, task);
}

#define CHUNKS(NAME, ...) DELTA_SCAN(chunk_gdn_##NAME, __VA_ARGS__)
EACH_METHOD(CHUNKS)
#endif
