// Recurrences with a state [K, V] per head, token by token: the way through sequences and slots.
#pragma once

#include "native.h"

// Calls token(row, head, before, after) for each token of each head, in the order of its sequence,
// with the states before and after it. The state after row r goes to step_slots[r].
// cu_seqlens: null if every sequence has one token.
template <class S, class Tokens, class Token>
static void each_token(
    S* states, int64_t slot_stride, const int32_t* slots, const int32_t* step_slots,
    const int32_t* cu_seqlens, const Tokens& tokens, int threads, Token token) {
    int64_t size = tokens.K * tokens.V, HV = tokens.HV;
    threads = threads_for(tokens.rows * HV * size / 2, threads);
    for_each(tokens.sequences * HV, threads, [&](int64_t item) {
        int64_t sequence = item / HV, head = item % HV;
        int64_t row = cu_seqlens ? cu_seqlens[sequence] : sequence;
        int64_t end = cu_seqlens ? cu_seqlens[sequence + 1] : sequence + 1;
        S* first = states + head * size;
        const S* before = first + slots[sequence] * slot_stride;
        for (; row < end; row++) {
            S* after = first + step_slots[row] * slot_stride;
            token(row, head, before, after);
            before = after;
        }
    });
}
