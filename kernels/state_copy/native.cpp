// States from slot to slot in every layer of a pool: see reference.copy_states.
#include "../native.h"

EXPORT void copy_states(
    char* pool, int64_t layers, int64_t layer_stride, int64_t slot_stride, int64_t bytes,
    const int32_t* sources, const int32_t* targets, int64_t copies, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads_for(layers * copies * bytes / 8, threads))
    for (int64_t item = 0; item < layers * copies; item++) {
        char* layer = pool + item / copies * layer_stride;
        int64_t copy = item % copies;
        memcpy(layer + targets[copy] * slot_stride, layer + sources[copy] * slot_stride, bytes);
    }
}
