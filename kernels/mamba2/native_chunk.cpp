// Mamba-2 tile by tile: see reference.chunk_mamba2. For a tile of a head with the state S before it:
//     O = (C B^T * L) diag(dt) X + D X + exp(G) (C S)        S <- exp(G_R) S + B^T (dt exp(G_R - G) X)
#include "../tile.h"

#ifdef __AVX512F__

struct Sizes {
    int64_t stride, H, HV, K, V;
};

struct Room {
    std::vector<float> floats;
    float *B, *C, *B_columns, *products, *x, *read, *state;

    void make(int64_t K, int64_t V) {
        floats.resize(3 * TILE * K + TILE * TILE + 2 * TILE * V + K * V);
        float* next = floats.data();
        auto take = [&](int64_t count) { return (next += count) - count; };
        B = take(TILE * K), C = take(TILE * K), B_columns = take(TILE * K);
        products = take(TILE * TILE);
        x = take(TILE * V), read = take(TILE * V), state = take(K * V);
    }
};

template <class T>
static void widen_rows(const T* from, int64_t stride, int64_t rows, int64_t size, float* to) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < size; i += LANES) store(to + r * size + i, load(from + r * stride + i));
}

// One tile of one head.
template <class T>
static void advance(
    const Room& room, const T* x, const float* gate, const float* step, float D, int64_t rows,
    T* out, float* state, const Sizes& sizes) {
    int64_t K = sizes.K, V = sizes.V, HV = sizes.HV, width = width_of(rows);
    float total[TILE] = {}, steps[TILE] = {}, opened[TILE], closing[TILE];
    for (int64_t r = 0; r < rows; r++) {
        total[r] = (r ? total[r - 1] : 0.0f) + gate[r * HV];
        steps[r] = step[r * HV];
    }
    float last = total[rows - 1];
    for (int64_t r = 0; r < width; r++) opened[r] = exponential(total[r]);
    for (int64_t r = 0; r < width; r++) closing[r] = exponential(last - total[r]) * steps[r];
    multiply_with_earlier(rows, room.C, room.B_columns, K, room.products);
    for (int64_t r = 0; r < rows; r++) {
        float decay[TILE], *weights = room.products + r * TILE;
        for (int64_t j = 0; j < width; j++) decay[j] = exponential(total[r] - total[j]) * steps[j];
        for (int64_t j = 0; j < width; j++) weights[j] = j <= r ? weights[j] * decay[j] : 0.0f;
        weights[r] += D;
    }
    widen_rows(x, sizes.stride, rows, V, room.x);
    multiply(rows, {room.C, K}, {state, V}, V, K, room.read, V, 0.0f);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t v = 0; v < V; v += LANES) {
            float* read = room.read + r * V + v;
            store(read, load(read) * opened[r]);
        }
    multiply_lower(rows, {room.products, TILE}, {room.x, V}, V, room.read, V, 1.0f);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t v = 0; v < V; v += LANES) {
            store(out + r * HV * V + v, load(room.read + r * V + v));
            float* own = room.x + r * V + v;
            store(own, load(own) * closing[r]);
        }
    multiply(K, {room.B_columns, TILE}, {room.x, V}, V, rows, state, V, exponential(last));
}

template <class T, class S>
static void chunk(
    const T* x, const T* B, const T* C, const float* gate, const float* step, const float* D,
    const Walk<S>& walk, T* out, int64_t sequences, const Sizes& sizes, int threads) {
    int64_t K = sizes.K, V = sizes.V, HV = sizes.HV, group = HV / sizes.H;
    for_each_unequal(sequences * HV, threads, [&](int64_t item) {
        static thread_local Room room;
        room.make(K, V);
        int64_t head = item % HV;
        walk_tiles(walk, item / HV, head, room.state, [&](int64_t at, int64_t rows, float* state) {
            int64_t keys = at * sizes.stride + head / group * K;
            widen_rows(B + keys, sizes.stride, rows, K, room.B);
            widen_rows(C + keys, sizes.stride, rows, K, room.C);
            transpose(room.B, rows, K, room.B_columns);
            advance(
                room, x + at * sizes.stride + head * V, gate + at * HV + head, step + at * HV + head,
                D[head], rows, out + (at * HV + head) * V, state, sizes);
        });
    });
}

#define CHUNKS(T, S, NAME)                                                                        \
    EXPORT void chunk_mamba2_##NAME(                                                              \
        const T* x, const T* B, const T* C, const float* gate, const float* step, const float* D, \
        S* states, int64_t slot_stride, const int32_t* slots, const bool* resumed,                \
        const int32_t* cu_seqlens, const int32_t* ends, const int32_t* export_slots,              \
        const int32_t* cu_exports, T* out, int64_t stride, int64_t tile_size,                     \
        int64_t sequences, int64_t H, int64_t HV, int64_t K, int64_t V, int threads) {            \
        Walk<S> walk = {states, slot_stride, K * V, slots, cu_seqlens, ends, export_slots,        \
                        cu_exports, resumed, tile_size};                                          \
        chunk(x, B, C, gate, step, D, walk, out, sequences, {stride, H, HV, K, V}, threads);      \
    }

CHUNKS(float, float, float32_float32)
CHUNKS(BFloat16, float, bfloat16_float32)
CHUNKS(float, BFloat16, float32_bfloat16)
CHUNKS(BFloat16, BFloat16, bfloat16_bfloat16)
#endif
