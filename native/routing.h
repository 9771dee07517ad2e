// What stands around the experts of a routed layer: which ones a token takes, and the sum of what they give.
#pragma once

#include <cmath>

#include "kernels.h"
#include "ops.h"

namespace sensorium::SENSORIUM_ISA {

// The experts with the largest logits, largest first; of equal ones the first.
static inline void largest_logits(const bf16* logits, const Routing& rules, int64_t* chosen, float* values) {
    int32_t found = 0;
    for (int32_t expert = 0; expert < rules.experts; ++expert) {
        const float logit = bf16_to_float(logits[expert]), value = logit == logit ? logit : -INFINITY;
        if (found == rules.per_token && !(value > values[found - 1])) continue;
        int32_t place = found < rules.per_token ? found++ : found - 1;
        for (; place > 0 && value > values[place - 1]; --place)
            chosen[place] = chosen[place - 1], values[place] = values[place - 1];
        chosen[place] = expert, values[place] = value;
    }
}

// Their softmax over all logits, or over themselves, times the scale.
static void choose(const Runtime& runtime, const Routing& rules, const bf16* logits, int64_t tokens, int64_t* chosen,
                   float* weights) {
    parallel_rows(runtime, tokens, rules.experts * 8, [&](int64_t token) {
        const bf16* own = logits + token * rules.experts;
        float* values = weights + token * rules.per_token;
        largest_logits(own, rules, chosen + token * rules.per_token, values);
        const vf top = vset(values[0]);
        vf sum = vzero();
        const auto add = [&](vf v, int lanes) { sum = sum + keep_range(exp(v - top), 0, 0, lanes, 0); };
        if (rules.renormalizes)
            over_lanes(rules.per_token, [&](int64_t i, int lanes) { add(vload_n(values + i, lanes), lanes); });
        else
            over_lanes(rules.experts, [&](int64_t i, int lanes) { add(load_lanes(own + i, lanes), lanes); });
        const vf factor = vset(rules.scale / vsum(sum));
        over_lanes(rules.per_token, [&](int64_t i, int lanes) {
            vstore_n(values + i, exp(vload_n(values + i, lanes) - top) * factor, lanes);
        });
    });
}

// sums[tokens[i]] += weights[i] * rows[i], in order.
static void add_experts(const Runtime& runtime, const float* rows, const int64_t* tokens, const float* weights,
                        int64_t count, int64_t n, float* sums) {
    constexpr int64_t kColumns = 256;
    parallel_rows(runtime, (n + kColumns - 1) / kColumns, count * kColumns * 12, [&](int64_t chunk) {
        const int64_t first = chunk * kColumns, columns = std::min(kColumns, n - first);
        for (int64_t row = 0; row < count; ++row) {
            const float* from = rows + row * n + first;
            float* to = sums + tokens[row] * n + first;
            const vf weight = vset(weights[row]);
            over_lanes(columns, [&](int64_t i, int lanes) {
                vstore_n(to + i, fma(vload_n(from + i, lanes), weight, vload_n(to + i, lanes)), lanes);
            });
        }
    });
}

// y = sums, in bf16; with `shared` [tokens, n] plus that, which with `gates` [tokens] is first multiplied by their
// sigmoids. Rounds where a tensor would be stored.
static void finish_experts(const Runtime& runtime, const float* sums, const bf16* shared, const bf16* gates,
                           int64_t tokens, int64_t n, bf16* y) {
    parallel_rows(runtime, tokens, n * 8, [&](int64_t token) {
        const vf gate = gates ? rounded(sigmoid(vset(bf16_to_float(gates[token])))) : vset(1);
        over_lanes(n, [&](int64_t i, int lanes) {
            vf sum = vload_n(sums + token * n + i, lanes);
            if (shared) sum = rounded(sum) + rounded(load_lanes(shared + token * n + i, lanes) * gate);
            store_lanes(y + token * n + i, sum, lanes);
        });
    });
}

}  // namespace sensorium::SENSORIUM_ISA
