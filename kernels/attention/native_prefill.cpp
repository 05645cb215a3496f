// Attention of prompts: see reference.prefill_attention. A task is a range of queries and some heads of
// one KV head. It reads the keys block by block from position 0, with a running maximum and sum of each
// row (arXiv 2205.14135). Blocks, and the number of keys of a row, lie on an absolute grid, so that a
// row's bits depend on its position only.
#include "../products.h"

#ifdef __AVX2__

#include <algorithm>

constexpr int64_t BLOCK = 64;       // positions of a block of keys
constexpr int64_t GROUP = 16;       // positions of queries that use the same number of keys of a block
constexpr int64_t MAX_HEADS = 16;   // heads of a task
constexpr int64_t TASK_ROWS = 256;  // rows (queries of one head) of a task, if GROUP allows it
constexpr int64_t CHUNK = 96;       // rows with scores at a time
constexpr int VECTORS = BLOCK / LANES;

template <class T>
struct Prompts {
    const T* query;
    int64_t query_stride;  // elements between two tokens
    const T *keys, *values;
    int64_t stride;  // elements between two rows of a pool
    const int32_t* table;
    int64_t table_stride;
    const int32_t *rows, *lengths, *cu_seqlens;  // rows of the table; lengths with the new tokens
    T* out;
    int64_t kv_heads, G, D, DV;  // DV: width of a value
    float scale;

    int64_t first_position(int64_t sequence) const {
        return lengths[sequence] - (cu_seqlens[sequence + 1] - cu_seqlens[sequence]);
    }
};

struct Task {
    int64_t sequence, kv_head, head, heads, begin, end;  // first head of its group; positions

    int64_t rows_of_group() const { return heads * GROUP; }
    int64_t first_group() const { return begin / GROUP; }
};

// Memory of a task.
template <class M>
struct Room {
    typedef typename M::Element Element;
    std::vector<float> words;
    std::vector<Element> elements;
    float *keys, *values, *scores, *sums, *most, *totals, *keep;
    Element *query, *rows, *weights;

    // D: padded; DV: whole registers.
    void make(int64_t num_rows, int64_t D, int64_t DV) {
        words.resize(BLOCK * (D + DV) + CHUNK * BLOCK + num_rows * (DV + 3));
        elements.resize((num_rows + BLOCK) * D + CHUNK * BLOCK);
        keys = words.data(), values = keys + BLOCK * D, scores = values + BLOCK * DV;
        sums = scores + CHUNK * BLOCK, most = sums + num_rows * DV, totals = most + num_rows;
        keep = totals + num_rows;
        query = elements.data(), rows = query + num_rows * D, weights = rows + BLOCK * D;
    }
};

// Makes right operands of `count` keys [D, BLOCK] and values [BLOCK, DV]. Values after them are 0, since
// the weights are; scores of keys after them are not used.
template <class M, class T>
static void read_block(
    const Prompts<T>& prompts, const int32_t* indices, int64_t head, int64_t count, const Room<M>& room) {
    int64_t D = padded(prompts.D), width = width_of(prompts.DV), at = head * prompts.D;
    for (int64_t j = 0; j < count; j++)
        copy_row(prompts.keys + indices[j] * prompts.stride + at, prompts.D, room.rows + j * D, D);
    transpose((float*)room.rows, D / M::DEPTH, BLOCK, D / M::DEPTH, room.keys, BLOCK);
    for (int64_t j = 0; j < BLOCK; j += M::DEPTH)
        for (int64_t d = 0; d < width; d += LANES) {
            Lanes parts[2] = {};
            for (int64_t i = 0; i < M::DEPTH && j + i < count; i++)
                parts[i] = load_part(
                    prompts.values + indices[j + i] * prompts.stride + at + d, prompts.DV - d);
            if (M::DEPTH == 2)  // exact, since the numbers are bfloat16
                parts[0] = (Lanes)((Words)parts[0] >> 16 | (Words)parts[1]);
            store(room.values + j / M::DEPTH * width + d, parts[0]);
        }
}

// Turns the scores of a row into weights, and its running maximum and sum into those with them. The
// first `count` keys are visible. keep: factor of the row's earlier sums.
template <class Element>
static void soften(
    const float* scores, int64_t count, float scale, Element* weights, float* most, float* total,
    float* keep) {
    Lanes w[VECTORS], top = all(*most), sums = {};
    for (int i = 0; i < VECTORS; i++) {
        Numbers is_visible = PLACES < int32_t(count - i * LANES);
        w[i] = choose(is_visible, load(scores + i * LANES) * scale, all(-INFINITY));
        top = larger(w[i], top);
    }
    float own = largest(top);
    for (int i = 0; i < VECTORS; i++) {
        Numbers is_visible = PLACES < int32_t(count - i * LANES);
        w[i] = choose(is_visible, exponential(w[i] - own), Lanes{});
        store(weights + i * LANES, w[i]);
        sums += w[i];
    }
    *keep = exponential(*most - own);
    *total = *total * *keep + sum(sums);
    *most = own;
}

template <class M, class T>
static void attend(const Prompts<T>& prompts, const Task& task) {
    static thread_local Room<M> room;
    int64_t D = padded(prompts.D), DV = width_of(prompts.DV), group_rows = task.rows_of_group();
    int64_t groups = (task.end - 1) / GROUP + 1 - task.first_group(), heads = task.heads;
    int64_t first = prompts.cu_seqlens[task.sequence] - prompts.first_position(task.sequence);
    int64_t place = task.kv_head * prompts.G + task.head;
    room.make(groups * group_rows, D, DV);
    // Positions of a group, and its rows: each position has one row of each head.
    auto begin_of = [&](int64_t g) { return std::max(task.begin, (task.first_group() + g) * GROUP); };
    auto end_of = [&](int64_t g) { return std::min(task.end, (task.first_group() + g + 1) * GROUP); };
    for (int64_t g = 0; g < groups; g++)
        for (int64_t p = begin_of(g), r = g * group_rows; p < end_of(g); p++)
            for (int64_t h = 0; h < heads; h++, r++)
                copy_row(
                    prompts.query + (first + p) * prompts.query_stride + (place + h) * prompts.D,
                    prompts.D, room.query + r * D, D);
    const int32_t* indices = prompts.table + prompts.rows[task.sequence] * prompts.table_stride;
    for (int64_t block = 0; block < task.end; block += BLOCK) {
        read_block<M>(prompts, indices + block, task.kv_head, std::min(task.end - block, BLOCK), room);
        for (int64_t g = 0; g < groups; g++) {
            int64_t limit = std::min((task.first_group() + g + 1) * GROUP - block, BLOCK);
            int64_t steps = steps_of<M>(limit), count = (end_of(g) - begin_of(g)) * heads;
            for (int64_t c = 0; c < count && limit > 0; c += CHUNK) {
                int64_t num_rows = std::min(count - c, CHUNK), r = g * group_rows + c;
                Product<M>::multiply(
                    num_rows, room.query + r * D, D, room.keys, BLOCK, limit, D / M::DEPTH,
                    room.scores, BLOCK, nullptr);
                for (int64_t i = 0; i < num_rows; i++) {
                    if (block == 0) room.most[r + i] = -INFINITY, room.totals[r + i] = 0.0f;
                    int64_t visible = begin_of(g) + (c + i) / heads + 1 - block;
                    soften(
                        room.scores + i * BLOCK, visible, prompts.scale, room.weights + i * BLOCK,
                        room.most + r + i, room.totals + r + i, room.keep + i);
                }
                Product<M>::multiply(
                    num_rows, room.weights, BLOCK, room.values, DV, DV, steps, room.sums + r * DV,
                    DV, block ? room.keep : nullptr);
            }
        }
    }
    for (int64_t g = 0; g < groups; g++)
        for (int64_t p = begin_of(g), r = g * group_rows; p < end_of(g); p++)
            for (int64_t h = 0; h < heads; h++, r++) {
                T* to = prompts.out + ((first + p) * prompts.kv_heads * prompts.G + place + h) * prompts.DV;
                float factor = 1.0f / room.totals[r];
                for (int64_t d = 0; d < prompts.DV; d += LANES)
                    store_part(to + d, load(room.sums + r * DV + d) * factor, prompts.DV - d);
            }
}

// Long tasks come first, so that threads end together.
template <class T>
static std::vector<Task> tasks_of(const Prompts<T>& prompts, int64_t sequences) {
    std::vector<Task> tasks;
    int64_t parts = (prompts.G + MAX_HEADS - 1) / MAX_HEADS, heads = (prompts.G + parts - 1) / parts;
    int64_t range = std::max(TASK_ROWS / (heads * GROUP), int64_t(1)) * GROUP;
    for (int64_t b = 0; b < sequences; b++)
        for (int64_t end = prompts.lengths[b], first = prompts.first_position(b); end > first;) {
            int64_t begin = std::max(first, (end - 1) / range * range);
            for (int64_t h = 0; h < prompts.kv_heads; h++)
                for (int64_t head = 0; head < prompts.G; head += heads)
                    tasks.push_back({b, h, head, std::min(heads, prompts.G - head), begin, end});
            end = begin;
        }
    std::stable_sort(
        tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.end > b.end; });
    return tasks;
}

template <class M, class T>
static void prefill(const Prompts<T>& prompts, int64_t sequences, int threads) {
    std::vector<Task> tasks = tasks_of(prompts, sequences);
    int64_t cycles = 0;
    for (const Task& task : tasks)
        cycles += task.end * (task.end - task.begin) * task.heads * prompts.D / 16;
    for_each_unequal<typename M::Region>(
        tasks.size(), threads_for(cycles, threads), [&](int64_t i) { attend<M>(prompts, tasks[i]); });
}

#define PREFILL(NAME, T, ...)                                                                     \
    EXPORT void prefill_attention_##NAME(                                                         \
        const T* query, int64_t query_stride, const T* keys, const T* values, int64_t stride,     \
        const int32_t* table, int64_t table_stride, const int32_t* rows, const int32_t* lengths,  \
        const int32_t* cu_seqlens, T* out, int64_t sequences, int64_t kv_heads, int64_t G,        \
        int64_t D, int64_t DV, float scale, int threads) {                                        \
        Prompts<T> prompts = {query, query_stride, keys,       values, stride,   table,           \
                              table_stride, rows, lengths,    cu_seqlens, out,  kv_heads,          \
                              G,     D,            DV,         scale};                             \
        prefill<__VA_ARGS__>(prompts, sequences, threads);                                        \
    }

EACH_METHOD(PREFILL)
#endif
