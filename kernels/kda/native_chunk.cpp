// Kimi Delta Attention tile by tile: see reference.chunk_kda and scan.h. The decays of a pair of tokens
// are computed in levels, as in the reference, from products of decays only.
#include "../scan.h"

#ifdef __AVX2__

#include "../delta.h"

// Float32 rows [TILE, K] of a tile.
struct Rows {
    int64_t K;
    std::vector<float> floats;
    float *query, *key, *opened, *closing, *later, *earlier, *columns, *products;

    void make(int64_t key_size) {
        K = key_size;
        floats.resize(9 * TILE * K + TILE * TILE);
        float** parts[] = {&query, &key, &opened, &closing, &later, &earlier, &columns, &products};
        float* next = floats.data();
        for (float** part : parts) *part = next, next += (part == &later ? 2 : 1) * TILE * K;
    }

    float* row(float* rows, int64_t r) const { return rows + r * K; }

    // Computes <Q, K> into `weights` up to the diagonal and <K, K> into `system` below it. `opened` has
    // the decays of the rows and becomes the products from the tile's start; `closing` becomes those to
    // its end.
    void multiply_pairs(int64_t rows, float* weights, float* system) const {
        for (int64_t r = 0; r < rows; r++) weights[r * TILE + r] = dot(row(query, r), row(key, r));
        for (int64_t i = 0; i < rows * K; i += LANES) store(closing + i, all(1.0f));
        for (int64_t size = 1; size < rows; size *= 2)
            for (int64_t middle = size; middle < rows; middle += 2 * size) {
                int64_t end = middle + size < rows ? middle + size : rows;
                multiply_halves(middle - size, middle, end, weights, system);
                for (int64_t k = 0; k < K; k += LANES) {
                    Lanes since = load(row(opened, middle - 1) + k), until = load(row(opened, end - 1) + k);
                    for (int64_t r = middle; r < end; r++)
                        store(row(opened, r) + k, load(row(opened, r) + k) * since);
                    for (int64_t r = middle - size; r < middle; r++)
                        store(row(closing, r) + k, load(row(closing, r) + k) * until);
                }
            }
    }

  private:
    float dot(const float* a, const float* b) const {
        Lanes sums = {};
        for (int64_t k = 0; k < K; k += LANES) sums = multiply_add(load(a + k), load(b + k), sums);
        return sum(sums);
    }

    void scale_rows(const float* rows, const float* factors, int64_t first, int64_t end, float* to) const {
        for (int64_t i = first * K; i < end * K; i += LANES, to += LANES)
            store(to, load(rows + i) * load(factors + i));
    }

    // Products of the rows [middle, end) with the rows [first, middle).
    void multiply_halves(
        int64_t first, int64_t middle, int64_t end, float* weights, float* system) const {
        int64_t count = end - middle, columns_count = middle - first;
        scale_rows(query, opened, middle, end, later);
        scale_rows(key, opened, middle, end, later + count * K);
        scale_rows(key, closing, first, middle, earlier);
        auto place = [&](int64_t i) {
            return (i < count ? weights : system) + (middle + i % count) * TILE + first;
        };
        if (columns_count < LANES) {
            for (int64_t i = 0; i < 2 * count; i++)
                for (int64_t j = 0; j < columns_count; j++)
                    place(i)[j] = dot(later + i * K, earlier + j * K);
            return;
        }
        transpose(earlier, K, columns_count, K, columns, columns_count);
        Product<Singles>::multiply(
            2 * count, later, K, columns, columns_count, columns_count, K, products, columns_count,
            nullptr);
        for (int64_t i = 0; i < 2 * count; i++)
            memcpy(place(i), products + i * columns_count, columns_count * 4);
    }
};

template <class M, class T>
static void chunk(
    const T* query, const T* key, const T* value, const float* gate, const float* beta,
    const Walk& walk, T* out, int64_t sequences, const Sizes& sizes, float scale, int threads) {
    int64_t K = sizes.K, V = sizes.V, H = sizes.HV, stride = sizes.stride;
    auto task = [&](int64_t item) {
        static thread_local Tile<M> tile;
        static thread_local Rows own;
        tile.make(K, V);
        own.make(K);
        int64_t head = item % H;
        walk.each_tile(item / H, head, tile.state, [&](int64_t at, int64_t rows) {
            for (int64_t r = 0; r < rows; r++) {
                int64_t token = (at + r) * stride;
                unit(query + token + head * K, own.query + r * K, K, scale);
                unit(key + token + head * K, own.key + r * K, K, 1.0f);
                const float* log_decay = gate + ((at + r) * H + head) * K;
                for (int64_t k = 0; k < K; k += LANES)
                    store(own.opened + r * K + k, exponential(load(log_decay + k)));
                for (int64_t v = 0; v < V; v += LANES)
                    store(tile.news + r * V + v, load(value + token + head * V + v));
                tile.query_factor[r] = tile.reader_factor[r] = tile.writer_factor[r] = 1.0f;
                tile.beta[r] = beta[(at + r) * H + head];
            }
            own.multiply_pairs(rows, tile.weights, tile.system);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < TILE; j += LANES) {
                    float *weights = tile.weights + r * TILE + j, *system = tile.system + r * TILE + j;
                    store(weights, up_to(r, j, load(weights)));
                    store(system, up_to(r - 1, j, load(system) * -tile.beta[r]));
                }
            for (int64_t i = 0; i < rows * K; i += LANES) {
                Lanes opened = load(own.opened + i), k = load(own.key + i);
                store(own.query + i, load(own.query + i) * opened);
                store(own.later + i, k * opened);
                store(own.earlier + i, k * load(own.closing + i));
            }
            memcpy(tile.keep, own.opened + (rows - 1) * K, K * 4);
            copy_rows(own.earlier, K, rows, K, tile.reader, tile.width);
            tile.transpose_rows(tile.reader);
            copy_rows(own.query, K, rows, K, tile.query, tile.width);
            copy_rows(own.later, K, rows, K, tile.reader, tile.width);
            tile.template advance<true>(rows, out + (at * H + head) * V, H * V);
        });
    };
    for_each_unequal<typename M::Region>(sequences * H, threads, task);
}

#define CHUNKS(NAME, ...) DELTA_SCAN(chunk_kda_##NAME, __VA_ARGS__)
EACH_METHOD(CHUNKS)
#endif
