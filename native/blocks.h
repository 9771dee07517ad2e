// Weights in GGUF's blocks, kept without loss: w = scale * (value - middle) + offset, in groups of 16 or 32 inputs.
// Values are codes of 4, 5, 6 or 8 bits, or numbers of a table of 16. Scales and offsets are fp16, or, in blocks of 256
// inputs, signed bytes times an fp16 of the block. Activations become signed bytes with a scale per row and 32 inputs.
// Packed in panels of 32 output columns, a panel in records of a block's inputs each, a record in
//   fp16 [32] scales, fp16 [32] offsets if there are any: of a record of 256 inputs what its bytes are times,
//   then of 256 inputs bytes [groups][32] of scales, and of offsets,
//   then for every 32 inputs words of four bytes [words][32]: of 8 bits four codes each, else four words of eight codes
//   (low nibbles are the first four) and the fifth bits in one word, bit q of byte b being that of code 4 q + b, or
//   the fifth and sixth in two, bits 2 q of byte b those of code 4 q + b, the second word for the last 16 codes.
// A weight's rows may be of several kinds, one after the other in segments, each with panels of its own.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "quantized.h"

namespace sensorium::SENSORIUM_ISA {

enum BlockKind : int32_t { kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ2K, kQ3K, kQ4K, kQ5K, kQ6K, kIq4Nl, kIq4Xs };

constexpr int64_t kUnit = 32;  // inputs whose words lie together, and that share a scale of x

struct BlockForm {
    int64_t inputs, file_bytes;  // of a block of the file, and of a record
    int bits, group, middle;
    bool offsets, table;

    bool has_bytes() const { return inputs > kUnit; }
    int64_t groups() const { return inputs / group; }
    int64_t kinds() const { return offsets ? 2 : 1; }
    int64_t head_bytes() const { return kinds() * kPanel * (2 + (has_bytes() ? groups() : 0)); }
    int64_t unit_words() const { return bits * kPanel; }
    int64_t record_bytes() const { return head_bytes() + inputs / kUnit * unit_words() * 4; }
    int64_t panel_bytes(int64_t k) const { return k / inputs * record_bytes(); }
};

static inline const BlockForm& form_of(int32_t kind) {
    static constexpr BlockForm forms[] = {
        {32, 18, 4, 32, 8, false, false},     // Q4_0
        {32, 20, 4, 32, 0, true, false},      // Q4_1
        {32, 22, 5, 32, 16, false, false},    // Q5_0
        {32, 24, 5, 32, 0, true, false},      // Q5_1
        {32, 34, 8, 32, 128, false, false},   // Q8_0
        {256, 84, 4, 16, 0, true, false},     // Q2_K
        {256, 110, 4, 16, 4, false, false},   // Q3_K
        {256, 144, 4, 32, 0, true, false},    // Q4_K
        {256, 176, 5, 32, 0, true, false},    // Q5_K
        {256, 210, 6, 16, 32, false, false},  // Q6_K
        {32, 18, 4, 32, 128, false, true},    // IQ4_NL
        {256, 136, 4, 32, 128, false, true},  // IQ4_XS
    };
    return forms[kind];
}

// The numbers of IQ4's codes, plus 128.
alignas(16) constexpr uint8_t kIq4[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

static inline const BlockSegment& segment_of_row(const Linear& w, int64_t row) {
    const BlockSegment* found = segments_of(w);
    while (found->first_row + found->rows <= row) ++found;
    return *found;
}
static inline const uint8_t* panel_of(const Linear& w, const BlockSegment& segment, int64_t panel) {
    return static_cast<const uint8_t*>(segment.data) + panel * form_of(segment.kind).panel_bytes(w.k);
}

static int64_t block_bytes(int32_t kind, int64_t rows, int64_t k) {
    return ceil_div(rows, kPanel) * form_of(kind).panel_bytes(k);
}

// Packing

// A block of the file, taken apart: codes in the order of the inputs.
struct LooseBlock {
    uint16_t scale = 0, offset = 0;  // fp16
    int8_t scales[16] = {}, offsets[16] = {};
    uint8_t codes[256];
};

static inline uint16_t load16(const uint8_t* from) {
    uint16_t half;
    std::memcpy(&half, from, 2);
    return half;
}

// 16 bytes -> 32 codes: low nibbles, then high ones.
static inline void take_nibbles(const uint8_t* from, uint8_t* codes) {
    for (int i = 0; i < 16; ++i) codes[i] = from[i] & 15, codes[i + 16] = from[i] >> 4;
}
static inline void add_fifth_bits(const uint8_t* from, uint8_t* codes) {
    for (int i = 0; i < 32; ++i) codes[i] |= uint8_t((from[i / 8] >> (i % 8) & 1) << 4);
}
// 128 bytes -> 256 codes: of 32 bytes low nibbles, then high ones.
static inline void take_nibble_runs(const uint8_t* from, uint8_t* codes) {
    for (int run = 0; run < 4; ++run)
        for (int i = 0; i < 32; ++i) {
            codes[64 * run + i] = from[32 * run + i] & 15;
            codes[64 * run + 32 + i] = from[32 * run + i] >> 4;
        }
}
// 64 bytes -> 256 codes of two bits.
static inline void take_two_bits(const uint8_t* from, uint8_t* codes) {
    for (int i = 0; i < 256; ++i) codes[i] = from[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
}
// The twelve bytes of Q4_K and Q5_K: scales of six bits, and what is taken away.
static inline void take_k_scales(const uint8_t* from, LooseBlock& out) {
    out.scale = load16(from), out.offset = load16(from + 2);
    const uint8_t* s = from + 4;
    for (int g = 0; g < 8; ++g) {
        const int scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | s[g - 4] >> 6 << 4;
        const int least = g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | s[g] >> 6 << 4;
        out.scales[g] = int8_t(scale), out.offsets[g] = int8_t(-least);
    }
}

static inline void take_q2k(const uint8_t* from, LooseBlock& out) {
    for (int g = 0; g < 16; ++g) out.scales[g] = from[g] & 15, out.offsets[g] = int8_t(-(from[g] >> 4));
    take_two_bits(from + 16, out.codes);
    out.scale = load16(from + 80), out.offset = load16(from + 82);
}
static inline void take_q3k(const uint8_t* from, LooseBlock& out) {
    const uint8_t* s = from + 96;
    for (int g = 0; g < 16; ++g) {
        const int low = s[g % 8] >> (g / 8 * 4) & 15, high = s[8 + g % 4] >> (g / 4 * 2) & 3;
        out.scales[g] = int8_t((low | high << 4) - 32);
    }
    take_two_bits(from + 32, out.codes);
    for (int i = 0; i < 256; ++i) out.codes[i] |= uint8_t((from[i % 32] >> (i / 32) & 1) << 2);
    out.scale = load16(from + 108);
}
static inline void take_q6k(const uint8_t* from, LooseBlock& out) {
    uint8_t high[256];
    take_two_bits(from + 128, high);
    for (int i = 0; i < 256; ++i) {
        const int part = i % 128 / 32, low = from[i / 128 * 64 + part % 2 * 32 + i % 32] >> (part / 2 * 4) & 15;
        out.codes[i] = uint8_t(low | high[i] << 4);
    }
    std::memcpy(out.scales, from + 192, 16);
    out.scale = load16(from + 208);
}
static inline void take_iq4xs(const uint8_t* from, LooseBlock& out) {
    const int high = load16(from + 2);
    out.scale = load16(from);
    for (int g = 0; g < 8; ++g) {
        out.scales[g] = int8_t(((from[4 + g / 2] >> (g % 2 * 4) & 15) | (high >> (2 * g) & 3) << 4) - 32);
        take_nibbles(from + 8 + 16 * g, out.codes + 32 * g);
    }
}

static inline void take_block(int32_t kind, const uint8_t* from, LooseBlock& out) {
    switch (kind) {
        case kQ2K:
            return take_q2k(from, out);
        case kQ3K:
            return take_q3k(from, out);
        case kQ4K:
            return take_k_scales(from, out), take_nibble_runs(from + 16, out.codes);
        case kQ5K:
            take_k_scales(from, out), take_nibble_runs(from + 48, out.codes);
            for (int i = 0; i < 256; ++i) out.codes[i] |= uint8_t((from[16 + i % 32] >> (i / 32) & 1) << 4);
            return;
        case kQ6K:
            return take_q6k(from, out);
        case kIq4Xs:
            return take_iq4xs(from, out);
    }
    const bool offsets = form_of(kind).offsets;  // blocks of 32
    out.scale = load16(from);
    if (offsets) out.offset = load16(from + 2);
    const uint8_t* codes = from + (offsets ? 4 : 2);
    if (kind == kQ8_0) {
        for (int i = 0; i < 32; ++i) out.codes[i] = codes[i] ^ 0x80;
        return;
    }
    const bool fifth = kind == kQ5_0 || kind == kQ5_1;
    take_nibbles(codes + (fifth ? 4 : 0), out.codes);
    if (fifth) add_fifth_bits(codes, out.codes);
}

static inline uint32_t four_codes(const uint8_t* codes) {
    uint32_t quad;
    std::memcpy(&quad, codes, 4);
    return quad;
}

// 32 codes -> the words of one column.
static inline void put_unit(const BlockForm& form, const uint8_t* codes, uint32_t* words) {
    if (form.bits == 8) {
        for (int q = 0; q < 8; ++q) words[q * kPanel] = four_codes(codes + 4 * q);
        return;
    }
    for (int w = 0; w < 4; ++w)
        words[w * kPanel] = (four_codes(codes + 8 * w) & 0x0f0f0f0fu) | (four_codes(codes + 8 * w + 4) & 0x0f0f0f0fu)
                                                                            << 4;
    if (form.bits == 5) {
        uint32_t fifth = 0;
        for (int q = 0; q < 8; ++q) fifth |= (four_codes(codes + 4 * q) >> 4 & 0x01010101u) << q;
        words[4 * kPanel] = fifth;
    }
    for (int half = 0; form.bits == 6 && half < 2; ++half) {
        uint32_t high = 0;
        for (int q = 0; q < 4; ++q) high |= (four_codes(codes + 16 * half + 4 * q) >> 4 & 0x03030303u) << (2 * q);
        words[(4 + half) * kPanel] = high;
    }
}

static inline void put_block(const BlockForm& form, const LooseBlock& block, int64_t column, uint8_t* record) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(record);
    halves[column] = block.scale;
    if (form.offsets) halves[kPanel + column] = block.offset;
    if (form.has_bytes()) {
        int8_t* bytes = reinterpret_cast<int8_t*>(halves + form.kinds() * kPanel);
        for (int64_t g = 0; g < form.groups(); ++g) {
            bytes[g * kPanel + column] = block.scales[g];
            if (form.offsets) bytes[(form.groups() + g) * kPanel + column] = block.offsets[g];
        }
    }
    uint32_t* words = reinterpret_cast<uint32_t*>(record + form.head_bytes()) + column;
    for (int64_t at = 0; at < form.inputs; at += kUnit, words += form.unit_words())
        put_unit(form, block.codes + at, words);
}

// Rows of the file's blocks, all of one segment; memory of columns beyond a segment's last is zero already.
static void pack_blocks(const Runtime& runtime, const Linear& w, const uint8_t* blocks, int64_t stride, int64_t rows,
                        int64_t row_start) {
    const BlockSegment& segment = segment_of_row(w, row_start);
    const BlockForm& form = form_of(segment.kind);
    const int64_t begin = row_start - segment.first_row, end = begin + rows, first_panel = begin / kPanel;
    const auto pack = [&](int64_t task) {
        const int64_t panel = first_panel + task;
        uint8_t* record = const_cast<uint8_t*>(panel_of(w, segment, panel));
        const int64_t first = std::max(panel * kPanel, begin), last = std::min((panel + 1) * kPanel, end);
        LooseBlock block;
        for (int64_t at = 0; at < w.k / form.inputs; ++at, record += form.record_bytes())
            for (int64_t row = first; row < last; ++row) {
                take_block(segment.kind, blocks + (row - begin) * stride + at * form.file_bytes, block);
                put_block(form, block, row - panel * kPanel, record);
            }
    };
    with_team(runtime, rows * w.k > 1 << 16,
              [&](const Runtime& team) { parallel_for(team, ceil_div(end, kPanel) - first_panel, pack); });
}

static inline int code_at(const BlockForm& form, const uint32_t* words, int64_t i) {
    if (form.bits == 8) return int(words[i / 4 * kPanel] >> (i % 4 * 8) & 255);
    const int code = int(words[i / 8 * kPanel] >> (i % 4 * 8 + i % 8 / 4 * 4) & 15);
    if (form.table) return kIq4[code];
    const int byte = int(i % 4 * 8);
    if (form.bits == 5) return code | int(words[4 * kPanel] >> (byte + i / 4) & 1) << 4;
    if (form.bits == 6) return code | int(words[(4 + i / 16) * kPanel] >> (byte + i % 16 / 4 * 2) & 3) << 4;
    return code;
}

static inline void unpack_record(const BlockForm& form, const uint8_t* record, int64_t column, bf16* out) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(record);
    const uint16_t both[kLanes] = {halves[column], form.offsets ? halves[kPanel + column] : uint16_t(0)};
    float whole[kLanes];
    vstore(whole, vload_f16(both));
    const int8_t* bytes = reinterpret_cast<const int8_t*>(halves + form.kinds() * kPanel) + column;
    const uint32_t* words = reinterpret_cast<const uint32_t*>(record + form.head_bytes()) + column;
    for (int64_t i = 0; i < form.inputs; ++i) {
        const int64_t g = i / form.group;
        const float value = float(code_at(form, words + i / kUnit * form.unit_words(), i % kUnit) - form.middle);
        const float scale = form.has_bytes() ? whole[0] * float(bytes[g * kPanel]) : whole[0];
        const volatile float product = scale * value;  // rounded by itself, as the format says
        if (!form.offsets) {
            out[i] = float_to_bf16(product);
            continue;
        }
        const volatile float offset =
            form.has_bytes() ? whole[1] * float(bytes[(form.groups() + g) * kPanel]) : whole[1];
        out[i] = float_to_bf16(product + offset);
    }
}

static void unpack_blocks(const Linear& w, const int64_t* ids, int64_t count, bf16* out) {
    for (int64_t i = 0; i < count; ++i) {
        const BlockSegment& segment = segment_of_row(w, ids[i]);
        const BlockForm& form = form_of(segment.kind);
        const int64_t row = ids[i] - segment.first_row;
        const uint8_t* record = panel_of(w, segment, row / kPanel);
        for (int64_t at = 0; at < w.k; at += form.inputs, record += form.record_bytes())
            unpack_record(form, record, row % kPanel, out + i * w.k + at);
    }
}

// The product

constexpr int64_t kTogetherUnits = 8;  // units that are expanded at a time: 8 KB of words

// Some units of a panel, expanded: bytes of codes, floats of scales.
struct UnitRun {
    int64_t units, unit_words, groups_of_x;  // words from one unit to the next; distance of rows in x_scale
    const uint32_t* words;
    const float* scales;   // [groups][32]
    const float* offsets;  // the same, or null
    const float* x_scale;
    const int32_t* x_sum;  // [rows][2 * groups_of_x], of 16 inputs each
    int middle;
};

template <int Bits, bool Table>
static inline void expand_unit(const uint32_t* from, uint32_t* out) {
    SENSORIUM_UNROLL(2)
    for (int j = 0; j < kPanel; j += kLanes) {
        const auto quad = [&](auto which, vquad code) {
            constexpr int q = decltype(which)::value;
            if constexpr (Table) code = qlookup(code, kIq4);
            if constexpr (Bits == 5) code = qadd_bits<4 - q>(code, qload(from + 4 * kPanel + j), 0x10101010u);
            if constexpr (Bits == 6)
                code = qadd_bits<4 - q % 4 * 2>(code, qload(from + (4 + q / 4) * kPanel + j), 0x30303030u);
            qstore(out + q * kPanel + j, code);
        };
        const auto word = [&](auto which) {
            constexpr int w = decltype(which)::value;
            const vquad both = qload(from + w * kPanel + j);
            quad(std::integral_constant<int, 2 * w>{}, qlow(both));
            quad(std::integral_constant<int, 2 * w + 1>{}, qhigh(both));
        };
        word(std::integral_constant<int, 0>{}), word(std::integral_constant<int, 1>{});
        word(std::integral_constant<int, 2>{}), word(std::integral_constant<int, 3>{});
    }
}

static inline void expand_codes_of(const BlockForm& form, const uint32_t* from, uint32_t* out) {
    if (form.table)
        expand_unit<4, true>(from, out);
    else if (form.bits == 4)
        expand_unit<4, false>(from, out);
    else if (form.bits == 5)
        expand_unit<5, false>(from, out);
    else
        expand_unit<6, false>(from, out);
}

// What bytes or halves of a record say, [groups][32].
static inline void expand_scales(const BlockForm& form, const uint8_t* record, int64_t which, float* out) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(record);
    const int8_t* bytes = reinterpret_cast<const int8_t*>(halves + form.kinds() * kPanel);
    for (int j = 0; j < kPanel; j += kLanes) {
        const vf whole = vload_f16(halves + which * kPanel + j);
        if (!form.has_bytes()) {
            vstore(out + j, whole);
            continue;
        }
        for (int64_t g = 0; g < form.groups(); ++g)
            vstore(out + g * kPanel + j, whole * vload_s8(bytes + (which * form.groups() + g) * kPanel + j));
    }
}

// Group: inputs that share a scale; Small: codes are less than 64.
template <int MR, int Group, bool Small>
static void unit_tile(const UnitRun& run, const uint32_t* a, float* c) {
    constexpr int kGroups = int(kUnit) / Group, kWords = Group / 4;
    vf total[MR][2];
    SENSORIUM_UNROLL(8)
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < 2; ++j) total[i][j] = vload(c + i * kPanel + j * kLanes);
    const float *scales = run.scales, *offsets = run.offsets;
    for (int64_t unit = 0; unit < run.units; ++unit) {
        const uint32_t* b = run.words + unit * run.unit_words;
        const float* x_scale = run.x_scale + unit;
        const int32_t* x_sum = run.x_sum + 2 * unit;
        for (int g = 0; g < kGroups; ++g, scales += kPanel) {
            int32_t x_sums[MR];
            vi sum[MR][2];
            SENSORIUM_UNROLL(8)
            for (int i = 0; i < MR; ++i) {
                const int32_t* own = x_sum + i * 2 * run.groups_of_x;
                x_sums[i] = kGroups == 1 ? own[0] + own[1] : own[g];
                const vi start = iset(-run.middle * x_sums[i]);
                for (int j = 0; j < 2; ++j) sum[i][j] = start;
            }
            SENSORIUM_UNROLL(2)
            for (int p = 0; p < kWords; ++p, a += MR, b += kPanel) {
                const vquad w[2] = {qload(b), qload(b + kLanes)};
                for (int i = 0; i < MR; ++i) {
                    if constexpr (Small) {
                        const auto x = nibble_broadcast(a[i]);
                        for (int j = 0; j < 2; ++j) sum[i][j] = dot_nibbles(sum[i][j], w[j], x);
                    } else {
                        const auto x = qbroadcast(a[i]);
                        for (int j = 0; j < 2; ++j) sum[i][j] = dot_quad(sum[i][j], w[j], x);
                    }
                }
            }
            SENSORIUM_UNROLL(2)
            for (int j = 0; j < 2; ++j) {
                const vf scale = vload(scales + j * kLanes);
                SENSORIUM_UNROLL(8)
                for (int i = 0; i < MR; ++i) {
                    const vf own = vset(x_scale[i * run.groups_of_x]);
                    total[i][j] = fma(to_float(sum[i][j]), scale * own, total[i][j]);
                }
            }
            if (!offsets) continue;
            SENSORIUM_UNROLL(2)
            for (int j = 0; j < 2; ++j) {
                const vf offset = vload(offsets + j * kLanes);
                SENSORIUM_UNROLL(8)
                for (int i = 0; i < MR; ++i) {
                    const vf own = vset(x_scale[i * run.groups_of_x] * float(x_sums[i]));
                    total[i][j] = fma(offset, own, total[i][j]);
                }
            }
            offsets += kPanel;
        }
    }
    SENSORIUM_UNROLL(8)
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < 2; ++j) vstore(c + i * kPanel + j * kLanes, total[i][j]);
}

using UnitTile = void (*)(const UnitRun& run, const uint32_t* a, float* c);

template <int Group, bool Small, int... I>
static UnitTile pick_unit_tile(int rows, std::integer_sequence<int, I...>) {
    static constexpr UnitTile table[] = {unit_tile<I + 1, Group, Small>...};
    return table[rows - 1];
}
static inline UnitTile unit_tile_for(const BlockForm& form, int rows) {
    constexpr auto sizes = std::make_integer_sequence<int, kGroupRows>{};
    if (form.group == 16) return pick_unit_tile<16, true>(rows, sizes);
    return form.bits == 8 || form.table ? pick_unit_tile<32, false>(rows, sizes)
                                        : pick_unit_tile<32, true>(rows, sizes);
}

// One panel against all rows of x; sums in `c` [rows, 32].
static void multiply_blocks(const QuantizedRows& x, const Linear& w, int64_t panel, float* c) {
    constexpr int64_t kAhead = 8192;
    const BlockSegment& segment = segment_of_panel(w, panel);
    const BlockForm& form = form_of(segment.kind);
    const uint8_t* record = panel_of(w, segment, panel - segment.first_panel);
    const int64_t units = w.k / kUnit, each = form.inputs / kUnit, groups = kUnit / form.group;
    const bool expands = form.bits < 8;
    const size_t word_bytes = size_t(kTogetherUnits * 8 * kPanel) * sizeof(uint32_t);
    const size_t scale_floats = size_t(kTogetherUnits * 2 * kPanel);
    char* memory =
        static_cast<char*>(Scratch<Buffer::kWeightPiece>::get(word_bytes + 2 * scale_floats * sizeof(float)));
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    float *scales = reinterpret_cast<float*>(memory + word_bytes), *offsets = scales + scale_floats;
    std::fill(c, c + x.tiling.rows * kPanel, 0.0f);
    for (int64_t unit = 0; unit < units; unit += kTogetherUnits) {
        const int64_t count = std::min(kTogetherUnits, units - unit);
        const uint32_t* first = reinterpret_cast<const uint32_t*>(record + form.head_bytes());
        for (int64_t u = 0; u < count; u += each, record += form.record_bytes()) {
            expand_scales(form, record, 0, scales + u * groups * kPanel);
            if (form.offsets) expand_scales(form, record, 1, offsets + u * groups * kPanel);
            for (int64_t line = 0; line < form.record_bytes(); line += 64)
                __builtin_prefetch(record + kAhead + line, 0, 3);
            const uint32_t* from = reinterpret_cast<const uint32_t*>(record + form.head_bytes());
            for (int64_t i = u; expands && i < u + each; ++i, from += form.unit_words())
                expand_codes_of(form, from, words + i * 8 * kPanel);
        }
        UnitRun run{count,      expands ? 8 * kPanel : form.record_bytes() / int64_t(sizeof(uint32_t)),
                    units,      expands ? words : first,
                    scales,     form.offsets ? offsets : nullptr,
                    nullptr,    nullptr,
                    form.middle};
        for (int64_t i = 0; i < x.tiling.count; ++i) {
            const int64_t start = x.tiling.start(i);
            const int size = x.tiling.size(i);
            run.x_scale = x.scale + start * units + unit, run.x_sum = x.sum + 2 * (start * units + unit);
            unit_tile_for(form, size)(run, x.a + start * w.k / 4 + unit * 8 * size, c + start * kPanel);
        }
    }
}

}  // namespace sensorium::SENSORIUM_ISA
