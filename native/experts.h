// The experts of a routed layer in one call. Only those that have tokens are read, each for all of its tokens at once;
// what a token gets depends neither on the others nor on the number of threads.
#pragma once

#include <cstring>
#include <vector>

#include "kernels.h"

namespace sensorium {

// Rows of an MLP that are computed together: its wide activations should stay in the caches.
constexpr int64_t kMlpRows = 480;
// Experts with few rows are computed together, so many rows of all: a decode would wait for its threads at every one.
constexpr int64_t kFewRows = 12, kTogether = 96;

// down(gated(gate_up(x))) [rows, hidden], with room for kMlpRows rows between the two.
static inline void run_mlp(const Runtime& r, const Linear& gate_up, const Linear& down, int32_t activation,
                           const bf16* x, int64_t rows, bf16* between, bf16* y) {
    const int64_t blocks = (rows + kMlpRows - 1) / kMlpRows;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
        r.kernels->linear_gated(r, gate_up, x + first * gate_up.k, gate_up.k, count, between, activation);
        r.kernels->linear(r, down, between, down.k, count, y + first * down.n, 0);
    }
}

// A step's rows by expert: those of expert e from starts[e] on, its tokens in ascending order.
struct SortedRows {
    std::vector<int64_t> starts, next, tokens;
    std::vector<float> weights;

    void sort(const ExpertStep& step, int32_t experts) {
        const int64_t count = step.tokens * step.per_token;
        starts.assign(size_t(experts) + 1, 0);
        tokens.resize(size_t(count)), weights.resize(size_t(count));
        for (int64_t i = 0; i < count; ++i) ++starts[size_t(step.chosen[i]) + 1];
        for (int32_t e = 0; e < experts; ++e) starts[size_t(e) + 1] += starts[size_t(e)];
        next.assign(starts.begin(), starts.end() - 1);
        for (int64_t i = 0; i < count; ++i) {
            const size_t place = size_t(next[size_t(step.chosen[i])]++);
            tokens[place] = i / step.per_token, weights[place] = step.weights[i];
        }
    }
};

// Of some rows what experts make of them, in one piece of memory.
struct ExpertBuffers {
    bf16 *rows, *both, *gated;
    float* out;

    ExpertBuffers(const Experts& experts, int64_t count) {
        const Linear &gate_up = *experts.gate_up[0], &down = *experts.down[0];
        const int64_t sizes[] = {count * gate_up.k * 2, count * gate_up.n * 2, count * down.k * 2, count * down.n * 4};
        size_t total = 0, at[4];
        for (int i = 0; i < 4; ++i) at[i] = total, total += (size_t(sizes[i]) + 63) & ~size_t(63);
        char* memory = static_cast<char*>(Scratch<Buffer::kExpertStates>::get(total));
        rows = reinterpret_cast<bf16*>(memory + at[0]), both = reinterpret_cast<bf16*>(memory + at[1]);
        gated = reinterpret_cast<bf16*>(memory + at[2]), out = reinterpret_cast<float*>(memory + at[3]);
    }
    void gather(const bf16* x, int64_t size, const int64_t* tokens, int64_t count) const {
        for (int64_t i = 0; i < count; ++i)
            std::memcpy(rows + i * size, x + tokens[i] * size, size_t(size) * sizeof(bf16));
    }
};

// One expert, a block of its rows at a time.
static inline void run_expert(const Runtime& r, const Experts& experts, const ExpertStep& step,
                              const SortedRows& sorted, int expert, float* sums) {
    const Kernels& kernels = *r.kernels;
    const Linear &gate_up = *experts.gate_up[expert], &down = *experts.down[expert];
    const int64_t first = sorted.starts[size_t(expert)], count = sorted.starts[size_t(expert) + 1] - first;
    const int64_t blocks = (count + kMlpRows - 1) / kMlpRows;
    const ExpertBuffers b(experts, std::min(count, kMlpRows));
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = count * block / blocks, size = count * (block + 1) / blocks - start;
        const int64_t* tokens = sorted.tokens.data() + first + start;
        b.gather(step.x, gate_up.k, tokens, size);
        kernels.linear_gated(r, gate_up, b.rows, gate_up.k, size, b.gated, experts.activation);
        kernels.linear(r, down, b.gated, down.k, size, b.out, 1);
        kernels.add_experts(r, b.out, tokens, sorted.weights.data() + first + start, size, down.n, sums);
    }
}

// Experts [from, to), of which each has few rows.
static inline void run_few(const Runtime& r, const Experts& experts, const ExpertStep& step, const SortedRows& sorted,
                           int from, int to, float* sums) {
    const Kernels& kernels = *r.kernels;
    const int64_t first = sorted.starts[size_t(from)], rows = sorted.starts[size_t(to)] - first;
    const int64_t hidden = experts.gate_up[0]->k, wide = experts.gate_up[0]->n, inner = experts.down[0]->k;
    const ExpertBuffers b(experts, rows);
    b.gather(step.x, hidden, sorted.tokens.data() + first, rows);
    Product gate_up[kTogether], down[kTogether];
    int64_t count = 0;
    for (int e = from; e < to; ++e) {
        const int64_t at = sorted.starts[size_t(e)] - first, own = sorted.starts[size_t(e) + 1] - first - at;
        if (!own) continue;
        gate_up[count] = {experts.gate_up[e], b.rows + at * hidden, hidden, own, b.both + at * wide, 0};
        down[count++] = {experts.down[e], b.gated + at * inner, inner, own, b.out + at * experts.down[e]->n, 1};
    }
    kernels.linear_many(r, gate_up, count);
    kernels.gated(r, b.both, b.gated, rows, inner, experts.activation);
    kernels.linear_many(r, down, count);
    kernels.add_experts(r, b.out, sorted.tokens.data() + first, sorted.weights.data() + first, rows, experts.down[0]->n,
                        sums);
}

// The sums [tokens, n of down] of all experts, in float, in memory that the next call takes again.
static inline const float* expert_sums(const Runtime& r, const Experts& experts, const ExpertStep& step) {
    static thread_local SortedRows sorted;
    sorted.sort(step, experts.count);
    const int64_t* starts = sorted.starts.data();
    const size_t bytes = size_t(step.tokens * experts.down[0]->n) * sizeof(float);
    float* sums = static_cast<float*>(Scratch<Buffer::kExpertSums>::get(bytes));
    std::memset(sums, 0, bytes);
    for (int e = 0; e < experts.count;) {
        int end = e;
        while (end < experts.count && starts[end + 1] - starts[end] <= kFewRows &&
               starts[end + 1] - starts[e] <= kTogether)
            ++end;
        if (end == e)
            run_expert(r, experts, step, sorted, e++, sums);
        else if (starts[end] > starts[e])
            run_few(r, experts, step, sorted, e, end, sums);
        e = std::max(e, end);
    }
    return sums;
}

static inline void run_experts(const Runtime& r, const Experts& experts, const ExpertStep& step) {
    const Linear& down = *experts.down[0];
    with_team(r, std::max<int64_t>(step.tokens * step.per_token, 4) * down.n * down.k > 1 << 20,
              [&](const Runtime& team) {
                  const float* sums = expert_sums(team, experts, step);
                  r.kernels->finish_experts(team, sums, nullptr, nullptr, step.tokens, down.n, step.y);
              });
}

// A routed layer's MLP, router included: x [tokens, hidden] -> y, which may not be x.
static inline void run_routed(const Runtime& r, const RoutedMlp& mlp, const bf16* x, int64_t tokens, bf16* y) {
    const Kernels& kernels = *r.kernels;
    const Routing& rules = mlp.routing;
    const int64_t hidden = mlp.router->k, chosen_count = tokens * rules.per_token;
    const size_t logit_bytes = (size_t(tokens * rules.experts) * sizeof(bf16) + 63) & ~size_t(63);
    char* memory = static_cast<char*>(
        Scratch<Buffer::kRouting>::get(logit_bytes + size_t(chosen_count) * (sizeof(int64_t) + sizeof(float))));
    bf16* logits = reinterpret_cast<bf16*>(memory);
    int64_t* chosen = reinterpret_cast<int64_t*>(memory + logit_bytes);
    float* weights = reinterpret_cast<float*>(chosen + chosen_count);
    kernels.linear(r, *mlp.router, x, hidden, tokens, logits, 0);
    kernels.choose(r, rules, logits, tokens, chosen, weights);
    bf16 *shared = nullptr, *gates = nullptr;
    const float* sums = expert_sums(r, *mlp.experts, {x, y, chosen, weights, tokens, rules.per_token});
    if (mlp.shared_gate_up) {
        const int64_t inner = std::min(tokens, kMlpRows) * mlp.shared_down->k;
        shared =
            static_cast<bf16*>(Scratch<Buffer::kShared>::get(size_t(tokens * (hidden + 1) + inner) * sizeof(bf16)));
        if (mlp.shared_gate) gates = shared + tokens * hidden + inner;
        run_mlp(r, *mlp.shared_gate_up, *mlp.shared_down, mlp.activation, x, tokens, shared + tokens * hidden, shared);
        if (gates) kernels.linear(r, *mlp.shared_gate, x, hidden, tokens, gates, 0);
    }
    kernels.finish_experts(r, sums, shared, gates, tokens, hidden, y);
}

}  // namespace sensorium
