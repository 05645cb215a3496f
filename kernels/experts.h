// The frame of mixtures of experts: see moe/reference.py. Kind says how the rows of a weight are multiplied:
//     Weight              a packed matrix with `outputs` and `columns`
//     Element             rows of x are made of, stride(weight) each, by prepare(row, weight, to)
//     padded(rows)        rows that are reserved for so many
//     product(...)        of rows with a weight, into contiguous rows; its items are independent
#pragma once

#include "native.h"

#include <algorithm>

constexpr int64_t AT_ONCE = 1024;  // rows that are prepared at a time

// All items of products with one weight each.
template <class Product>
static void multiply_all(const std::vector<Product>& products, int threads) {
    int64_t items = 0, cycles = 0;
    std::vector<int64_t> ends;
    for (const Product& one : products) ends.push_back(items += one.items()), cycles += one.cycles();
    for_each(items, threads_for(cycles, threads), [&](int64_t item) {
        int64_t p = std::upper_bound(ends.begin(), ends.end(), item) - ends.begin();
        products[p].alone(item - (p ? ends[p - 1] : 0));
    });
}

// SiLU of the first half times the second half, or the square of ReLU.
template <class T>
static void activate(const T* x, bool is_gated, int64_t size, T* to) {
    for (int64_t i = 0; i < size; i += LANES) {
        Lanes own = load_part(x + i, size - i);
        if (is_gated)
            own = own / (exponential(-own) + 1.0f) * load_part(x + size + i, size - i);
        else
            own = choose(own < 0.0f, Lanes{}, own), own = own * own;
        store_part(to + i, own, size - i);
    }
}

// At most AT_ONCE rows. Pairs of a token and one of its experts are ordered by expert, each of which has its
// rows next to each other.
template <class Kind, class T>
static void sum_some(
    const T* x, int64_t stride, int64_t rows, const float* weights, const int32_t* experts, int64_t k,
    const typename Kind::Weight* up, const typename Kind::Weight* down, int64_t count, bool is_gated,
    T* y, int64_t y_stride, int threads) {
    typedef typename Kind::Element Element;
    static thread_local std::vector<Element> memory;
    static thread_local std::vector<T> results;
    int64_t middle = up->outputs, width = down->outputs;
    int64_t of_up = Kind::stride(*up), of_down = Kind::stride(*down);
    std::vector<int64_t> counts(count), firsts(count + 1), places(rows * k, -1);
    for (int64_t i = 0; i < rows * k; i++)
        if (experts[i] >= 0) places[i] = counts[experts[i]]++;
    for (int64_t e = 0; e < count; e++) firsts[e + 1] = firsts[e] + Kind::padded(counts[e]);
    for (int64_t i = 0; i < rows * k; i++)
        if (experts[i] >= 0) places[i] += firsts[experts[i]];
    int64_t padded = firsts[count];
    memory.resize(padded * (of_up + of_down) + rows * of_up);
    results.resize(padded * (middle + width));
    Element *first = memory.data(), *second = first + padded * of_up, *of_rows = second + padded * of_down;
    T *inner = results.data(), *outer = inner + padded * middle;
    for_each(rows, threads_for(rows * up->columns, threads), [&](int64_t r) {
        Element* own = of_rows + r * of_up;
        Kind::prepare(x + r * stride, *up, own);
        for (int64_t i = r * k; i < (r + 1) * k; i++)
            if (places[i] >= 0)
                memcpy((void*)(first + places[i] * of_up), own, of_up * sizeof(Element));
    });
    auto multiply = [&](const typename Kind::Weight* each, const Element* from, int64_t size, T* to) {
        std::vector<typename Kind::Product> products;
        for (int64_t e = 0; e < count; e++)
            if (counts[e])
                products.push_back(Kind::product(
                    each[e], from + firsts[e] * size, counts[e], to + firsts[e] * each->outputs, threads));
        multiply_all(products, threads);
    };
    multiply(up, first, of_up, inner);
    for_each(rows * k, threads_for(rows * k * middle, threads), [&](int64_t i) {
        static thread_local std::vector<T> activated;
        activated.resize(down->columns);
        if (places[i] < 0) return;
        activate(inner + places[i] * middle, is_gated, down->columns, activated.data());
        Kind::prepare((const T*)activated.data(), *down, second + places[i] * of_down);
    });
    multiply(down, second, of_down, outer);
    for_each(rows, threads_for(rows * k * width / LANES, threads), [&](int64_t r) {
        for (int64_t i = 0; i < width; i += LANES) {
            Lanes total = {};
            for (int64_t j = r * k; j < (r + 1) * k; j++) {
                Lanes own = places[j] < 0 ? Lanes{} : load_part(outer + places[j] * width + i, width - i);
                total = j == r * k ? own * weights[j] : multiply_add(own, all(weights[j]), total);
            }
            store_part(y + r * y_stride + i, total, width - i);
        }
    });
}

template <class Kind, class T>
static void sum_experts(
    const T* x, int64_t stride, int64_t rows, const float* weights, const int32_t* experts, int64_t k,
    const typename Kind::Weight* up, const typename Kind::Weight* down, int64_t count, bool is_gated,
    T* y, int64_t y_stride, int threads) {
    for (int64_t r = 0; r < rows; r += AT_ONCE) {
        int64_t some = rows - r < AT_ONCE ? rows - r : AT_ONCE;
        sum_some<Kind>(
            x + r * stride, stride, some, weights + r * k, experts + r * k, k, up, down, count, is_gated,
            y + r * y_stride, y_stride, threads);
    }
}

// An exported mixture of experts with this kind.
#define EXPERTS(NAME, T, ...)                                                                     \
    EXPORT void experts_##NAME(                                                                   \
        const T* x, int64_t stride, int64_t rows, const float* weights, const int32_t* experts,   \
        int64_t k, const __VA_ARGS__::Weight* up, const __VA_ARGS__::Weight* down, int64_t count, \
        int64_t is_gated, T* y, int64_t y_stride, int threads) {                                  \
        sum_experts<__VA_ARGS__>(                                                                 \
            x, stride, rows, weights, experts, k, up, down, count, is_gated, y, y_stride,         \
            threads);                                                                             \
    }
