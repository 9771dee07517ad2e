// The small operations around the products: norms, gates, rotations, cache writes. fp32 inside, bf16 in and out.
#pragma once

#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace sensorium::SENSORIUM_ISA {

template <class Step>
static inline void over_lanes(int64_t n, const Step& step) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) step(i, kLanes);
    if (i < n) step(i, int(n - i));
}

static inline vf load_lanes(const bf16* p, int lanes) {
    return lanes == kLanes ? vload_bf16(p) : vload_bf16_n(p, lanes);
}
static inline void store_lanes(bf16* p, vf v, int lanes) {
    if (lanes == kLanes)
        vstore_bf16(p, v);
    else
        vstore_bf16_n(p, v, lanes);
}

static inline vf rounded(vf x) {
    bf16 lanes[kLanes];
    vstore_bf16(lanes, x);
    return vload_bf16(lanes);
}

static inline void normalize(const bf16* x, const bf16* weight, bf16* y, int64_t n, float factor, float offset) {
    const vf f = vset(factor), add = vset(offset);
    over_lanes(n, [&](int64_t i, int lanes) {
        store_lanes(y + i, load_lanes(x + i, lanes) * f * (load_lanes(weight + i, lanes) + add), lanes);
    });
}

static void rms_norm(const Runtime& runtime, const bf16* x, int64_t stride, const bf16* weight, bf16* y,
                     int64_t y_stride, int64_t rows, int64_t n, float eps, float offset) {
    parallel_rows(runtime, rows, n * 4, [&](int64_t row) {
        vf sum = vzero();
        over_lanes(n, [&](int64_t i, int lanes) {
            const vf v = load_lanes(x + row * stride + i, lanes);
            sum = fma(v, v, sum);
        });
        const float factor = 1.0f / std::sqrt(vsum(sum) / float(n) + eps);
        normalize(x + row * stride, weight, y + row * y_stride, n, factor, offset);
    });
}

static void add_rms_norm(const Runtime& runtime, const bf16* x, const bf16* residual, const bf16* weight, bf16* y,
                         bf16* total, int64_t rows, int64_t n, float eps, float offset) {
    parallel_rows(runtime, rows, n * 8, [&](int64_t row) {
        vf sum = vzero();
        over_lanes(n, [&](int64_t i, int lanes) {
            const vf v = load_lanes(x + row * n + i, lanes) + load_lanes(residual + row * n + i, lanes);
            store_lanes(total + row * n + i, v, lanes);
            const vf rounded = load_lanes(total + row * n + i, lanes);
            sum = fma(rounded, rounded, sum);
        });
        normalize(total + row * n, weight, y + row * n, n, 1.0f / std::sqrt(vsum(sum) / float(n) + eps), offset);
    });
}

static void layer_norm(const Runtime& runtime, const bf16* x, const bf16* weight, const bf16* bias, bf16* y,
                       int64_t rows, int64_t n, float eps) {
    parallel_rows(runtime, rows, n * 4, [&](int64_t row) {
        const bf16* in = x + row * n;
        vf sum = vzero(), square = vzero();
        over_lanes(n, [&](int64_t i, int lanes) { sum = sum + load_lanes(in + i, lanes); });
        const float mean = vsum(sum) / float(n);
        over_lanes(n, [&](int64_t i, int lanes) {
            vf v = load_lanes(in + i, lanes) - vset(mean);
            if (lanes < kLanes) v = keep_range(v, 0, 0, lanes, 0.0f);
            square = fma(v, v, square);
        });
        const vf factor = vset(1.0f / std::sqrt(vsum(square) / float(n) + eps));
        over_lanes(n, [&](int64_t i, int lanes) {
            vf v = (load_lanes(in + i, lanes) - vset(mean)) * factor;
            if (weight) v = v * load_lanes(weight + i, lanes);
            if (bias) v = v + load_lanes(bias + i, lanes);
            store_lanes(y + row * n + i, v, lanes);
        });
    });
}

// x *= by, or the sigmoid of it, rounded as it would be stored.
static void multiply(const Runtime& runtime, bf16* x, int64_t stride, const bf16* by, int64_t by_stride, int64_t rows,
                     int64_t n, int32_t by_sigmoid) {
    parallel_rows(runtime, rows, n * 8, [&](int64_t row) {
        over_lanes(n, [&](int64_t i, int lanes) {
            const vf factor = load_lanes(by + row * by_stride + i, lanes);
            bf16* at = x + row * stride + i;
            store_lanes(at, load_lanes(at, lanes) * (by_sigmoid ? rounded(sigmoid(factor)) : factor), lanes);
        });
    });
}

static inline vf activated(vf x, int32_t activation) {
    switch (activation) {
        case kSilu:
            return x * sigmoid(x);
        case kGelu:
            return x * vset(0.5f) * (vset(1.0f) + erf(x * vset(0.70710678118655f)));
        case kGeluTanh: {
            const vf inner = x * fma(x * x, vset(0.044715f * 0.7978845608f), vset(0.7978845608f));
            return x * sigmoid(inner + inner);
        }
        case kQuickGelu:
            return x * sigmoid(x * vset(1.702f));
        case kRelu:
            return vmax(x, vzero());
        default:
            return tanh(x);
    }
}

// What a gated MLP makes of its two halves. The clamped kind is GPT-OSS's: both at most 7, and one more of the second.
static inline vf gate_product(vf gate, vf up, int32_t activation) {
    if (activation != kClampedSwiglu) return activated(gate, activation) * up;
    const vf limit = vset(7.0f);
    return activated(vmin(gate, limit), kQuickGelu) * (vmax(vmin(up, limit), vset(-7.0f)) + vset(1.0f));
}

static void gated(const Runtime& runtime, const bf16* gate_up, bf16* y, int64_t rows, int64_t n, int32_t activation) {
    parallel_rows(runtime, rows, n * 6, [&](int64_t row) {
        const bf16 *gate = gate_up + row * 2 * n, *up = gate + n;
        over_lanes(n, [&](int64_t i, int lanes) {
            store_lanes(y + row * n + i,
                        gate_product(load_lanes(gate + i, lanes), load_lanes(up + i, lanes), activation), lanes);
        });
    });
}

static void activate(const Runtime& runtime, const bf16* x, bf16* y, int64_t count, int32_t activation) {
    constexpr int64_t kChunk = 2048;
    parallel_rows(runtime, (count + kChunk - 1) / kChunk, kChunk * 4, [&](int64_t chunk) {
        const int64_t first = chunk * kChunk;
        over_lanes(std::min(kChunk, count - first), [&](int64_t i, int lanes) {
            store_lanes(y + first + i, activated(load_lanes(x + first + i, lanes), activation), lanes);
        });
    });
}

// Half-rotation: element i pairs with element i + rotary / 2; the rest of the head passes through.
static void rope(const Runtime& runtime, const bf16* x, int64_t stride, bf16* y, int64_t y_stride, const float* cos,
                 const float* sin, int64_t tokens, int64_t heads, int64_t head_dim, int64_t rotary) {
    const int64_t half = rotary / 2;
    parallel_rows(runtime, tokens, heads * head_dim * 4, [&](int64_t token) {
        for (int64_t head = 0; head < heads; ++head) {
            const bf16* in = x + token * stride + head * head_dim;
            bf16* out = y + token * y_stride + head * head_dim;
            over_lanes(half, [&](int64_t i, int lanes) {
                const vf c = vload_n(cos + token * half + i, lanes), s = vload_n(sin + token * half + i, lanes);
                const vf a = load_lanes(in + i, lanes), b = load_lanes(in + half + i, lanes);
                store_lanes(out + i, a * c - b * s, lanes);
                store_lanes(out + half + i, fma(b, c, a * s), lanes);
            });
            if (rotary < head_dim && in != out)
                std::memcpy(out + rotary, in + rotary, size_t(head_dim - rotary) * sizeof(bf16));
        }
    });
}

// One head of one token for an int8 cache: signed bytes, and behind them the float32 scale of them all.
static inline void quantize_head(const bf16* x, int64_t head_dim, int8_t* out) {
    vf top = vzero();
    over_lanes(head_dim, [&](int64_t i, int lanes) { top = vmax(top, vabs(load_lanes(x + i, lanes))); });
    const float largest = vmax_lane(top), scale = largest / 127.0f;
    const vf inverse = vset(largest > 0 ? 127.0f / largest : 0.0f);
    over_lanes(head_dim, [&](int64_t i, int lanes) {
        int8_t bytes[kLanes];
        vstore_s8(bytes, load_lanes(x + i, lanes) * inverse);
        std::memcpy(out + i, bytes, size_t(lanes));
    });
    std::memcpy(out + head_dim, &scale, kScaleBytes);
}

static void write_kv(const Runtime& runtime, const bf16* k, int64_t k_stride, const bf16* v, int64_t v_stride,
                     void* k_cache, void* v_cache, const int64_t* slots, int64_t tokens, int64_t heads,
                     int64_t head_dim, int64_t block_size, int32_t int8) {
    const size_t row_bytes = int8 ? size_t(head_dim) + kScaleBytes : size_t(head_dim) * sizeof(bf16);
    parallel_rows(runtime, tokens, heads * head_dim * 8, [&](int64_t token) {
        if (slots[token] < 0) return;
        const int64_t block = slots[token] / block_size, row = slots[token] % block_size;
        for (int64_t head = 0; head < heads; ++head) {
            const size_t to = size_t((block * heads + head) * block_size + row) * row_bytes;
            const bf16 *k_from = k + token * k_stride + head * head_dim,
                       *v_from = v + token * v_stride + head * head_dim;
            char *k_to = static_cast<char*>(k_cache) + to, *v_to = static_cast<char*>(v_cache) + to;
            if (int8) {
                quantize_head(k_from, head_dim, reinterpret_cast<int8_t*>(k_to));
                quantize_head(v_from, head_dim, reinterpret_cast<int8_t*>(v_to));
            } else {
                std::memcpy(k_to, k_from, row_bytes);
                std::memcpy(v_to, v_from, row_bytes);
            }
        }
    });
}

}  // namespace sensorium::SENSORIUM_ISA
