// Mamba-2 tile by tile: see reference.chunk_mamba2 and scan.h. B and C are operands as they are; steps
// and decays are factors of rows and of products.
#include "../scan.h"

#ifdef __AVX2__

template <class M, class T>
static void chunk(
    const T* x, const T* B, const T* C, const float* gate, const float* step, const float* D,
    const Walk& walk, T* out, int64_t sequences, const Sizes& sizes, int threads) {
    int64_t K = sizes.K, V = sizes.V, HV = sizes.HV, group = HV / sizes.H, stride = sizes.stride;
    auto task = [&](int64_t item) {
        static thread_local Tile<M> tile;
        tile.make(K, V);
        int64_t head = item % HV, keys = head / group * K;
        walk.each_tile(item / HV, head, tile.state, [&](int64_t at, int64_t rows) {
            Decays decays(gate + at * HV + head, HV, rows);
            float steps[TILE] = {};
            for (int64_t r = 0; r < rows; r++) {
                steps[r] = step[(at + r) * HV + head];
                tile.query_factor[r] = decays.opened[r];
                tile.writer_factor[r] = decays.closing[r] * steps[r];
                for (int64_t v = 0; v < V; v += LANES)
                    store(tile.news + r * V + v, load(x + (at + r) * stride + head * V + v));
            }
            for (int64_t i = 0; i < K; i++) tile.keep[i] = decays.opened[rows - 1];
            copy_rows(C + at * stride + keys, stride, rows, K, tile.query, tile.width);
            copy_rows(B + at * stride + keys, stride, rows, K, tile.reader, tile.width);
            tile.transpose_rows(tile.reader);
            tile.multiply_earlier(tile.query, rows, tile.weights);
            for (int64_t r = 0; r < rows; r++) {
                float* weights = tile.weights + r * TILE;
                for (int64_t j = 0; j < TILE; j += LANES) {
                    Lanes factor = decays.until(r, j) * load(steps + j);
                    store(weights + j, up_to(r, j, load(weights + j) * factor));
                }
                weights[r] += D[head];
            }
            tile.template advance<false>(rows, out + (at * HV + head) * V, HV * V);
        });
    };
    for_each_unequal<typename M::Region>(sequences * HV, threads, task);
}

#define CHUNKS(NAME, T, ...)                                                                      \
    EXPORT void chunk_mamba2_##NAME(                                                              \
        const T* x, const T* B, const T* C, const float* gate, const float* step, const float* D, \
        SCAN_PARAMETERS(T), int threads) {                                                        \
        chunk<__VA_ARGS__>(                                                                       \
            x, B, C, gate, step, D, WALK, out, sequences, {stride, H, HV, K, V}, threads);        \
    }
EACH_METHOD(CHUNKS)
#endif
