// Drawing tokens by inverting the cumulative distribution: the reference is kernels/reference/drawing.py.
#pragma once

#include <algorithm>
#include <chrono>
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

// A row's weights and the sums up to each chunk's end, which the thread keeps until it weighs the next.
struct Weighed {
    float* weights;
    double* sums;
    int64_t chunks;
};

static inline Weighed weigh(const float* row, const uint32_t* bits, int64_t n, float highest, float temperature) {
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
    return {weights, sums, chunks};
}

static inline int64_t token_at(const Weighed& row, double uniform) {
    const double target = uniform * row.sums[row.chunks - 1];
    const int64_t chosen =
        std::min<int64_t>(std::upper_bound(row.sums, row.sums + row.chunks, target) - row.sums, row.chunks - 1);
    const double before = chosen ? row.sums[chosen - 1] : 0.0;
    return chosen * kDrawChunk + place_in_chunk(row.weights + chosen * kDrawChunk, target - before);
}

static void draw(const Runtime& runtime, const Draws& draws) {
    parallel_rows(runtime, draws.count, draws.vocab * int64_t(sizeof(float)), [&](int64_t i) {
        const float* row = draws.logits + draws.rows[i] * draws.stride;
        const uint32_t* bits = draws.masks ? draws.masks + i * draws.words : nullptr;
        const float highest = draws.highest[i] = highest_logit(row, bits, draws.vocab);
        draws.tokens[i] =
            !std::isfinite(highest) ? 0
            : draws.temperatures[i] > 0
                ? token_at(weigh(row, bits, draws.vocab, highest, draws.temperatures[i]), draws.uniforms[i])
                : first_of(row, bits, draws.vocab, highest);
    });
}

// Drawing what grammars allow: see engine/choosing.py.

constexpr int kTries = 3;               // draws among all tokens, before one among those that are allowed
constexpr int64_t kQuickMaskNs = 4000;  // what as many questions take

static inline uint64_t mixed(uint64_t state) {  // the finaliser of splitmix64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
    return state ^ (state >> 31);
}

// The number in [0, 1) of a row's stream `stream` for its next token.
static inline double uniform_of(const HeldRow& row, int stream) {
    constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u, kStream = 0xA0761D6478BD642Fu;
    const uint64_t state = mixed((row.seed ^ (uint64_t(stream) * kStream)) + kGolden);
    return double(mixed(state + row.index * kGolden) >> 32) / 4294967296.0;
}

static inline bool has_bit(const uint32_t* bits, int64_t token) { return bits[token / 32] >> (token % 32) & 1; }

// The tokens that a row's grammar allows, less those that are late; null where the grammar fails.
static inline const uint32_t* mask_of(const HeldDraws& draws, const HeldRow& row) {
    const size_t bytes = size_t(draws.vocab + 31) / 32 * sizeof(uint32_t);
    uint32_t* bits = static_cast<uint32_t*>(Scratch<Buffer::kGrammarMask>::get(bytes));
    const auto started = std::chrono::steady_clock::now();
    if (draws.grammars->compute_mask(row.matcher, bits, bytes)) return nullptr;
    if (row.on_time)
        for (size_t i = 0; i < bytes / sizeof(uint32_t); ++i) bits[i] &= row.on_time[i];
    const auto passed = std::chrono::steady_clock::now() - started;
    draws.costs[row.slot] = std::chrono::duration_cast<std::chrono::nanoseconds>(passed).count() + 1;
    return bits;
}

static inline bool may_come(const HeldDraws& draws, const HeldRow& row, int64_t token) {
    const uint32_t id = uint32_t(token);
    return (!row.on_time || has_bit(row.on_time, token)) && draws.grammars->validate(row.matcher, &id, 1) == 1;
}

static inline void draw_held_row(const HeldDraws& draws, int64_t i) {
    const HeldRow& held = draws.rows[i];
    const float* row = draws.logits + held.row * draws.stride;
    const float temperature = draws.temperatures[i];
    int64_t& token = draws.tokens[i] = 0;
    float& highest = draws.highest[i] = highest_logit(row, nullptr, draws.vocab);
    if (!std::isfinite(highest)) return;
    const int64_t cost = draws.costs[held.slot];
    const uint32_t* mask = cost && cost < kQuickMaskNs ? mask_of(draws, held) : nullptr;
    const bool is_random = temperature > 0;
    Weighed weighed{};
    if (is_random) weighed = weigh(row, nullptr, draws.vocab, highest, temperature);
    for (int attempt = 0; attempt < (is_random ? kTries : 1); ++attempt) {
        token = is_random ? token_at(weighed, uniform_of(held, attempt)) : first_of(row, nullptr, draws.vocab, highest);
        if (mask ? has_bit(mask, token) : may_come(draws, held, token)) {
            draws.costs[held.slot] = 0;
            return;
        }
    }
    if (!mask) mask = mask_of(draws, held);
    if (!mask) return;  // the grammar takes no token any more, this one neither
    highest = highest_logit(row, mask, draws.vocab);
    if (!std::isfinite(highest)) return;
    token = is_random ? token_at(weigh(row, mask, draws.vocab, highest, temperature), uniform_of(held, kTries))
                      : first_of(row, mask, draws.vocab, highest);
}

static void draw_held(const Runtime& runtime, const HeldDraws& draws) {
    parallel_rows(runtime, draws.count, draws.vocab * int64_t(sizeof(float)),
                  [&](int64_t i) { draw_held_row(draws, i); });
}

}  // namespace sensorium::SENSORIUM_ISA
