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

    constexpr bool has_bytes() const { return inputs > kUnit; }
    constexpr int64_t groups() const { return inputs / group; }
    constexpr int64_t kinds() const { return offsets ? 2 : 1; }
    constexpr int64_t head_bytes() const { return kinds() * kPanel * (2 + (has_bytes() ? groups() : 0)); }
    constexpr int64_t unit_words() const { return bits * kPanel; }
    constexpr int64_t record_bytes() const { return head_bytes() + inputs / kUnit * unit_words() * 4; }
    constexpr int64_t panel_bytes(int64_t k) const { return k / inputs * record_bytes(); }
};

constexpr BlockForm kForms[] = {
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
static inline const BlockForm& form_of(int32_t kind) { return kForms[kind]; }

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

// A block of the file, taken apart: codes in the order of the inputs, four to a word.
struct LooseBlock {
    uint16_t scale = 0, offset = 0;  // fp16
    int8_t scales[16] = {}, offsets[16] = {};
    uint32_t codes[64];
};

constexpr uint32_t kNibbles = 0x0f0f0f0fu;  // of a word of four bytes

static inline uint16_t load16(const uint8_t* from) {
    uint16_t half;
    std::memcpy(&half, from, 2);
    return half;
}
static inline uint32_t load32(const uint8_t* from) {
    uint32_t word;
    std::memcpy(&word, from, 4);
    return word;
}

// 16 bytes -> 32 codes: low nibbles, then high ones.
static inline void take_nibbles(const uint8_t* from, uint32_t* codes) {
    for (int i = 0; i < 4; ++i) {
        const uint32_t both = load32(from + 4 * i);
        codes[i] = both & kNibbles, codes[i + 4] = both >> 4 & kNibbles;
    }
}
// Four bytes, a bit for each of 32 codes.
static inline void add_fifth_bits(const uint8_t* from, uint32_t* codes) {
    const uint32_t bits = load32(from);
    for (int i = 0; i < 8; ++i) codes[i] |= ((bits >> (4 * i) & 15) * 0x00204081u & 0x01010101u) << 4;
}
// 128 bytes -> 256 codes: of 32 bytes low nibbles, then high ones.
static inline void take_nibble_runs(const uint8_t* from, uint32_t* codes) {
    for (int run = 0; run < 4; ++run)
        for (int i = 0; i < 8; ++i) {
            const uint32_t both = load32(from + 32 * run + 4 * i);
            codes[16 * run + i] = both & kNibbles, codes[16 * run + 8 + i] = both >> 4 & kNibbles;
        }
}
// 64 bytes -> 256 codes of two bits.
static inline void take_two_bits(const uint8_t* from, uint32_t* codes) {
    for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 8; ++i) {
            const uint32_t four = load32(from + 32 * half + 4 * i);
            for (int part = 0; part < 4; ++part) codes[32 * half + 8 * part + i] = four >> (2 * part) & 0x03030303u;
        }
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
// 32 bytes: bit b of byte i is another one, `shift` bits up, of code 32 b + i.
static inline void add_high_bits(const uint8_t* from, int shift, uint32_t* codes) {
    for (int bit = 0; bit < 8; ++bit)
        for (int i = 0; i < 8; ++i) codes[8 * bit + i] |= (load32(from + 4 * i) >> bit & 0x01010101u) << shift;
}
static inline void take_q3k(const uint8_t* from, LooseBlock& out) {
    const uint8_t* s = from + 96;
    for (int g = 0; g < 16; ++g) {
        const int low = s[g % 8] >> (g / 8 * 4) & 15, high = s[8 + g % 4] >> (g / 4 * 2) & 3;
        out.scales[g] = int8_t((low | high << 4) - 32);
    }
    take_two_bits(from + 32, out.codes);
    add_high_bits(from, 2, out.codes);
    out.scale = load16(from + 108);
}
static inline void take_q6k(const uint8_t* from, LooseBlock& out) {
    take_two_bits(from + 128, out.codes);
    for (int half = 0; half < 2; ++half)
        for (int part = 0; part < 4; ++part)
            for (int i = 0; i < 8; ++i) {
                const uint32_t low = load32(from + 64 * half + part % 2 * 32 + 4 * i) >> (part / 2 * 4) & kNibbles;
                uint32_t& code = out.codes[32 * half + 8 * part + i];
                code = low | code << 4;
            }
    std::memcpy(out.scales, from + 192, 16);
    out.scale = load16(from + 208);
}
static inline void take_iq4xs(const uint8_t* from, LooseBlock& out) {
    const int high = load16(from + 2);
    out.scale = load16(from);
    for (int g = 0; g < 8; ++g) {
        out.scales[g] = int8_t(((from[4 + g / 2] >> (g % 2 * 4) & 15) | (high >> (2 * g) & 3) << 4) - 32);
        take_nibbles(from + 8 + 16 * g, out.codes + 8 * g);
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
            return add_high_bits(from + 16, 4, out.codes);
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
        for (int i = 0; i < 8; ++i) out.codes[i] = load32(codes + 4 * i) ^ 0x80808080u;
        return;
    }
    const bool fifth = kind == kQ5_0 || kind == kQ5_1;
    take_nibbles(codes + (fifth ? 4 : 0), out.codes);
    if (fifth) add_fifth_bits(codes, out.codes);
}

// 32 codes -> the words of one column.
static inline void put_unit(const BlockForm& form, const uint32_t* codes, uint32_t* words) {
    if (form.bits == 8) {
        for (int q = 0; q < 8; ++q) words[q * kPanel] = codes[q];
        return;
    }
    for (int w = 0; w < 4; ++w) words[w * kPanel] = (codes[2 * w] & kNibbles) | (codes[2 * w + 1] & kNibbles) << 4;
    if (form.bits == 5) {
        uint32_t fifth = 0;
        for (int q = 0; q < 8; ++q) fifth |= (codes[q] >> 4 & 0x01010101u) << q;
        words[4 * kPanel] = fifth;
    }
    for (int half = 0; form.bits == 6 && half < 2; ++half) {
        uint32_t high = 0;
        for (int q = 0; q < 4; ++q) high |= (codes[4 * half + q] >> 4 & 0x03030303u) << (2 * q);
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
        put_unit(form, block.codes + at / 4, words);
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
    const float* x_total;
    const int32_t* x_sum;  // [rows][2 * groups_of_x], of 16 inputs each
    int middle;
};

// Word W of a column vector's unit: the codes 8 W to 8 W + 3, and those behind them.
template <int Bits, bool Table, int W>
static inline void decode_word(const uint32_t* unit, vquad& first, vquad& second) {
    const vquad both = qload(unit + W * kPanel);
    first = qlow(both), second = qhigh(both);
    if constexpr (Table) first = qlookup(first, kIq4), second = qlookup(second, kIq4);
    if constexpr (Bits == 5) {
        const vquad bits = qload(unit + 4 * kPanel);
        first = qadd_bits<4 - 2 * W>(first, bits, 0x10101010u);
        second = qadd_bits<3 - 2 * W>(second, bits, 0x10101010u);
    }
    if constexpr (Bits == 6) {
        const vquad bits = qload(unit + (4 + W / 2) * kPanel);
        first = qadd_bits<4 - W % 2 * 4>(first, bits, 0x30303030u);
        second = qadd_bits<2 - W % 2 * 4>(second, bits, 0x30303030u);
    }
}

template <int Bits, bool Table, int W = 0>
static inline void expand_unit(const uint32_t* from, uint32_t* out) {
    SENSORIUM_UNROLL(2)
    for (int j = 0; j < kPanel; j += kLanes) {
        vquad first, second;
        decode_word<Bits, Table, W>(from + j, first, second);
        qstore(out + 2 * W * kPanel + j, first);
        qstore(out + (2 * W + 1) * kPanel + j, second);
    }
    if constexpr (W < 3) expand_unit<Bits, Table, W + 1>(from, out);
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

// Group: inputs that share a scale; Small: codes are less than 64. What has offsets has its middle at zero.
template <int MR, int Group, bool Small, bool Offsets>
static void unit_tile(const UnitRun& run, const uint32_t* a, float* c) {
    constexpr int kGroups = int(kUnit) / Group, kWords = Group / 4;
    vf total[MR][2];
    SENSORIUM_UNROLL(8)
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < 2; ++j) total[i][j] = vload(c + i * kPanel + j * kLanes);
    const float *scales = run.scales, *offsets = run.offsets;
    for (int64_t unit = 0; unit < run.units; ++unit) {
        const uint32_t* b = run.words + unit * run.unit_words;
        const float *x_scale = run.x_scale + unit, *x_total = run.x_total + unit;
        const int32_t* x_sum = run.x_sum + 2 * unit;
        for (int g = 0; g < kGroups; ++g, scales += kPanel) {
            const auto x_sum_of = [&](int i) {
                const int32_t* own = x_sum + i * 2 * run.groups_of_x;
                return kGroups == 1 ? own[0] + own[1] : own[g];
            };
            vi sum[MR][2];
            SENSORIUM_UNROLL(8)
            for (int i = 0; i < MR; ++i) {
                const vi start = Offsets ? izero() : iset(-run.middle * x_sum_of(i));
                for (int j = 0; j < 2; ++j) sum[i][j] = start;
            }
            SENSORIUM_UNROLL(2)
            for (int p = 0; p < kWords; ++p, a += MR, b += kPanel) {
                const vquad w[2] = {qload(b), qload(b + kLanes)};
                add_quads<Small>(sum, a, w);
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
            if constexpr (!Offsets) continue;
            SENSORIUM_UNROLL(2)
            for (int j = 0; j < 2; ++j) {
                const vf offset = vload(offsets + j * kLanes);
                SENSORIUM_UNROLL(8)
                for (int i = 0; i < MR; ++i) {
                    const vf own = vset(kGroups == 1 ? x_total[i * run.groups_of_x]
                                                     : x_scale[i * run.groups_of_x] * float(x_sum_of(i)));
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

template <int Group, bool Small, bool Offsets, int... I>
static UnitTile pick_unit_tile(int rows, std::integer_sequence<int, I...>) {
    static constexpr UnitTile table[] = {unit_tile<I + 1, Group, Small, Offsets>...};
    return table[rows - 1];
}
static inline UnitTile unit_tile_for(const BlockForm& form, int rows) {
    constexpr auto sizes = std::make_integer_sequence<int, kGroupRows>{};
    if (form.bits == 8 || form.table) return pick_unit_tile<32, false, false>(rows, sizes);
    if (form.group == 16)
        return form.offsets ? pick_unit_tile<16, true, true>(rows, sizes)
                            : pick_unit_tile<16, true, false>(rows, sizes);
    return form.offsets ? pick_unit_tile<32, true, true>(rows, sizes) : pick_unit_tile<32, true, false>(rows, sizes);
}

// Few rows: codes are taken apart in registers, in the way from the memory. Of the kinds that models are stored in.

constexpr int32_t kRecordKinds[] = {kQ8_0, kQ4K, kQ5K, kQ6K};

struct RecordRun {
    int64_t records, groups_of_x;
    const uint8_t* record;
    const float *x_scale, *x_total;  // see UnitRun
    const int32_t* x_sum;
};

// The words W to End - 1 of a unit, or where codes are bytes all.
template <int Bits, int W, int End, int MR>
static inline void add_unit_words(vi (&sum)[MR][2], const uint32_t* a, const uint32_t* unit) {
    if constexpr (Bits == 8) {
        for (int q = 0; q < 8; ++q, a += MR, unit += kPanel) {
            const vquad w[2] = {qload(unit), qload(unit + kLanes)};
            add_quads<false>(sum, a, w);
        }
    } else {
        vquad first[2], second[2];
        for (int j = 0; j < 2; ++j) decode_word<Bits, false, W>(unit + j * kLanes, first[j], second[j]);
        add_quads(sum, a + 2 * W * MR, first);
        add_quads(sum, a + (2 * W + 1) * MR, second);
        if constexpr (W + 1 < End) add_unit_words<Bits, W + 1, End>(sum, a, unit);
    }
}

// Group G of a unit: `scale` and `offset` of its columns.
template <int Kind, int G, int MR>
static inline void add_record_group(vf (&total)[MR][2], const RecordRun& run, int64_t x_group, const uint32_t* a,
                                    const uint32_t* unit, const vf (&scale)[2], const vf (&offset)[2]) {
    constexpr int kGroups = int(kUnit / kForms[Kind].group), kWords = 4 / kGroups, kMiddle = kForms[Kind].middle;
    vi sum[MR][2];
    SENSORIUM_UNROLL(8)
    for (int i = 0; i < MR; ++i) {
        const int32_t* x_sum = run.x_sum + 2 * (i * run.groups_of_x + x_group);
        const vi start = kMiddle ? iset(-kMiddle * (kGroups == 1 ? x_sum[0] + x_sum[1] : x_sum[G])) : izero();
        for (int j = 0; j < 2; ++j) sum[i][j] = start;
    }
    add_unit_words<kForms[Kind].bits, G * kWords, (G + 1) * kWords>(sum, a, unit);
    SENSORIUM_UNROLL(2)
    for (int j = 0; j < 2; ++j) {
        SENSORIUM_UNROLL(8)
        for (int i = 0; i < MR; ++i) {
            const int64_t place = i * run.groups_of_x + x_group;
            total[i][j] = fma(to_float(sum[i][j]), scale[j] * vset(run.x_scale[place]), total[i][j]);
            if constexpr (kForms[Kind].offsets) total[i][j] = fma(offset[j], vset(run.x_total[place]), total[i][j]);
        }
    }
}

// The sums are those of unit_tile, to the last bit. One row or two wait for memory: the processor finds the one stream
// by itself, and goes faster through it when a unit's lines are asked for together. More rows leave time to ask far
// ahead.
template <int Kind, int MR>
static void record_tile(const RecordRun& run, const uint32_t* a, float* c) {
    constexpr bool kOffsets = kForms[Kind].offsets, kBytes = kForms[Kind].has_bytes();
    constexpr int64_t kGroups = kUnit / kForms[Kind].group, kAhead = MR <= 2 ? 0 : 8192;
    vf total[MR][2];
    SENSORIUM_UNROLL(8)
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < 2; ++j) total[i][j] = vload(c + i * kPanel + j * kLanes);
    const uint8_t* record = run.record;
    int64_t x_group = 0;
    for (int64_t at = 0; at < run.records; ++at, record += kForms[Kind].record_bytes()) {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(record);
        const int8_t* bytes = reinterpret_cast<const int8_t*>(halves + kForms[Kind].kinds() * kPanel);
        const uint32_t* unit = reinterpret_cast<const uint32_t*>(record + kForms[Kind].head_bytes());
        for (int64_t line = 0; line < kForms[Kind].head_bytes(); line += 64)
            __builtin_prefetch(record + kAhead + line, 0, 3);
        vf whole[2], least[2];
        for (int j = 0; j < 2; ++j) {
            whole[j] = vload_f16(halves + j * kLanes);
            least[j] = kOffsets ? vload_f16(halves + kPanel + j * kLanes) : vzero();
        }
        for (int64_t u = 0; u < kForms[Kind].inputs / kUnit; ++u, ++x_group, a += 8 * MR) {
            for (int64_t line = 0; line < kForms[Kind].unit_words() * 4; line += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(unit) + kAhead + line, 0, 3);
            vf scale[kGroups][2], offset[kGroups][2];
            for (int64_t g = 0; g < kGroups; ++g)
                for (int j = 0; j < 2; ++j) {
                    const int8_t* own = bytes + (u * kGroups + g) * kPanel + j * kLanes;
                    scale[g][j] = kBytes ? whole[j] * vload_s8(own) : whole[j];
                    offset[g][j] =
                        kBytes && kOffsets ? least[j] * vload_s8(own + kForms[Kind].groups() * kPanel) : least[j];
                }
            add_record_group<Kind, 0>(total, run, x_group, a, unit, scale[0], offset[0]);
            if constexpr (kGroups == 2) add_record_group<Kind, 1>(total, run, x_group, a, unit, scale[1], offset[1]);
            unit += kForms[Kind].unit_words();
        }
    }
    SENSORIUM_UNROLL(8)
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < 2; ++j) vstore(c + i * kPanel + j * kLanes, total[i][j]);
}

using RecordTile = void (*)(const RecordRun& run, const uint32_t* a, float* c);

template <int Kind, int... I>
static RecordTile pick_record_tile(int rows, std::integer_sequence<int, I...>) {
    static constexpr RecordTile table[] = {record_tile<kRecordKinds[Kind], I + 1>...};
    return table[rows - 1];
}
// Null: this kind has none.
static inline RecordTile record_tile_for(int32_t kind, int rows) {
    constexpr auto sizes = std::make_integer_sequence<int, kRecordRows>{};
    return kind == kRecordKinds[0]   ? pick_record_tile<0>(rows, sizes)
           : kind == kRecordKinds[1] ? pick_record_tile<1>(rows, sizes)
           : kind == kRecordKinds[2] ? pick_record_tile<2>(rows, sizes)
           : kind == kRecordKinds[3] ? pick_record_tile<3>(rows, sizes)
                                     : nullptr;
}

// Some records at a time, so that those of a second tile of rows come out of L1.
static void multiply_records(const QuantizedRows& x, const Linear& w, const BlockSegment& segment,
                             const uint8_t* record, float* c) {
    const BlockForm& form = form_of(segment.kind);
    const int64_t units = w.k / kUnit, each = form.inputs / kUnit, records = w.k / form.inputs;
    const int64_t step = x.tiling.count == 1 ? records : std::max<int64_t>(1, kTogetherUnits / each);
    for (int64_t at = 0; at < records; at += step)
        for (int64_t i = 0; i < x.tiling.count; ++i) {
            const int64_t start = x.tiling.start(i), first = start * units + at * each;
            const int size = x.tiling.size(i);
            const RecordRun run{std::min(step, records - at),
                                units,
                                record + at * form.record_bytes(),
                                x.scale + first,
                                x.total + first,
                                x.sum + 2 * first};
            record_tile_for(segment.kind, size)(run, x.a + start * w.k / 4 + at * each * 8 * size, c + start * kPanel);
        }
}

// One panel against all rows of x; sums in `c` [rows, 32].
static void multiply_blocks(const QuantizedRows& x, const Linear& w, int64_t panel, float* c) {
    constexpr int64_t kAhead = 8192;
    const BlockSegment& segment = segment_of_panel(w, panel);
    const BlockForm& form = form_of(segment.kind);
    const uint8_t* record = panel_of(w, segment, panel - segment.first_panel);
    std::fill(c, c + x.tiling.rows * kPanel, 0.0f);
    if (x.tiling.rows <= 2 * kRecordRows && record_tile_for(segment.kind, 1))
        return multiply_records(x, w, segment, record, c);
    const int64_t units = w.k / kUnit, each = form.inputs / kUnit, groups = kUnit / form.group;
    const bool expands = form.bits < 8;
    const size_t word_bytes = size_t(kTogetherUnits * 8 * kPanel) * sizeof(uint32_t);
    const size_t scale_floats = size_t(kTogetherUnits * 2 * kPanel);
    char* memory =
        static_cast<char*>(Scratch<Buffer::kWeightPiece>::get(word_bytes + 2 * scale_floats * sizeof(float)));
    uint32_t* words = reinterpret_cast<uint32_t*>(memory);
    float *scales = reinterpret_cast<float*>(memory + word_bytes), *offsets = scales + scale_floats;
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
        UnitRun run{count,   expands ? 8 * kPanel : form.record_bytes() / int64_t(sizeof(uint32_t)),
                    units,   expands ? words : first,
                    scales,  form.offsets ? offsets : nullptr,
                    nullptr, nullptr,
                    nullptr, form.middle};
        for (int64_t i = 0; i < x.tiling.count; ++i) {
            const int64_t start = x.tiling.start(i);
            const int size = x.tiling.size(i);
            run.x_scale = x.scale + start * units + unit, run.x_total = x.total + start * units + unit;
            run.x_sum = x.sum + 2 * (start * units + unit);
            unit_tile_for(form, size)(run, x.a + start * w.k / 4 + unit * 8 * size, c + start * kPanel);
        }
    }
}

}  // namespace sensorium::SENSORIUM_ISA
