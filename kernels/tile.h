// Shared parts of the scans over tiles of tokens: small float32 products, each summed in order in one
// register lane, and the loop over a sequence's tiles.
#pragma once

#include "native.h"

#ifdef __AVX512F__

constexpr int64_t TILE = 64;  // maximum tokens of a tile, and the row stride of tile-wide matrices
constexpr int64_t ROWS = 6;   // with 4 column registers, these and their operands fill the register file

struct Matrix {
    const float* from;
    int64_t stride;
};

// to = keep * to + a b for R rows and 16 C columns; keep = 0 ignores the contents of `to`.
template <int R, int C>
static void multiply_block(
    Matrix a, Matrix b, int64_t depth, float* to, int64_t stride, float keep) {
    Lanes sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++)
            sums[r][c] = keep == 0.0f ? Lanes{} : load(to + r * stride + c * LANES) * keep;
    for (int64_t k = 0; k < depth; k++) {
        Lanes part[C];
        for (int c = 0; c < C; c++) part[c] = load(b.from + k * b.stride + c * LANES);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++)
                sums[r][c] = multiply_add(all(a.from[r * a.stride + k]), part[c], sums[r][c]);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(to + r * stride + c * LANES, sums[r][c]);
}

template <int C>
static void multiply_columns(
    int64_t rows, Matrix a, Matrix b, int64_t depth, float* to, int64_t stride, float keep) {
    switch (rows) {
        case 1: return multiply_block<1, C>(a, b, depth, to, stride, keep);
        case 2: return multiply_block<2, C>(a, b, depth, to, stride, keep);
        case 3: return multiply_block<3, C>(a, b, depth, to, stride, keep);
        case 4: return multiply_block<4, C>(a, b, depth, to, stride, keep);
        case 5: return multiply_block<5, C>(a, b, depth, to, stride, keep);
        default: return multiply_block<6, C>(a, b, depth, to, stride, keep);
    }
}

// At most ROWS rows; columns: a multiple of 16.
static void multiply_rows(
    int64_t rows, Matrix a, Matrix b, int64_t columns, int64_t depth, float* to, int64_t stride,
    float keep) {
    int64_t c = 0;
    for (; c + 4 * LANES <= columns; c += 4 * LANES)
        multiply_columns<4>(rows, a, {b.from + c, b.stride}, depth, to + c, stride, keep);
    for (; c < columns; c += LANES)
        multiply_columns<1>(rows, a, {b.from + c, b.stride}, depth, to + c, stride, keep);
}

static void multiply(
    int64_t rows, Matrix a, Matrix b, int64_t columns, int64_t depth, float* to, int64_t stride,
    float keep) {
    for (int64_t r = 0; r < rows; r += ROWS)
        multiply_rows(
            rows - r < ROWS ? rows - r : ROWS, {a.from + r * a.stride, a.stride}, b, columns, depth,
            to + r * stride, stride, keep);
}

// The same, if row r of a is zero after column r.
static void multiply_lower(
    int64_t rows, Matrix a, Matrix b, int64_t columns, float* to, int64_t stride, float keep) {
    for (int64_t r = 0; r < rows; r += ROWS) {
        int64_t count = rows - r < ROWS ? rows - r : ROWS;
        multiply_rows(
            count, {a.from + r * a.stride, a.stride}, b, columns, r + count, to + r * stride,
            stride, keep);
    }
}

// Columns of the rows of a tile, in whole registers.
static int64_t width_of(int64_t rows) { return (rows + LANES - 1) / LANES * LANES; }

// x [rows, depth] times columns [depth, TILE], each row at least up to the diagonal.
static void multiply_with_earlier(
    int64_t rows, const float* x, const float* columns, int64_t depth, float* to) {
    for (int64_t r = 0; r < rows; r += ROWS) {
        int64_t count = rows - r < ROWS ? rows - r : ROWS;
        multiply_rows(
            count, {x + r * depth, depth}, {columns, TILE}, width_of(r + count), depth,
            to + r * TILE, TILE, 0.0f);
    }
}

// x [rows, size] to its transpose [size, TILE], zero-padded to whole registers.
static void transpose(const float* x, int64_t rows, int64_t size, float* to) {
    int64_t width = width_of(rows);
    for (int64_t k = 0; k < size; k++) {
        for (int64_t r = 0; r < rows; r++) to[k * TILE + r] = x[r * size + k];
        for (int64_t r = rows; r < width; r++) to[k * TILE + r] = 0.0f;
    }
}

// Layout of sequences and states: see packed.Packed and packed.Exports.
template <class S>
struct Walk {
    S* states;
    int64_t slot_stride, head_size;  // elements between two slots; elements of a head in a state
    const int32_t *slots, *cu_seqlens, *ends, *export_slots, *cu_exports;
    const bool* resumed;
    int64_t tile_size;  // tokens
};

// Calls step(first row, rows, state) for every tile of a sequence, with the float32 state of one head.
template <class S, class Step>
static void walk_tiles(const Walk<S>& walk, int64_t sequence, int64_t head, float* state, Step step) {
    int64_t begin = walk.cu_seqlens[sequence], end = walk.cu_seqlens[sequence + 1];
    if (begin == end) return;
    S* own = walk.states + head * walk.head_size;
    S* slot = own + walk.slots[sequence] * walk.slot_stride;
    for (int64_t i = 0; i < walk.head_size; i += LANES)
        store(state + i, walk.resumed[sequence] ? load(slot + i) : Lanes{});
    int64_t exported = walk.cu_exports[sequence];
    for (int64_t at = begin; at < end; at += walk.tile_size) {
        int64_t count = end - at < walk.tile_size ? end - at : walk.tile_size;
        step(at, count, state);
        auto save = [&](S* to) {
            for (int64_t i = 0; i < walk.head_size; i += LANES) store(to + i, load(state + i));
        };
        for (; exported < walk.cu_exports[sequence + 1]; exported++) {
            if (walk.ends[exported] != at + count - begin) break;
            save(own + walk.export_slots[exported] * walk.slot_stride);
        }
        if (at + count == end) save(slot);
        // Rounded, so that a checkpoint restores exactly the state of a cold run.
        for (int64_t i = 0; sizeof(S) < 4 && i < walk.head_size; i += LANES) {
            S narrowed[LANES];
            store(narrowed, load(state + i));
            store(state + i, load(narrowed));
        }
    }
}

#endif
