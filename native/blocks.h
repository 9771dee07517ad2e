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

enum BlockKind : int32_t {
    kQ4_0,
    kQ4_1,
    kQ5_0,
    kQ5_1,
    kQ8_0,
    kQ2K,
    kQ3K,
    kQ4K,
    kQ5K,
    kQ6K,
    kIq4Nl,
    kIq4Xs,
    kNf4,
    kFp4
};

constexpr int64_t kUnit = 32;  // inputs whose words lie together, and that share a scale of x

// The numbers of codes, plus 128: of IQ4; of bitsandbytes' nf4 times 112, which are nearest to whole then; of its fp4
// times 120, whole but for the least.
alignas(16) constexpr uint8_t kIq4Table[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr uint8_t kNf4Table[16] = {16,  50,  69,  84,  96,  107, 118, 128,
                                               137, 146, 156, 166, 177, 191, 209, 240};
alignas(16) constexpr uint8_t kFp4Table[16] = {128, 129, 208, 248, 168, 188, 148, 158,
                                               128, 127, 48,  8,   88,  68,  108, 98};

struct BlockForm {
    int64_t inputs, file_bytes;  // of a block of the file, and of a record
    int bits, group, middle;
    bool offsets;
    const uint8_t* table;

    constexpr bool has_bytes() const { return inputs > kUnit; }
    constexpr int64_t groups() const { return inputs / group; }
    constexpr int64_t kinds() const { return offsets ? 2 : 1; }
    constexpr int64_t head_bytes() const { return kinds() * kPanel * (2 + (has_bytes() ? groups() : 0)); }
    constexpr int64_t unit_words() const { return bits * kPanel; }
    constexpr int64_t record_bytes() const { return head_bytes() + inputs / kUnit * unit_words() * 4; }
    constexpr int64_t panel_bytes(int64_t k) const { return k / inputs * record_bytes(); }
};

constexpr BlockForm kForms[] = {
    {32, 18, 4, 32, 8, false, nullptr},        // Q4_0
    {32, 20, 4, 32, 0, true, nullptr},         // Q4_1
    {32, 22, 5, 32, 16, false, nullptr},       // Q5_0
    {32, 24, 5, 32, 0, true, nullptr},         // Q5_1
    {32, 34, 8, 32, 128, false, nullptr},      // Q8_0
    {256, 84, 4, 16, 0, true, nullptr},        // Q2_K
    {256, 110, 4, 16, 4, false, nullptr},      // Q3_K
    {256, 144, 4, 32, 0, true, nullptr},       // Q4_K
    {256, 176, 5, 32, 0, true, nullptr},       // Q5_K
    {256, 210, 6, 16, 32, false, nullptr},     // Q6_K
    {32, 18, 4, 32, 128, false, kIq4Table},    // IQ4_NL
    {256, 136, 4, 32, 128, false, kIq4Table},  // IQ4_XS
    {32, 18, 4, 32, 128, false, kNf4Table},    // NF4, of this project: the fields of IQ4_NL
    {32, 18, 4, 32, 128, false, kFp4Table},    // FP4, likewise
};
static inline const BlockForm& form_of(int32_t kind) { return kForms[kind]; }
constexpr int64_t kMostRecordBytes = kForms[kQ6K].record_bytes();

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

static inline int code_at(const BlockForm& form, const uint32_t* words, int64_t i) {
    if (form.bits == 8) return int(words[i / 4 * kPanel] >> (i % 4 * 8) & 255);
    const int code = int(words[i / 8 * kPanel] >> (i % 4 * 8 + i % 8 / 4 * 4) & 15);
    if (form.table) return form.table[code];
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

static void unpack_file_row(const BlockSegment& segment, int64_t row, int64_t k, bf16* out) {
    const BlockForm& form = form_of(segment.kind);
    const uint8_t* from = static_cast<const uint8_t* const*>(segment.data)[row];
    LooseBlock block;
    alignas(64) uint8_t record[kMostRecordBytes];
    for (int64_t at = 0; at < k; at += form.inputs, from += form.file_bytes) {
        take_block(segment.kind, from, block);
        put_block(form, block, 0, record);
        unpack_record(form, record, 0, out + at);
    }
}

static void unpack_blocks(const Linear& w, const int64_t* ids, int64_t count, bf16* out) {
    for (int64_t i = 0; i < count; ++i) {
        const BlockSegment& segment = segment_of_row(w, ids[i]);
        const BlockForm& form = form_of(segment.kind);
        const int64_t row = ids[i] - segment.first_row;
        if (segment.in_file) {
            unpack_file_row(segment, row, w.k, out + i * w.k);
            continue;
        }
        const uint8_t* record = panel_of(w, segment, row / kPanel);
        for (int64_t at = 0; at < w.k; at += form.inputs, record += form.record_bytes())
            unpack_record(form, record, row % kPanel, out + i * w.k + at);
    }
}

}  // namespace sensorium::SENSORIUM_ISA
