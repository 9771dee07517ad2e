// Layers that keep a state of fixed size: the causal convolution over a sequence's last tokens, and the gated delta
// rule. A run's tokens are computed one after the other, so that it does not matter how a prompt was cut.
#pragma once

#include <cmath>

#include "kernels.h"
#include "ops.h"
#include "panels.h"

namespace sensorium::SENSORIUM_ISA {

static inline int64_t run_tokens(const StateRuns& runs) {
    int64_t tokens = 0;
    for (int64_t i = 0; i < runs.count; ++i) tokens += runs.lengths[i];
    return tokens;
}

// Channels [first, first + count) of one run, whose first row is `token`; `taps` [taps][count] in float.
static inline void convolve_run(const CausalConv& a, const float* taps, int64_t run, int64_t token, int64_t first,
                                int64_t count) {
    const int64_t before = a.taps - 1, size = before * a.channels;
    const bf16* const from = a.states + a.runs.sources[run] * size + first;
    bf16* const to = a.states + a.runs.targets[run] * size + first;
    const auto row = [&](int64_t i) {  // of the run, its state's rows before 0
        return i < 0 ? from + (before + i) * a.channels : a.x + (token + i) * a.stride + first;
    };
    for (int64_t i = 0; i < a.runs.lengths[run]; ++i)
        over_lanes(count, [&](int64_t c, int lanes) {
            vf sum = vzero();
            for (int64_t j = 0; j < a.taps; ++j)
                sum = fma(load_lanes(row(i + j - before) + c, lanes), vload_n(taps + j * count + c, lanes), sum);
            if (a.bias) sum = sum + load_lanes(a.bias + first + c, lanes);
            store_lanes(a.y + (token + i) * a.channels + first + c, a.silu ? sum * sigmoid(sum) : sum, lanes);
        });
    for (int64_t i = 0; i < before; ++i)  // ascending: also where a state takes its own place
        std::memmove(to + i * a.channels, row(a.runs.lengths[run] + i - before), size_t(count) * sizeof(bf16));
}

static void causal_conv(const Runtime& runtime, const CausalConv& a) {
    constexpr int64_t kChannels = 256;
    const int64_t tokens = run_tokens(a.runs);
    parallel_rows(runtime, ceil_div(a.channels, kChannels), tokens * kChannels * 8, [&](int64_t chunk) {
        const int64_t first = chunk * kChannels, count = std::min(kChannels, a.channels - first);
        float* taps =
            static_cast<float*>(Scratch<Buffer::kStateRows>::get(size_t(a.taps * kChannels + kLanes) * sizeof(float)));
        for (int64_t c = 0; c < count; ++c)
            for (int64_t j = 0; j < a.taps; ++j)
                taps[j * count + c] = bf16_to_float(a.weight[(first + c) * a.taps + j]);
        int64_t token = 0;
        for (int64_t run = 0; run < a.runs.count; token += a.runs.lengths[run++])
            convolve_run(a, taps, run, token, first, count);
    });
}

// The gated delta rule

// Of a token's row of `gates`, what each head learns with and then what it keeps -> see `Backend.delta_gates`.
static void delta_gates(const Runtime& runtime, const bf16* gates, const float* rate, const float* bias, int64_t tokens,
                        int64_t heads, float* decay, float* learned) {
    parallel_rows(runtime, tokens, heads * 64, [&](int64_t token) {
        const bf16* own = gates + token * 2 * heads;
        over_lanes(heads, [&](int64_t i, int lanes) {
            vstore_n(learned + token * heads + i, sigmoid(load_lanes(own + i, lanes)), lanes);
        });
        for (int64_t head = 0; head < heads; ++head) {
            const float x = bf16_to_float(own[heads + head]) + bias[head];
            const float soft = x > 20 ? x : std::log1p(std::exp(x));
            decay[token * heads + head] = -std::exp(rate[head]) * soft;
        }
    });
}

// y = silu(z) * the norm of x, which is rounded before, of each head's n numbers.
static void norm_gated(const Runtime& runtime, const bf16* x, const bf16* z, int64_t z_stride, const bf16* weight,
                       bf16* y, int64_t tokens, int64_t heads, int64_t n, float eps) {
    parallel_rows(runtime, tokens, heads * n * 8, [&](int64_t token) {
        for (int64_t head = 0; head < heads; ++head) {
            const bf16 *in = x + (token * heads + head) * n, *gate = z + token * z_stride + head * n;
            bf16* out = y + (token * heads + head) * n;
            vf sum = vzero();
            over_lanes(n, [&](int64_t i, int lanes) {
                const vf v = load_lanes(in + i, lanes);
                sum = fma(v, v, sum);
            });
            const vf factor = vset(1.0f / std::sqrt(vsum(sum) / float(n) + eps));
            over_lanes(n, [&](int64_t i, int lanes) {
                const vf g = load_lanes(gate + i, lanes);
                const vf normed = rounded(load_lanes(in + i, lanes) * factor * load_lanes(weight + i, lanes));
                store_lanes(out + i, g * sigmoid(g) * normed, lanes);
            });
        }
    });
}

constexpr int kStateVectors = 4;  // 64 columns of a head's memory, 32 KB of it with keys of 128, are computed at a time
constexpr int64_t kStateTokens = 32;  // whose queries and keys are made unit vectors at a time

// A row of q or k as float, of length one unless it is near zero, times `factor`.
static inline void unit_row(const bf16* x, int64_t n, float factor, float* out) {
    vf sum = vzero();
    over_lanes(n, [&](int64_t i, int lanes) {
        const vf v = load_lanes(x + i, lanes);
        sum = fma(v, v, sum);
    });
    const vf scale = vset(factor / std::sqrt(vsum(sum) + 1e-6f));
    over_lanes(n, [&](int64_t i, int lanes) { vstore_n(out + i, load_lanes(x + i, lanes) * scale, lanes); });
}

// One token and NV vectors of columns: `from` and `to` [n][stride] may be the same. What it reads of the new memory is
// made of what it would read of the old one, so that this is read twice and written once.
template <int NV>
static inline void learn_token(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t n,
                               const float* q, const float* k, const float* v, float keep, float learned, float* out) {
    vf known[NV], read[NV];
    float along = 0;  // <k, q>
    for (int j = 0; j < NV; ++j) known[j] = read[j] = vzero();
    for (int64_t i = 0; i < n; ++i) {
        const vf key = vset(k[i]), query = vset(q[i]);
        along += k[i] * q[i];
        for (int j = 0; j < NV; ++j) {
            const vf m = vload(from + i * from_stride + j * kLanes);
            known[j] = fma(m, key, known[j]), read[j] = fma(m, query, read[j]);
        }
    }
    const vf kept = vset(keep);
    vf news[NV];
    for (int j = 0; j < NV; ++j) {
        news[j] = (vload(v + j * kLanes) - known[j] * kept) * vset(learned);
        vstore(out + j * kLanes, fma(news[j], vset(along), read[j] * kept));
    }
    for (int64_t i = 0; i < n; ++i)
        for (int j = 0; j < NV; ++j)
            vstore(to + i * to_stride + j * kLanes,
                   fma(vload(from + i * from_stride + j * kLanes), kept, vset(k[i]) * news[j]));
}

using LearnToken = void (*)(const float*, int64_t, float*, int64_t, int64_t, const float*, const float*, const float*,
                            float, float, float*);

static inline LearnToken learn_token_for(int64_t columns) {
    static constexpr LearnToken table[] = {learn_token<1>, learn_token<2>, learn_token<3>, learn_token<4>};
    return table[ceil_div(columns, kLanes) - 1];
}

// Some tokens of a run as one value head sees them.
struct HeadRun {
    const float *q, *k;           // unit vectors [tokens][key_dim]
    int64_t head, token, tokens;  // the head's place in v, out and the gates
    const float* from;            // [key_dim][value_dim]
    float* to;
};

// Columns [first, first + count) of its memory. Those of several tokens lie side by side meanwhile: in their places
// they would drive one another out of L1.
static inline void learn_columns(const DeltaRule& a, const HeadRun& run, int64_t first, int64_t count) {
    constexpr int64_t kWidth = kStateVectors * kLanes;
    const bool stays = run.tokens == 1 && count % kLanes == 0;
    const LearnToken learn = learn_token_for(count);
    float* own = static_cast<float*>(Scratch<Buffer::kStateColumns>::get(size_t(a.key_dim * kWidth) * sizeof(float)));
    if (!stays)
        for (int64_t i = 0; i < a.key_dim; ++i)
            over_lanes(count, [&](int64_t c, int lanes) {
                vstore(own + i * kWidth + c, vload_n(run.from + i * a.value_dim + first + c, lanes));
            });
    const float* from = stays ? run.from + first : own;
    float* to = stays ? run.to + first : own;
    const int64_t stride = stays ? a.value_dim : kWidth;
    for (int64_t t = 0; t < run.tokens; ++t) {
        const int64_t token = run.token + t, gate = token * a.value_heads + run.head;
        float v[kWidth], out[kWidth], keep[kLanes];
        const bf16* values = a.v + token * a.v_stride + run.head * a.value_dim + first;
        over_lanes(count, [&](int64_t c, int lanes) { vstore(v + c, load_lanes(values + c, lanes)); });
        vstore(keep, exp(vset(a.decay[gate])));
        learn(from, stride, to, stride, a.key_dim, run.q + t * a.key_dim, run.k + t * a.key_dim, v, keep[0],
              a.learned[gate], out);
        bf16* y = a.out + gate * a.value_dim + first;
        over_lanes(count, [&](int64_t c, int lanes) { store_lanes(y + c, vload(out + c), lanes); });
    }
    if (!stays)
        for (int64_t i = 0; i < a.key_dim; ++i)
            over_lanes(count, [&](int64_t c, int lanes) {
                vstore_n(run.to + i * a.value_dim + first + c, vload(own + i * kWidth + c), lanes);
            });
}

// All value heads of one key head, over one run.
static inline void learn_run(const DeltaRule& a, int64_t run, int64_t token, int64_t key_head) {
    const int64_t group = a.value_heads / a.key_heads, memory = a.key_dim * a.value_dim;
    const int64_t tokens = a.runs.lengths[run], at = key_head * a.key_dim;
    const float scale = 1.0f / std::sqrt(float(a.key_dim));
    float* q = static_cast<float*>(
        Scratch<Buffer::kStateRows>::get(size_t(2 * kStateTokens * a.key_dim + kLanes) * sizeof(float)));
    float* k = q + kStateTokens * a.key_dim;
    for (int64_t first = 0; first < tokens; first += kStateTokens) {
        const int64_t count = std::min(kStateTokens, tokens - first);
        for (int64_t t = 0; t < count; ++t) {
            const int64_t row = token + first + t;
            unit_row(a.q + row * a.q_stride + at, a.key_dim, scale, q + t * a.key_dim);
            unit_row(a.k + row * a.k_stride + at, a.key_dim, 1, k + t * a.key_dim);
        }
        for (int64_t i = 0; i < group; ++i) {
            const int64_t head = key_head * group + i, place = a.takes_turns ? i * a.key_heads + key_head : head;
            float* to = a.states + (a.runs.targets[run] * a.value_heads + head) * memory;
            const float* from = a.states + (a.runs.sources[run] * a.value_heads + head) * memory;
            const HeadRun some{q, k, place, token + first, count, first ? to : from, to};
            for (int64_t c = 0; c < a.value_dim; c += kStateVectors * kLanes)
                learn_columns(a, some, c, std::min<int64_t>(kStateVectors * kLanes, a.value_dim - c));
        }
    }
}

static void delta_rule(const Runtime& runtime, const DeltaRule& a) {
    const int64_t work = run_tokens(a.runs) * a.value_heads * a.key_dim * a.value_dim;
    with_team(runtime, work > 1 << 16, [&](const Runtime& team) {
        parallel_for(team, a.runs.singles * a.key_heads,
                     [&](int64_t i) { learn_run(a, i / a.key_heads, i / a.key_heads, i % a.key_heads); });
        int64_t token = a.runs.singles;  // a later run may go on from an earlier one's state
        for (int64_t run = a.runs.singles; run < a.runs.count; token += a.runs.lengths[run++])
            parallel_for(team, a.key_heads, [&](int64_t head) { learn_run(a, run, token, head); });
    });
}

}  // namespace sensorium::SENSORIUM_ISA
