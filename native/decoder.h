// All layers of a decoder in one call: the same kernels in the same order as models/decoder.py, without Python between
// them. Results are bit for bit those of calling the kernels one by one.
#pragma once

#include <cstring>

#include "experts.h"
#include "kernels.h"

namespace sensorium {

constexpr int64_t kMaxHeadDim = 1024;  // of heads whose dimensions turn in pairs; kernels/cpu/decoder.py has it too

struct DecoderBuffers {
    bf16 *residual, *normed, *qkv, *attended, *gated;
    bf16* mixed;             // queries without their gates, or what a convolution gives
    float *decay, *learned;  // of a delta net's heads
    bf16* gates;             // what these are made of
};

static inline DecoderBuffers decoder_buffers(const Decoder& d, int64_t tokens) {
    const int64_t hidden = d.layers[0].qkv->k;
    int64_t qkv = 0, attended = 0, wide = 0, mixed = 0, heads = 0;
    for (int i = 0; i < d.num_layers; ++i) {
        const DecoderLayer& layer = d.layers[i];
        qkv = std::max(qkv, layer.qkv->n), attended = std::max(attended, layer.o->k);
        if (layer.gate_up) wide = std::max(wide, layer.gate_up->n);
        if (layer.gated) mixed = std::max(mixed, layer.o->k);
        if (layer.state && layer.state->gates) {
            mixed = std::max(mixed, layer.qkv->n - layer.o->k);
            heads = std::max(heads, layer.state->value_heads);
        }
    }
    const int64_t mlp_rows = std::min(tokens, kMlpRows), floats = 2 * tokens * heads;
    const int64_t sizes[] = {tokens * hidden, tokens * hidden, tokens * qkv, tokens * attended, mlp_rows * wide / 2,
                             tokens * mixed,  floats,          floats,       2 * tokens * heads};
    constexpr int kParts = sizeof(sizes) / sizeof(*sizes);
    int64_t total = 0;
    for (int64_t size : sizes) total += (size + 63) & ~int64_t(63);
    bf16* at = static_cast<bf16*>(Scratch<Buffer::kDecoderStates>::get(size_t(total) * sizeof(bf16)));
    bf16* parts[kParts];
    for (int i = 0; i < kParts; ++i) {
        parts[i] = at;
        at += (sizes[i] + 63) & ~int64_t(63);
    }
    return {parts[0],
            parts[1],
            parts[2],
            parts[3],
            parts[4],
            parts[5],
            reinterpret_cast<float*>(parts[6]),
            reinterpret_cast<float*>(parts[7]),
            parts[8]};
}

// body(runtime, token) for each token, on one thread each.
template <class Body>
static inline void by_token(const Runtime& r, int64_t tokens, int64_t bytes, const Body& body) {
    parallel_rows(r, tokens, bytes, [&](int64_t token) { body(Runtime{1, nullptr, r.kernels, nullptr}, token); });
}

// Norms of queries and keys; the queries, where gates stand between them, to a place without these.
static inline void decoder_norms(const Runtime& r, const Decoder& d, const DecoderLayer& layer, int64_t tokens,
                                 const bf16* from, bf16* q, int64_t q_stride, bf16* k, int64_t stride) {
    const Kernels& kernels = *r.kernels;
    const int64_t dim = d.head_dim, step = layer.gated ? 2 * dim : dim;
    if (layer.q_norm && d.norms_whole_qk) {
        const int64_t q_size = d.heads * dim, k_size = d.kv_heads * dim;
        kernels.rms_norm(r, q, stride, layer.q_norm, q, stride, tokens, q_size, d.eps, d.norm_offset);
        kernels.rms_norm(r, k, stride, layer.k_norm, k, stride, tokens, k_size, d.eps, d.norm_offset);
    } else if (layer.q_norm) {
        by_token(r, tokens, stride * 4, [&](const Runtime& alone, int64_t token) {
            bf16* k_row = k + token * stride;
            kernels.rms_norm(alone, from + token * stride, step, layer.q_norm, q + token * q_stride, dim, d.heads, dim,
                             d.eps, d.norm_offset);
            kernels.rms_norm(alone, k_row, dim, layer.k_norm, k_row, dim, d.kv_heads, dim, d.eps, d.norm_offset);
        });
    } else if (layer.gated) {
        for (int64_t token = 0; token < tokens; ++token)
            for (int64_t head = 0; head < d.heads; ++head)
                std::memcpy(q + token * q_stride + head * dim, from + token * stride + head * step,
                            size_t(dim) * sizeof(bf16));
    }
}

// [token][head][dim] -> the same in place, with the first of each pair of rotated dimensions before all second ones.
static inline void decoder_part(const Runtime& r, bf16* x, int64_t stride, int64_t tokens, int64_t heads, int64_t dim,
                                int64_t rotary) {
    const int64_t half = rotary / 2;
    by_token(r, tokens, heads * rotary * 4, [&](const Runtime&, int64_t token) {
        bf16 seconds[kMaxHeadDim / 2];
        for (int64_t head = 0; head < heads; ++head) {
            bf16* row = x + token * stride + head * dim;
            for (int64_t i = 0; i < half; ++i) seconds[i] = row[2 * i + 1];
            for (int64_t i = 1; i < half; ++i) row[i] = row[2 * i];
            std::memcpy(row + half, seconds, size_t(half) * sizeof(bf16));
        }
    });
}

static inline void decoder_attention(const Runtime& r, const Decoder& d, const DecoderStep& step, int layer_index,
                                     const DecoderBuffers& b) {
    const Kernels& kernels = *r.kernels;
    const DecoderLayer& layer = d.layers[layer_index];
    const StepTable& table = step.tables[layer.table];
    const int64_t dim = d.head_dim, stride = layer.qkv->n, size = d.heads * dim;
    bf16 *q = layer.gated ? b.mixed : b.qkv, *k = b.qkv + (layer.gated ? 2 * size : size), *v = k + d.kv_heads * dim;
    const int64_t q_stride = layer.gated ? size : stride;
    void *k_cache = step.caches[2 * layer_index], *v_cache = step.caches[2 * layer_index + 1];
    const int64_t row = d.int8_cache ? dim + kScaleBytes : dim;
    decoder_norms(r, d, layer, step.tokens, b.qkv, q, q_stride, k, stride);
    if (layer.paired) {
        decoder_part(r, q, q_stride, step.tokens, d.heads, dim, d.rotary);
        decoder_part(r, k, stride, step.tokens, d.kv_heads, dim, d.rotary);
    }
    const float *cos = step.rotations[2 * layer.rotation], *sin = step.rotations[2 * layer.rotation + 1];
    kernels.rope(r, q, q_stride, q, q_stride, cos, sin, step.tokens, d.heads, dim, d.rotary);
    kernels.rope(r, k, stride, k, stride, cos, sin, step.tokens, d.kv_heads, dim, d.rotary);
    kernels.write_kv(r, k, stride, v, stride, k_cache, v_cache, table.slots, step.tokens, d.kv_heads, dim, d.block_size,
                     d.int8_cache);
    Attention a{};
    a.q = q, a.out = b.attended, a.k = k_cache, a.v = v_cache;
    a.q_stride = q_stride, a.out_stride = size;
    a.k_row_stride = a.v_row_stride = row;
    a.k_head_stride = a.v_head_stride = d.block_size * row;
    a.k_block_stride = a.v_block_stride = d.kv_heads * d.block_size * row;
    a.block_tables = table.block_tables, a.query_start = step.query_start, a.seq_lens = step.seq_lens;
    a.visible = layer.both_ways ? step.visible : nullptr, a.sinks = layer.sinks;
    a.max_blocks = table.max_blocks, a.sequences = int32_t(step.sequences);
    a.heads = d.heads, a.kv_heads = d.kv_heads, a.head_dim = d.head_dim, a.block_size = d.block_size;
    a.causal = 1, a.window = int32_t(layer.window), a.int8 = d.int8_cache, a.scale = d.scale;
    kernels.attention(r, a);
    if (layer.gated)
        by_token(r, step.tokens, size * 8, [&](const Runtime& alone, int64_t token) {
            kernels.multiply(alone, b.attended + token * size, dim, b.qkv + token * stride + dim, 2 * dim, d.heads, dim,
                             1);
        });
}

static inline void decoder_conv(const Runtime& r, const DecoderLayer& layer, const DecoderStep& step, bf16* rows,
                                const DecoderBuffers& b) {
    const StateMixer& own = *layer.state;
    const int64_t stride = layer.qkv->n, size = layer.o->k;
    bf16 *before = b.qkv, *after = before + size, *inner = after + size;
    r.kernels->multiply(r, before, stride, inner, stride, step.tokens, size, 0);
    r.kernels->causal_conv(r, {before, own.taps, own.bias, b.attended, rows, stride, size, own.num_taps, 0, step.runs});
    r.kernels->multiply(r, b.attended, size, after, stride, step.tokens, size, 0);
}

static inline void decoder_delta_net(const Runtime& r, const DecoderLayer& layer, const DecoderStep& step, bf16* rows,
                                     float* memory, const DecoderBuffers& b) {
    const Kernels& kernels = *r.kernels;
    const StateMixer& own = *layer.state;
    const int64_t stride = layer.qkv->n, keys = own.key_heads * own.key_dim, channels = stride - layer.o->k;
    kernels.linear(r, *own.gates, b.normed, own.gates->k, step.tokens, b.gates, 0);
    kernels.delta_gates(r, b.gates, own.rate, own.rate_bias, step.tokens, own.value_heads, b.decay, b.learned);
    kernels.causal_conv(r, {b.qkv, own.taps, own.bias, b.mixed, rows, stride, channels, own.num_taps, 1, step.runs});
    kernels.delta_rule(
        r, {b.mixed, b.mixed + keys, b.mixed + 2 * keys, b.attended, b.decay, b.learned, memory, channels, channels,
            channels, own.key_heads, own.value_heads, own.key_dim, own.value_dim, step.runs, own.takes_turns});
    kernels.norm_gated(r, b.attended, b.qkv + channels, stride, own.norm, b.attended, step.tokens, own.value_heads,
                       own.value_dim, own.eps);
}

// What layer `i` makes of b.qkv -> b.attended
static inline void mix_tokens(const Runtime& r, const Decoder& d, const DecoderStep& step, int i,
                              const DecoderBuffers& b) {
    const DecoderLayer& layer = d.layers[i];
    bf16* rows = static_cast<bf16*>(step.caches[2 * i]);
    if (!layer.state)
        decoder_attention(r, d, step, i, b);
    else if (layer.state->gates)
        decoder_delta_net(r, layer, step, rows, static_cast<float*>(step.caches[2 * i + 1]), b);
    else
        decoder_conv(r, layer, step, rows, b);
}

// Rows to the front, or from there back to their places; ascending rows never overtake one another.
static inline void gather_rows(bf16* x, int64_t size, const int64_t* rows, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (rows[i] != i) std::memcpy(x + i * size, x + rows[i] * size, size_t(size) * sizeof(bf16));
}
static inline void scatter_rows(bf16* x, int64_t size, const int64_t* rows, int64_t count) {
    for (int64_t i = count - 1; i >= 0; --i)
        if (rows[i] != i) std::memcpy(x + rows[i] * size, x + i * size, size_t(size) * sizeof(bf16));
}

static inline void run_layers(const Runtime& r, const Decoder& d, const DecoderStep& step) {
    const Kernels& kernels = *r.kernels;
    const int64_t hidden = d.layers[0].qkv->k;
    int64_t tokens = step.tokens;
    const auto norm = [&](const bf16* in, const bf16* weight, bf16* out) {
        kernels.rms_norm(r, in, hidden, weight, out, hidden, tokens, hidden, d.eps, d.norm_offset);
    };
    const auto add_norm = [&](const bf16* in, bf16* residual, const bf16* weight, bf16* out) {
        kernels.add_rms_norm(r, in, residual, weight, out, residual, tokens, hidden, d.eps, d.norm_offset);
    };
    const DecoderBuffers b = decoder_buffers(d, tokens);
    std::memcpy(b.residual, step.hidden, size_t(tokens * hidden) * sizeof(bf16));
    bf16* x = step.out;  // what the last product gave and is not in `residual` yet
    for (int i = 0; i < d.num_layers; ++i) {
        const DecoderLayer& layer = d.layers[i];
        if (i == 0)
            norm(b.residual, layer.input_norm, b.normed);
        else
            add_norm(x, b.residual, layer.input_norm, b.normed);
        kernels.linear(r, *layer.qkv, b.normed, hidden, tokens, b.qkv, 0);
        mix_tokens(r, d, step, i, b);
        if (step.rows && i + 1 == d.num_layers) {
            tokens = step.num_rows;
            gather_rows(b.attended, layer.o->k, step.rows, tokens);
            gather_rows(b.residual, hidden, step.rows, tokens);
        }
        kernels.linear(r, *layer.o, b.attended, layer.o->k, tokens, x, 0);
        if (layer.attended_norm) norm(x, layer.attended_norm, x);  // in place: rows are read before they are written
        add_norm(x, b.residual, layer.mlp_norm, b.normed);
        if (layer.routed)
            run_routed(r, *layer.routed, b.normed, tokens, x);
        else
            run_mlp(r, *layer.gate_up, *layer.down, d.activation, b.normed, tokens, b.gated, x);
        if (layer.after_norm) norm(x, layer.after_norm, x);
    }
    add_norm(x, b.residual, d.final_norm, x);
    if (step.rows) scatter_rows(x, hidden, step.rows, tokens);
}

static inline void run_decoder(const Runtime& r, const Decoder& d, const DecoderStep& step) {
    const Linear &qkv = *d.layers[0].qkv, &o = *d.layers[0].o;
    const int64_t weights = qkv.n * qkv.k + 4 * o.n * o.k;  // of a layer, about
    with_team(r, std::max<int64_t>(step.tokens, 4) * weights > 1 << 20,
              [&](const Runtime& team) { run_layers(team, d, step); });
}

}  // namespace sensorium
