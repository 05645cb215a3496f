// Selection of experts: see reference.py.
#include "../native.h"

constexpr int32_t NO_EXPERT = -1;

// The k largest of `count` probabilities of each row, as the integers of their bits; of equal ones the
// first. live: null, or 0 for rows without experts.
EXPORT void choose_experts(
    const float* probabilities, int64_t rows, int64_t count, int64_t k, const int64_t* live,
    float* weights, int32_t* experts, int threads) {
    for_each(rows, threads_for(rows * count * k / 4, threads), [&](int64_t r) {
        std::vector<int32_t> left(count);
        memcpy(left.data(), probabilities + r * count, count * 4);
        for (int64_t i = r * k; i < (r + 1) * k; i++) {
            int32_t most = left[0];
            for (int64_t e = 1; e < count; e++) most = left[e] > most ? left[e] : most;
            int64_t best = 0;
            while (left[best] != most) best++;
            left[best] = INT32_MIN;
            weights[i] = probabilities[r * count + best];
            experts[i] = live && live[r] == 0 ? NO_EXPERT : int32_t(best);
        }
    });
}
