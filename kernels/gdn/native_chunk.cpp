// Gated delta rule tile by tile: see reference.chunk_gdn. In the notation of chunk.py, for a tile of
// a value head with the state S before it:
//     N = (I + tril(beta K K^T * D, -1))^-1 beta (V - exp(G) (K S))      row after row
//     O = exp(G) (Q S) + (Q K^T * D) N        S <- exp(G_R) S + K^T (exp(G_R - G) N)
#include "../tile.h"

#ifdef __AVX512F__

constexpr float L2_EPS = 1e-6f;

struct Sizes {
    int64_t stride, H, HV, K, V;
    float scale;
};

template <class T>
static void unit_rows(const T* from, int64_t stride, int64_t rows, int64_t K, float scale, float* to) {
    for (int64_t r = 0; r < rows; r++, from += stride, to += K) {
        Lanes squares = {};
        for (int64_t k = 0; k < K; k += LANES) {
            Lanes b = load(from + k);
            squares = multiply_add(b, b, squares);
        }
        float factor = scale / __builtin_sqrtf(sum(squares) + L2_EPS);
        for (int64_t k = 0; k < K; k += LANES) store(to + k, load(from + k) * factor);
    }
}

// Memory of a tile and key head, shared by their value heads in turn.
struct Room {
    std::vector<float> floats;
    float *query, *key, *key_columns, *query_key, *key_key, *weights, *system, *news, *read, *state;

    void make(int64_t K, int64_t V) {
        int64_t size = 3 * TILE * K + 4 * TILE * TILE + 2 * TILE * V + K * V;
        floats.resize(size);
        float* next = floats.data();
        auto take = [&](int64_t count) { return (next += count) - count; };
        query = take(TILE * K), key = take(TILE * K), key_columns = take(TILE * K);
        query_key = take(TILE * TILE), key_key = take(TILE * TILE);
        weights = take(TILE * TILE), system = take(TILE * TILE);
        news = take(TILE * V), read = take(TILE * V), state = take(K * V);
    }
};

// Replaces beta (V - exp(G) (K S)) by N; `system` has the terms to add, with negative sign.
static void solve(const float* system, float* news, int64_t rows, int64_t V) {
    for (int64_t r = 0; r < rows; r += ROWS) {
        int64_t count = rows - r < ROWS ? rows - r : ROWS;
        multiply_rows(
            count, {system + r * TILE, TILE}, {news, V}, V, r, news + r * V, V, 1.0f);
        for (int64_t i = r + 1; i < r + count; i++)
            multiply_rows(
                1, {system + i * TILE + r, TILE}, {news + r * V, V}, V, i - r, news + i * V, V, 1.0f);
    }
}

// One tile of one value head, after its key head's products are computed.
template <class T>
static void advance(
    const Room& room, const T* value, const float* gate, const float* beta, int64_t rows, T* out,
    float* state, const Sizes& sizes) {
    int64_t K = sizes.K, V = sizes.V, HV = sizes.HV, width = width_of(rows);
    float total[TILE] = {}, opened[TILE], closing[TILE];
    for (int64_t r = 0; r < rows; r++) total[r] = (r ? total[r - 1] : 0.0f) + gate[r * HV];
    float last = total[rows - 1];
    for (int64_t r = 0; r < width; r++) opened[r] = exponential(total[r]);
    for (int64_t r = 0; r < width; r++) closing[r] = exponential(last - total[r]);
    for (int64_t r = 0; r < rows; r++) {
        float decay[TILE], step = beta[r * HV];
        const float *qk = room.query_key + r * TILE, *kk = room.key_key + r * TILE;
        float *weights = room.weights + r * TILE, *system = room.system + r * TILE;
        for (int64_t j = 0; j < width; j++) decay[j] = exponential(total[r] - total[j]);
        for (int64_t j = 0; j < width; j++) weights[j] = j <= r ? qk[j] * decay[j] : 0.0f;
        for (int64_t j = 0; j < width; j++) system[j] = j < r ? -step * decay[j] * kk[j] : 0.0f;
    }
    multiply(rows, {room.key, K}, {state, V}, V, K, room.news, V, 0.0f);
    multiply(rows, {room.query, K}, {state, V}, V, K, room.read, V, 0.0f);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t v = 0; v < V; v += LANES) {
            float *news = room.news + r * V + v, *read = room.read + r * V + v;
            Lanes known = load(news) * opened[r];
            store(news, (load(value + r * sizes.stride + v) - known) * beta[r * HV]);
            store(read, load(read) * opened[r]);
        }
    solve(room.system, room.news, rows, V);
    multiply_lower(rows, {room.weights, TILE}, {room.news, V}, V, room.read, V, 1.0f);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t v = 0; v < V; v += LANES) {
            store(out + r * HV * V + v, load(room.read + r * V + v));
            float* news = room.news + r * V + v;
            store(news, load(news) * closing[r]);
        }
    multiply(K, {room.key_columns, TILE}, {room.news, V}, V, rows, state, V, exponential(last));
}

template <class T, class S>
static void chunk(
    const T* query, const T* key, const T* value, const float* gate, const float* beta,
    const Walk<S>& walk, T* out, int64_t sequences, const Sizes& sizes, int threads) {
    int64_t K = sizes.K, V = sizes.V, HV = sizes.HV, group = HV / sizes.H;
    for_each_unequal(sequences * HV, threads, [&](int64_t item) {
        static thread_local Room room;
        room.make(K, V);
        int64_t head = item % HV, key_head = head / group;
        walk_tiles(walk, item / HV, head, room.state, [&](int64_t at, int64_t rows, float* state) {
            int64_t keys = at * sizes.stride + key_head * K;
            unit_rows(query + keys, sizes.stride, rows, K, sizes.scale, room.query);
            unit_rows(key + keys, sizes.stride, rows, K, 1.0f, room.key);
            transpose(room.key, rows, K, room.key_columns);
            multiply_with_earlier(rows, room.query, room.key_columns, K, room.query_key);
            multiply_with_earlier(rows, room.key, room.key_columns, K, room.key_key);
            advance(
                room, value + at * sizes.stride + head * V, gate + at * HV + head,
                beta + at * HV + head, rows, out + (at * HV + head) * V, state, sizes);
        });
    });
}

#define CHUNKS(T, S, NAME)                                                                       \
    EXPORT void chunk_gdn_##NAME(                                                                \
        const T* query, const T* key, const T* value, const float* gate, const float* beta,      \
        S* states, int64_t slot_stride, const int32_t* slots, const bool* resumed,               \
        const int32_t* cu_seqlens, const int32_t* ends, const int32_t* export_slots,             \
        const int32_t* cu_exports, T* out, int64_t stride, int64_t tile_size,                    \
        int64_t sequences, int64_t H, int64_t HV, int64_t K, int64_t V, float scale,             \
        int threads) {                                                                           \
        Walk<S> walk = {states, slot_stride, K * V, slots, cu_seqlens, ends, export_slots,       \
                        cu_exports, resumed, tile_size};                                         \
        chunk(query, key, value, gate, beta, walk, out, sequences, {stride, H, HV, K, V, scale}, \
              threads);                                                                          \
    }

CHUNKS(float, float, float32_float32)
CHUNKS(BFloat16, float, bfloat16_float32)
CHUNKS(float, BFloat16, float32_bfloat16)
CHUNKS(BFloat16, BFloat16, bfloat16_bfloat16)
#endif
