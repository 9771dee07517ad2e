// int8 and int4 weights: quantising, packing and the product.
// Codes are unsigned bytes or nibbles, so that they are the unsigned side of the multiplication; activations become
// signed bytes. int8: code = w / scale + 128, a scale per output column, and one per row of x, whose outliers take two
// bytes. int4: code = w / scale + zero, a scale and a zero, which may be no code, per column and group along k, and a
// scale per row and group of x.
// Packed in panels like bf16, in words of four bytes of one column: four int8 codes, or eight int4 codes of which the
// low nibbles are the first four.
#pragma once

#include <cmath>

#include "kernels.h"
#include "linear.h"
#include "ops.h"

namespace sensorium::SENSORIUM_ISA {

constexpr uint16_t kEight = 0x4800;  // in fp16

// Rows of a tile that holds two kinds of sums in registers, and of one that takes blocks apart besides, see blocks.h.
constexpr int kGroupRows = kTileRows < 6 ? kTileRows : 6;
#if defined(SENSORIUM_AVX512)
constexpr int kRecordRows = 4;
#elif defined(SENSORIUM_AVX2)
constexpr int kRecordRows = 2;
#else
constexpr int kRecordRows = 0;  // none: each size takes long to compile
#endif

struct Codes {
    bool nibbles;
    bool grouped;  // x has a scale for every group, not outliers
    int64_t k, group, groups;
    bool blocks;
    int64_t sums;  // of x, in a group: over equal parts of it

    explicit Codes(const Linear& w)
        : nibbles(w.layout == kInt4),
          grouped(w.layout != kInt8),
          k(w.k),
          blocks(w.layout == kBlocks),
          sums(blocks ? 2 : 1) {
        group = blocks ? 32 : nibbles ? w.group : ceil_div(k, 4) * 4;
        groups = ceil_div(k, group);
    }
    int64_t padded() const { return group * groups; }
    int64_t rows_of_tile(int64_t rows) const {
        if (!grouped) return kTileRows;
        return blocks && rows <= 2 * kRecordRows ? kRecordRows : kGroupRows;
    }
    int64_t x_words() const { return padded() / 4; }                         // of a row of x
    int64_t words() const { return nibbles ? padded() / 8 : padded() / 4; }  // of a column of the weight
    uint8_t nothing() const { return nibbles ? 8 : 128; }  // the code of what is beyond k; x is zero there
};

// Weights

static inline void quantize_int8(const float* w, int64_t k, uint8_t* codes, float* scale) {
    vf top = vzero();
    over_lanes(k, [&](int64_t i, int lanes) { top = vmax(top, vabs(vload_n(w + i, lanes))); });
    const float largest = vmax_lane(top);
    *scale = largest / 127;
    const vf inverse = vset(largest > 0 ? 127 / largest : 0);
    over_lanes(k, [&](int64_t i, int lanes) {
        int8_t bytes[kLanes];
        vstore_s8(bytes, vload_n(w + i, lanes) * inverse);
        for (int j = 0; j < lanes; ++j) codes[i + j] = uint8_t(bytes[j]) ^ 0x80;
    });
}

// Sixteen groups at a time, one to a lane: element i of group g is w[i * 16 + g].
static inline vf reciprocal(vf scale) { return pick_less(vset(1e-30f), vabs(scale), vset(1) / scale, vzero()); }
static inline vf nearest_code(vf v, vf inverse) { return vmin(vmax(vround(v * inverse), vset(-8)), vset(7)); }
static inline vf through_f16(vf x) {
    uint16_t halves[kLanes];
    vstore_f16(halves, x);
    return vload_f16(halves);
}

// Sums of one try's codes q: with the scale that fits them best, <w, q> / <q, q>, they leave <w, w> - <w, q>² / <q, q>.
struct Fit {
    vf product = vzero(), square = vzero();
    void add(vf v, vf inverse) {
        const vf q = nearest_code(v, inverse);
        product = fma(v, q, product), square = fma(q, q, square);
    }
    vf scale() const { return pick_less(vzero(), square, product / square, vzero()); }
};

// The value of largest magnitude gets code -8 or less: sixteen codes reach one further down than up, so the sign of the
// scale is that value's, turned round. Some smaller scales are tried; the best one's codes are fitted and found anew.
static inline vf scale_int4(const float* w, int count) {
    constexpr float kDivisors[] = {-8.4f, -8.0f, -7.6f, -7.2f, -6.8f};
    constexpr int kTries = 5;
    vf top = vzero();
    for (int i = 0; i < count; ++i) {
        const vf v = vload(w + i * kLanes);
        top = pick_less(vabs(top), vabs(v), v, top);
    }
    Fit fits[kTries], last;
    vf inverse[kTries];
    for (int j = 0; j < kTries; ++j) inverse[j] = reciprocal(through_f16(top * vset(1 / kDivisors[j])));
    for (int i = 0; i < count; ++i) {
        const vf v = vload(w + i * kLanes);
        for (int j = 0; j < kTries; ++j) fits[j].add(v, inverse[j]);
    }
    vf best = vzero(), most = vzero();
    for (const Fit& fit : fits) {
        const vf scale = fit.scale(), gain = scale * fit.product;
        best = pick_less(most, gain, scale, best);
        most = vmax(most, gain);
    }
    const vf again = reciprocal(through_f16(best));
    for (int i = 0; i < count; ++i) last.add(vload(w + i * kLanes), again);
    const vf scale = through_f16(last.scale());
    return pick_less(vabs(scale), vset(INFINITY), scale, vzero());
}

static inline void quantize_int4(const float* w, int64_t k, int64_t group, uint8_t* codes, uint16_t* scales) {
    // One row more than a group has, so that a copy of the last, incomplete group fits behind.
    float* lanes = static_cast<float*>(Scratch<Buffer::kGroupLanes>::get(size_t(group) * (kLanes + 1) * sizeof(float)));
    float* last = lanes + group * kLanes;
    const int64_t groups = ceil_div(k, group);
    for (int64_t first = 0; first < groups; first += kLanes) {
        const int count = int(std::min<int64_t>(kLanes, groups - first));
        const bf16* rows[kLanes] = {};
        for (int g = 0; g < count; ++g) {
            const float* start = w + (first + g) * group;
            const int64_t here = std::min(group, k - (first + g) * group);
            if (here < group) {
                std::fill(std::copy(start, start + here, last), last + group, 0.0f);
                start = last;
            }
            rows[g] = reinterpret_cast<const bf16*>(start);
        }
        transpose_pairs(rows, kLanes, group, reinterpret_cast<uint32_t*>(lanes), kLanes);
        const vf scale = scale_int4(lanes, int(group)), inverse = reciprocal(scale);
        uint16_t halves[kLanes];
        vstore_f16(halves, scale);
        std::copy(halves, halves + count, scales + first);
        for (int64_t i = 0; i < group; i += kLanes) {  // a group's codes side by side again
            const int here = int(std::min<int64_t>(kLanes, group - i));
            alignas(64) float found[kLanes * kLanes], turned[kLanes * kLanes];
            const bf16* found_rows[kLanes];
            for (int j = 0; j < kLanes; ++j) {
                found_rows[j] = reinterpret_cast<const bf16*>(found + j * kLanes);
                if (j < here)
                    vstore(found + j * kLanes, nearest_code(vload(lanes + (i + j) * kLanes), inverse) + vset(8));
            }
            transpose_pairs(found_rows, here, kLanes, reinterpret_cast<uint32_t*>(turned), kLanes);
            for (int g = 0; g < count; ++g) {
                const int64_t to = (first + g) * group + i;
                int8_t bytes[kLanes];
                vstore_s8(bytes, vload(turned + g * kLanes));
                if (to < k) std::memcpy(codes + to, bytes, size_t(std::min<int64_t>(here, k - to)));
            }
        }
    }
}

// Codes of up to 16 columns, a byte each, into their place in a panel.
static inline void store_codes(const Codes& shape, uint8_t* const* codes, int count, uint32_t* out, int width,
                               bool stream) {
    const bf16* rows[kLanes];
    for (int i = 0; i < count; ++i) {
        rows[i] = reinterpret_cast<const bf16*>(codes[i]);
        if (!shape.nibbles || !codes[i]) continue;
        for (int64_t word = 0; word < shape.words(); ++word) {
            uint64_t bytes;
            std::memcpy(&bytes, codes[i] + word * 8, 8);
            const uint32_t nibbles = uint32_t(bytes | (bytes >> 28));  // the first four are the low ones
            std::memcpy(codes[i] + word * 4, &nibbles, 4);
        }
    }
    transpose_pairs(rows, count, shape.words(), out, width, stream);
}

// Calls fill(row, codes) for every row, where codes has room for the padded k and is set to nothing beyond k.
template <class Fill>
static void pack_columns(const Runtime& runtime, const Linear& w, int64_t rows, int64_t row_start, const Fill& fill) {
    const Codes shape(w);
    const int64_t first_panel = row_start / kPanel, row_end = row_start + rows;
    const auto pack = [&](int64_t task) {
        const int64_t panel = first_panel + task;
        const int width = panel_vectors(w.n, panel) * kLanes;
        const int64_t stride = (shape.padded() + 63) & ~int64_t(63);
        uint8_t* memory = static_cast<uint8_t*>(Scratch<Buffer::kCodes>::get(size_t(stride) * kLanes));
        uint32_t* const base = static_cast<uint32_t*>(w.weight) + panel * kPanel * shape.words();
        for (int lane = 0; lane < width; lane += kLanes) {
            const int64_t column = panel * kPanel + lane;
            const int64_t first = std::max(column, row_start), last = std::min(column + kLanes, row_end);
            if (first >= last) continue;
            uint8_t* codes[kLanes];
            const int count = int(last == w.n ? column + kLanes - first : last - first);
            for (int i = 0; i < count; ++i) {
                codes[i] = first + i < last ? memory + i * stride : nullptr;
                if (!codes[i]) continue;
                std::fill(codes[i] + shape.k, codes[i] + shape.padded(), shape.nothing());
                fill(first + i, codes[i]);
            }
            uint32_t* out = base + (first - panel * kPanel);
            store_codes(shape, codes, count, out, width, reinterpret_cast<uintptr_t>(out) % 64 == 0);
        }
    };
    with_team(runtime, rows * w.k > 1 << 16,
              [&](const Runtime& team) { parallel_for(team, ceil_div(row_end, kPanel) - first_panel, pack); });
}

static void quantize(const Runtime& runtime, const Linear& w, const bf16* weight, int64_t stride, int64_t rows,
                     int64_t row_start) {
    const Codes shape(w);
    pack_columns(runtime, w, rows, row_start, [&](int64_t row, uint8_t* codes) {
        float* wide = static_cast<float*>(Scratch<Buffer::kFloatRow>::get(size_t(w.k + kLanes) * sizeof(float)));
        const bf16* source = weight + (row - row_start) * stride;
        over_lanes(w.k, [&](int64_t i, int lanes) { vstore(wide + i, load_lanes(source + i, lanes)); });
        if (!shape.nibbles) {
            quantize_int8(wide, w.k, codes, static_cast<float*>(w.scales) + row);
            return;
        }
        uint16_t* scales =
            static_cast<uint16_t*>(Scratch<Buffer::kRowScales>::get(size_t(shape.groups) * sizeof(uint16_t)));
        quantize_int4(wide, w.k, shape.group, codes, scales);
        uint16_t* to = static_cast<uint16_t*>(w.scales) + (row / kPanel) * shape.groups * kPanel + row % kPanel;
        for (int64_t g = 0; g < shape.groups; ++g) to[g * kPanel] = scales[g];
    });
}

static void pack_codes(const Runtime& runtime, const Linear& w, const uint8_t* codes, int64_t stride, int64_t rows,
                       int64_t row_start) {
    pack_columns(runtime, w, rows, row_start,
                 [&](int64_t row, uint8_t* to) { std::memcpy(to, codes + (row - row_start) * stride, size_t(w.k)); });
}

static void unpack_quantized(const Linear& w, const int64_t* ids, int64_t count, bf16* out) {
    const Codes shape(w);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t panel = ids[i] / kPanel, column = ids[i] % kPanel;
        const int width = panel_vectors(w.n, panel) * kLanes;
        const uint32_t* words = static_cast<const uint32_t*>(w.weight) + panel * kPanel * shape.words() + column;
        bf16* row = out + i * w.k;
        for (int64_t at = 0; at < w.k; ++at) {
            if (!shape.nibbles) {
                const int code = int((words[at / 4 * width] >> (at % 4 * 8)) & 255);
                row[at] = float_to_bf16(float(code - 128) * static_cast<const float*>(w.scales)[ids[i]]);
                continue;
            }
            const int64_t place = (panel * shape.groups + at / shape.group) * kPanel + column;
            const int code = int((words[at / 8 * width] >> (at % 4 * 8 + at % 8 / 4 * 4)) & 15);
            uint16_t halves[kLanes] = {static_cast<const uint16_t*>(w.scales)[place],
                                       w.zeros ? w.zeros[place] : kEight};
            float wide[kLanes];
            vstore(wide, vload_f16(halves));
            row[at] = float_to_bf16((float(code) - wide[1]) * wide[0]);
        }
    }
}

// Activations

// A few values of a row of x that is multiplied with int8 codes may be far larger than all others, and a scale that had
// to reach them would round the rest to a few steps. They may exceed 127 steps: such a value is 128 * high + low, where
// low is the byte in its place and high is multiplied on its own.
constexpr int kOutliers = 2;          // of a row
constexpr float kWorthwhile = 1.25f;  // how much finer the scale must become by it

struct Outliers {
    int count = 0;
    int32_t word[kOutliers];   // which word of the row
    uint32_t quad[kOutliers];  // four signed bytes, three of them zero
};

struct QuantizedRows {
    Tiling tiling;
    uint32_t* a = nullptr;         // tiles [words][rows of the tile]
    float* scale = nullptr;        // [rows][groups]
    int32_t* sum = nullptr;        // [rows][groups * sums], of the steps that x comes to
    float* total = nullptr;        // [rows][groups], of blocks only: the sum of a group's numbers
    Outliers* outliers = nullptr;  // [rows], int8 only
};

// The three largest values, lane by lane, then of all lanes.
struct LargestThree {
    vf first = vzero(), second = vzero(), third = vzero();
    void add(vf v) {
        const vf less = vmin(first, v), least = vmin(second, less);
        first = vmax(first, v), second = vmax(second, less), third = vmax(third, least);
    }
    template <int Distance>
    void join() {
        const vf a = swap_lanes<Distance>(first), b = swap_lanes<Distance>(second), c = swap_lanes<Distance>(third);
        third = vmax(vmax(third, c), vmax(vmin(first, b), vmin(second, a)));
        second = vmax(vmin(first, a), vmax(second, b));
        first = vmax(first, a);
    }
    void join_lanes() { join<8>(), join<4>(), join<2>(), join<1>(); }
};
static_assert(kOutliers == 2);

// The value that is 127 steps: no more than kOutliers are larger, and 127 bytes of 128 steps reach them.
static inline float reach_of(const bf16* x, int64_t k) {
    LargestThree top;
    over_lanes(k, [&](int64_t i, int lanes) { top.add(vabs(load_lanes(x + i, lanes))); });
    top.join_lanes();
    float first[kLanes], third[kLanes];
    vstore(first, top.first), vstore(third, top.third);
    return third[0] * kWorthwhile < first[0] ? std::max(third[0], first[0] / 128) : first[0];
}

// Keeps the low parts of the steps at x[i]. Nothing else has more than 127.
static inline vf split_outliers(vf steps, int64_t i, Outliers& outliers) {
    const vf high = pick_less(vset(127), vabs(steps), vround(steps * vset(1.0f / 128)), vzero());
    int8_t bytes[kLanes];
    vstore_s8(bytes, high);
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!bytes[lane] || outliers.count == kOutliers) continue;
        outliers.word[outliers.count] = int32_t((i + lane) / 4);
        outliers.quad[outliers.count++] = uint32_t(uint8_t(bytes[lane])) << ((i + lane) % 4 * 8);
    }
    return steps - high * vset(128);
}

// Up to 127 steps a byte; `outliers` for what has more, or null.
static inline void quantize_run(const bf16* x, int64_t count, float reach, int8_t* out, int32_t* sum,
                                Outliers* outliers) {
    const vf inverse = vset(reach > 0 ? 127.0f / reach : 0.0f);
    vf total = vzero();
    over_lanes(count, [&](int64_t i, int lanes) {
        vf steps = vround(load_lanes(x + i, lanes) * inverse);
        total = total + steps;
        if (outliers && any_less(vset(127), vabs(steps))) steps = split_outliers(steps, i, *outliers);
        if (lanes == kLanes) {
            vstore_s8(out + i, steps);
        } else {
            int8_t tail[kLanes];
            vstore_s8(tail, steps);
            std::memcpy(out + i, tail, size_t(lanes));
        }
    });
    *sum = int32_t(vsum(total));
}

static inline void quantize_row(const Codes& shape, const bf16* x, int8_t* out, float* scale, int32_t* sum,
                                float* total, Outliers* outliers) {
    for (int64_t g = 0; g < shape.groups; ++g) {
        const int64_t first = g * shape.group, count = std::min(shape.group, shape.k - first);
        float reach;
        if (outliers) {
            *outliers = Outliers();
            reach = reach_of(x, count);
        } else {
            vf top = vzero();
            over_lanes(count, [&](int64_t i, int lanes) { top = vmax(top, vabs(load_lanes(x + first + i, lanes))); });
            reach = vmax_lane(top);
        }
        const int64_t part = count / shape.sums;
        for (int64_t i = 0; i < shape.sums; ++i)
            quantize_run(x + first + i * part, part, reach, out + first + i * part, sum + g * shape.sums + i, outliers);
        std::memset(out + first + count, 0, size_t(shape.group - count));
        scale[g] = reach / 127.0f;
        if (total) total[g] = scale[g] * float(sum[2 * g] + sum[2 * g + 1]);
    }
}

static inline size_t quantized_bytes(const Codes& shape, int64_t rows) {
    const size_t a_bytes = align64(size_t(rows * shape.x_words()) * 4),
                 s_bytes = align64(size_t(rows * shape.groups) * 4);
    return a_bytes + size_t(1 + shape.sums + shape.blocks) * s_bytes +
           (shape.grouped ? 0 : align64(size_t(rows) * sizeof(Outliers)));
}

// In `memory` of quantized_bytes.
static QuantizedRows quantize_rows(const Runtime& runtime, const Codes& shape, const bf16* x, int64_t stride,
                                   int64_t rows, char* memory) {
    const int64_t words = shape.x_words();
    const size_t a_bytes = align64(size_t(rows * words) * 4), s_bytes = align64(size_t(rows * shape.groups) * 4);
    QuantizedRows out{Tiling(rows, shape.rows_of_tile(rows)),
                      reinterpret_cast<uint32_t*>(memory),
                      reinterpret_cast<float*>(memory + a_bytes),
                      reinterpret_cast<int32_t*>(memory + a_bytes + s_bytes),
                      shape.blocks ? reinterpret_cast<float*>(memory + a_bytes + 3 * s_bytes) : nullptr,
                      shape.grouped ? nullptr : reinterpret_cast<Outliers*>(memory + a_bytes + 2 * s_bytes)};
    const auto quantize_tile = [&](int64_t i) {
        const int64_t first = out.tiling.start(i), row_bytes = words * 4 + 64;
        const int size = out.tiling.size(i);
        int8_t* bytes = static_cast<int8_t*>(Scratch<Buffer::kCodes>::get(size_t(row_bytes) * size_t(size)));
        const bf16* sources[kTileRows];
        for (int row = 0; row < size; ++row) {
            const int64_t place = (first + row) * shape.groups;
            int8_t* to = size == 1 ? reinterpret_cast<int8_t*>(out.a + first * words) : bytes + row * row_bytes;
            quantize_row(shape, x + (first + row) * stride, to, out.scale + place, out.sum + place * shape.sums,
                         out.total ? out.total + place : nullptr, out.outliers ? out.outliers + first + row : nullptr);
            sources[row] = reinterpret_cast<const bf16*>(to);
        }
        if (size > 1) transpose_pairs(sources, size, words, out.a + first * words, size);
    };
    if (rows * words > 4 << 10)
        parallel_for(runtime, out.tiling.count, quantize_tile);
    else
        for (int64_t i = 0; i < out.tiling.count; ++i) quantize_tile(i);
    return out;
}

// int8

static void multiply_int8(const QuantizedRows& x, const Codes& shape, const uint32_t* b, int vectors, int32_t* c) {
    const int width = vectors * kLanes;
    const int64_t rows = x.tiling.rows, words = shape.words(), step = pairs_per_step(rows, words);
    const int64_t ahead = rows <= 4 ? 4096 : rows <= kTileRows ? 8192 : step * width * 4 + 8192;
    for (int64_t p = 0; p < words; p += step)
        for (int64_t i = 0; i < x.tiling.count; ++i) {
            const int64_t first = x.tiling.start(i);
            const int size = x.tiling.size(i);
            tile_for<DotQuads, 0>(size, vectors)(x.a + first * words + p * size, b + p * width,
                                                 std::min(step, words - p), c + first * kPanel, kPanel, p > 0, ahead);
        }
}

// Sums become products: outliers' high parts are added, what the codes' 128 made of them is taken away.
static void finish_int8(const QuantizedRows& x, const uint32_t* b, const float* scales, int vectors, float* c) {
    const int width = vectors * kLanes;
    const int32_t* sums = reinterpret_cast<const int32_t*>(c);
    for (int64_t row = 0; row < x.tiling.rows; ++row) {
        const Outliers& outliers = x.outliers[row];
        for (int j = 0; j < width; j += kLanes) {
            vi high = iset(-x.sum[row]);
            for (int i = 0; i < outliers.count; ++i)
                high = dot_quad(high, qload(b + outliers.word[i] * width + j), qbroadcast(outliers.quad[i]));
            const vi sum = iload(sums + row * kPanel + j) + times128(high);
            vstore(c + row * kPanel + j, to_float(sum) * (vload(scales + j) * vset(x.scale[row])));
        }
    }
}

// int4

// The operands of a run of groups, for one panel and one tile of rows.
struct GroupRun {
    int64_t groups, words, rows_step;  // words of x in a group; distance of rows in x_scale and x_sum
    const uint16_t* scales;            // [groups][32]
    const uint16_t* zeros;             // [groups][32] or null
    const float* x_scale;
    const int32_t* x_sum;
    int64_t ahead;
};

// Small: codes are less than 64.
template <bool Small = true, int MR, int NV>
static inline void add_quads(vi (&sum)[MR][NV], const uint32_t* a, const vquad (&w)[NV]) {
    for (int i = 0; i < MR; ++i) {
        if constexpr (Small) {
            const auto x = nibble_broadcast(a[i]);
            for (int j = 0; j < NV; ++j) sum[i][j] = dot_nibbles(sum[i][j], w[j], x);
        } else {
            const auto x = qbroadcast(a[i]);
            for (int j = 0; j < NV; ++j) sum[i][j] = dot_quad(sum[i][j], w[j], x);
        }
    }
}

// Two words of x and one of nibbles.
template <int MR, int NV>
static inline void add_words(vi (&sum)[MR][NV], const uint32_t*& a, const uint32_t*& b, int64_t ahead) {
    constexpr int kLocality = MR <= 4 ? 3 : 2;
    __builtin_prefetch(reinterpret_cast<const char*>(b) + ahead, 0, kLocality);
    if (NV == 2) __builtin_prefetch(reinterpret_cast<const char*>(b) + ahead + 64, 0, kLocality);
    vquad low[NV], high[NV];
    for (int j = 0; j < NV; ++j) {
        const vquad both = qload(b + j * kLanes);
        low[j] = qlow(both), high[j] = qhigh(both);
    }
    add_quads(sum, a, low);
    add_quads(sum, a + MR, high);
    a += 2 * MR;
    b += NV * kLanes;
}

template <int MR, int NV>
static inline void add_scaled(vf (&total)[MR][NV], const vi (&sum)[MR][NV], const GroupRun& run, int64_t g) {
    __builtin_prefetch(run.scales + (g + 12) * kPanel, 0, 3);
    if (run.zeros) __builtin_prefetch(run.zeros + (g + 12) * kPanel, 0, 3);
    const float* x_scale = run.x_scale + g;
    const int32_t* x_sum = run.x_sum + g;
    SENSORIUM_UNROLL(2)
    for (int j = 0; j < NV; ++j) {
        const vf scale = vload_f16(run.scales + g * kPanel + j * kLanes);
        const vf zero = run.zeros ? vload_f16(run.zeros + g * kPanel + j * kLanes) : vzero();
        SENSORIUM_UNROLL(8)
        for (int i = 0; i < MR; ++i) {
            vf product = to_float(sum[i][j]);
            if (run.zeros) product = product - zero * vset(float(x_sum[i * run.rows_step]));
            total[i][j] = fma(product, scale * vset(x_scale[i * run.rows_step]), total[i][j]);
        }
    }
}

// Adds the run's products to C [MR, 32]. Left to itself the compiler keeps the sums in memory rather than unroll.
template <int MR, int NV>
static void group_tile(const GroupRun& run, const uint32_t* a, const uint32_t* b, float* c) {
    static_assert(MR <= 8 && NV <= 2);
    vf total[MR][NV];
    SENSORIUM_UNROLL(8)
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NV; ++j) total[i][j] = vload(c + i * kPanel + j * kLanes);
    for (int64_t g = 0; g < run.groups; ++g) {
        vi sum[MR][NV];
        SENSORIUM_UNROLL(8)
        for (int i = 0; i < MR; ++i) {
            const vi start = run.zeros ? izero() : iset(-8 * run.x_sum[i * run.rows_step + g]);
            for (int j = 0; j < NV; ++j) sum[i][j] = start;
        }
        SENSORIUM_UNROLL(2)
        for (int64_t p = 0; p < run.words; p += 2) add_words(sum, a, b, run.ahead);
        add_scaled(total, sum, run, g);
    }
    SENSORIUM_UNROLL(8)
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NV; ++j) vstore(c + i * kPanel + j * kLanes, total[i][j]);
}

using GroupTile = void (*)(const GroupRun& run, const uint32_t* a, const uint32_t* b, float* c);

template <int NV, int... I>
static GroupTile pick_group_tile(int rows, std::integer_sequence<int, I...>) {
    static constexpr GroupTile table[] = {group_tile<I + 1, NV>...};
    return table[rows - 1];
}

static inline GroupTile group_tile_for(int rows, int vectors) {
    constexpr auto sizes = std::make_integer_sequence<int, kGroupRows>{};
    return vectors == 2 ? pick_group_tile<2>(rows, sizes) : pick_group_tile<1>(rows, sizes);
}

constexpr int64_t kInt4Step =
    2048;  // elements of k that all rows are multiplied with before the next: 34 KB of a panel

static void multiply_int4(const QuantizedRows& x, const Codes& shape, const Linear& w, int64_t panel, int vectors,
                          float* c) {
    const int width = vectors * kLanes;
    const int64_t rows = x.tiling.rows, words = shape.x_words(), group_words = shape.group / 4;
    const uint32_t* b = static_cast<const uint32_t*>(w.weight) + panel * kPanel * shape.words();
    const uint16_t* scales = static_cast<const uint16_t*>(w.scales) + panel * shape.groups * kPanel;
    const uint16_t* zeros = w.zeros ? w.zeros + panel * shape.groups * kPanel : nullptr;
    std::fill(c, c + rows * kPanel, 0.0f);
    const int64_t step = kInt4Step / shape.group;
    for (int64_t g = 0; g < shape.groups; g += step)
        for (int64_t i = 0; i < x.tiling.count; ++i) {
            const int64_t first = x.tiling.start(i);
            const int size = x.tiling.size(i);
            const GroupRun run{std::min(step, shape.groups - g),
                               group_words,
                               shape.groups,
                               scales + g * kPanel,
                               zeros ? zeros + g * kPanel : nullptr,
                               x.scale + first * shape.groups + g,
                               x.sum + first * shape.groups + g,
                               8192};
            group_tile_for(size, vectors)(run, x.a + first * words + g * group_words * size,
                                          b + g * group_words / 2 * width, c + first * kPanel);
        }
}

// Both

constexpr int64_t kQuantizedRows = 480;  // of a block

static void multiply_codes(const QuantizedRows& x, const Codes& shape, const Linear& w, int64_t panel, float* c) {
    const int vectors = panel_vectors(w.n, panel);
    if (shape.nibbles) {
        multiply_int4(x, shape, w, panel, vectors, c);
        return;
    }
    const uint32_t* b = static_cast<const uint32_t*>(w.weight) + panel * kPanel * shape.words();
    multiply_int8(x, shape, b, vectors, reinterpret_cast<int32_t*>(c));
    finish_int8(x, b, static_cast<const float*>(w.scales) + panel * kPanel, vectors, c);
}

}  // namespace sensorium::SENSORIUM_ISA
