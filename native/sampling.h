// Drawing tokens by inverting the cumulative distribution: the reference is kernels/reference/drawing.py.
#pragma once

#include <cmath>

#include "kernels.h"
#include "ops.h"

namespace sensorium::SENSORIUM_ISA {

constexpr int64_t kDrawChunk = 128;  // logits whose weights are summed together before one of the sums is chosen
static_assert(kDrawChunk % kLanes == 0 && 32 % kLanes == 0);

// Lanes of logits from `i` on that a mask of bits leaves; without a mask all of them. Lanes beyond the row are out.
static inline vf left_logits(const float* row, const uint32_t* bits, int64_t i, int lanes) {
    uint32_t keep = lanes == kLanes ? (1u << kLanes) - 1 : (1u << lanes) - 1;
    if (bits) keep &= bits[i / 32] >> (i % 32);
    return keep_bits(lanes == kLanes ? vload(row + i) : vload_n(row + i, lanes), keep, -INFINITY);
}

static inline float highest_logit(const float* row, const uint32_t* bits, int64_t n) {
    vf highest = vset(-INFINITY);
    over_lanes(n, [&](int64_t i, int lanes) { highest = vmax(highest, left_logits(row, bits, i, lanes)); });
    return vmax_lane(highest);
}

static inline int64_t first_of(const float* row, const uint32_t* bits, int64_t n, float value) {
    for (int64_t i = 0; i < n; ++i)
        if (row[i] == value && (!bits || bits[i / 32] >> (i % 32) & 1)) return i;
    return 0;
}

// The first place whose sum passes `target`; never one that weighs nothing.
static inline int64_t place_in_chunk(const float* weights, double target) {
    double sum = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < kDrawChunk; ++i) {
        if (weights[i] > 0) last = i;
        sum += double(weights[i]);
        if (sum > target) return i;
    }
    return last;  // the chunk's sum was rounded in another order than this
}

static inline int64_t draw_weighed(const float* row, const uint32_t* bits, int64_t n, float highest, float temperature,
                                   double uniform) {
    const int64_t chunks = (n + kDrawChunk - 1) / kDrawChunk;
    float* weights =
        static_cast<float*>(Scratch<Buffer::kDrawWeights>::get(size_t(chunks * kDrawChunk) * sizeof(float)));
    double* sums = static_cast<double*>(Scratch<Buffer::kDrawSums>::get(size_t(chunks) * sizeof(double)));
    const vf top = vset(highest), factor = vset(1.0f / temperature);
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        vf sum = vzero();
        for (int64_t i = chunk * kDrawChunk; i < (chunk + 1) * kDrawChunk; i += kLanes) {
            const int lanes = int(std::min<int64_t>(kLanes, n - i));
            const vf weight = lanes > 0 ? exp((left_logits(row, bits, i, lanes) - top) * factor) : vzero();
            vstore(weights + i, weight);
            sum = sum + weight;
        }
        sums[chunk] = total += double(vsum(sum));
    }
    const double target = uniform * total;
    int64_t chosen = 0;
    while (chosen + 1 < chunks && !(sums[chosen] > target)) ++chosen;
    const double before = chosen ? sums[chosen - 1] : 0.0;
    return chosen * kDrawChunk + place_in_chunk(weights + chosen * kDrawChunk, target - before);
}

static void draw(const Runtime& runtime, const Draws& draws) {
    parallel_rows(runtime, draws.count, draws.vocab * int64_t(sizeof(float)), [&](int64_t i) {
        const float* row = draws.logits + draws.rows[i] * draws.stride;
        const uint32_t* bits = draws.masks ? draws.masks + i * draws.words : nullptr;
        const float highest = draws.highest[i] = highest_logit(row, bits, draws.vocab);
        draws.tokens[i] = !std::isfinite(highest) ? 0
                          : draws.temperatures[i] > 0
                              ? draw_weighed(row, bits, draws.vocab, highest, draws.temperatures[i], draws.uniforms[i])
                              : first_of(row, bits, draws.vocab, highest);
    });
}

}  // namespace sensorium::SENSORIUM_ISA
