// Products with weights in blocks, packed or as a mapped file has them.
#pragma once

#include <algorithm>
#include <optional>

#include "blocks.h"
#include "gather.h"
#include "quantized.h"

namespace sensorium::SENSORIUM_ISA {

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
static inline void decode_word(const uint32_t* unit, const uint8_t* table, vquad& first, vquad& second) {
    const vquad both = qload(unit + W * kPanel);
    first = qlow(both), second = qhigh(both);
    if constexpr (Table) first = qlookup(first, table), second = qlookup(second, table);
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
static inline void expand_unit(const uint32_t* from, const uint8_t* table, uint32_t* out) {
    SENSORIUM_UNROLL(2)
    for (int j = 0; j < kPanel; j += kLanes) {
        vquad first, second;
        decode_word<Bits, Table, W>(from + j, table, first, second);
        qstore(out + 2 * W * kPanel + j, first);
        qstore(out + (2 * W + 1) * kPanel + j, second);
    }
    if constexpr (W < 3) expand_unit<Bits, Table, W + 1>(from, table, out);
}

static inline void expand_codes_of(const BlockForm& form, const uint32_t* from, uint32_t* out) {
    if (form.table)
        expand_unit<4, true>(from, form.table, out);
    else if (form.bits == 4)
        expand_unit<4, false>(from, nullptr, out);
    else if (form.bits == 5)
        expand_unit<5, false>(from, nullptr, out);
    else
        expand_unit<6, false>(from, nullptr, out);
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

constexpr int32_t kRecordKinds[] = {kQ8_0, kQ4K, kQ5K, kQ6K, kQ4_0, kIq4Xs, kIq4Nl};

struct RecordRun {
    int64_t records, groups_of_x;
    const uint8_t* record;
    const float *x_scale, *x_total;  // see UnitRun
    const int32_t* x_sum;
    const uint8_t* table;  // of the kind's codes, or null
    int64_t ahead;  // by how many bytes records are asked for before they are multiplied; less than 0: not at all
};

// The words W to End - 1 of a unit, or where codes are bytes all.
template <int Bits, bool Table, int W, int End, int MR>
static inline void add_unit_words(vi (&sum)[MR][2], const uint32_t* a, const uint32_t* unit, const uint8_t* table) {
    if constexpr (Bits == 8) {
        for (int q = 0; q < 8; ++q, a += MR, unit += kPanel) {
            const vquad w[2] = {qload(unit), qload(unit + kLanes)};
            add_quads<false>(sum, a, w);
        }
    } else {
        vquad first[2], second[2];
        for (int j = 0; j < 2; ++j) decode_word<Bits, Table, W>(unit + j * kLanes, table, first[j], second[j]);
        add_quads<!Table>(sum, a + 2 * W * MR, first);
        add_quads<!Table>(sum, a + (2 * W + 1) * MR, second);
        if constexpr (W + 1 < End) add_unit_words<Bits, Table, W + 1, End>(sum, a, unit, table);
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
    constexpr bool kTable = kForms[Kind].table != nullptr;
    add_unit_words<kForms[Kind].bits, kTable, G * kWords, (G + 1) * kWords>(sum, a, unit, run.table);
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

// The sums are those of unit_tile, to the last bit.
template <int Kind, int MR>
static void record_tile(const RecordRun& run, const uint32_t* a, float* c) {
    constexpr bool kOffsets = kForms[Kind].offsets, kBytes = kForms[Kind].has_bytes();
    constexpr int64_t kGroups = kUnit / kForms[Kind].group;
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
        for (int64_t line = 0; run.ahead >= 0 && line < kForms[Kind].head_bytes(); line += 64)
            __builtin_prefetch(record + run.ahead + line, 0, 3);
        vf whole[2], least[2];
        for (int j = 0; j < 2; ++j) {
            whole[j] = vload_f16(halves + j * kLanes);
            least[j] = kOffsets ? vload_f16(halves + kPanel + j * kLanes) : vzero();
        }
        for (int64_t u = 0; u < kForms[Kind].inputs / kUnit; ++u, ++x_group, a += 8 * MR) {
            for (int64_t line = 0; run.ahead >= 0 && line < kForms[Kind].unit_words() * 4; line += 64)
                __builtin_prefetch(reinterpret_cast<const char*>(unit) + run.ahead + line, 0, 3);
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
#if !defined(SENSORIUM_AVX2) && !defined(SENSORIUM_AVX512)
    return (void)kind, (void)rows, nullptr;
#else
    if (kind == kNf4 || kind == kFp4) kind = kIq4Nl;  // but for their tables the same
    constexpr auto sizes = std::make_integer_sequence<int, kRecordRows>{};
    return kind == kRecordKinds[0]   ? pick_record_tile<0>(rows, sizes)
           : kind == kRecordKinds[1] ? pick_record_tile<1>(rows, sizes)
           : kind == kRecordKinds[2] ? pick_record_tile<2>(rows, sizes)
           : kind == kRecordKinds[3] ? pick_record_tile<3>(rows, sizes)
           : kind == kRecordKinds[4] ? pick_record_tile<4>(rows, sizes)
           : kind == kRecordKinds[5] ? pick_record_tile<5>(rows, sizes)
           : kind == kRecordKinds[6] ? pick_record_tile<6>(rows, sizes)
                                     : nullptr;
#endif
}

// Where a panel's records come from: they lie packed, or are made of the file's blocks, some at a time.
struct RecordSource {
    const BlockSegment& segment;
    const uint8_t* packed;
    std::optional<PanelBlocks> rows;

    RecordSource(const Linear& w, int64_t panel) : segment(segment_of_panel(w, panel)), packed(nullptr) {
        const int64_t own = panel - segment.first_panel;
        if (segment.in_file)
            rows.emplace(segment, own, w.k / form_of(segment.kind).inputs * form_of(segment.kind).file_bytes);
        else
            packed = panel_of(w, segment, own);
    }
    // The records `first` to `first + count - 1`; `memory` may become them.
    const uint8_t* take(int64_t first, int64_t count, uint8_t* memory) {
        if (!rows) return packed + first * form_of(segment.kind).record_bytes();
        gather_records(segment.kind, *rows, first, count, memory);
        return memory;
    }
};

// Some records at a time, so that those of a second tile of rows come out of L1.
static void multiply_records(const QuantizedRows& x, const Linear& w, RecordSource& source, uint8_t* memory, float* c) {
    const int32_t kind = source.segment.kind;
    const BlockForm& form = form_of(kind);
    const int64_t units = w.k / kUnit, each = form.inputs / kUnit, records = w.k / form.inputs;
    const int64_t step = x.tiling.count == 1 && source.packed ? records : std::max<int64_t>(1, kTogetherUnits / each);
    for (int64_t at = 0; at < records; at += step) {
        const int64_t count = std::min(step, records - at);
        const uint8_t* record = source.take(at, count, memory);
        for (int64_t i = 0; i < x.tiling.count; ++i) {
            const int64_t start = x.tiling.start(i), first = start * units + at * each;
            const int size = x.tiling.size(i);
            const int64_t ahead = !source.packed ? -1 : size <= 2 ? kFewRowsAhead : 8192;
            const RecordRun run{count,      units, record, x.scale + first, x.total + first, x.sum + 2 * first,
                                form.table, ahead};
            record_tile_for(kind, size)(run, x.a + start * w.k / 4 + at * each * 8 * size, c + start * kPanel);
        }
    }
}

// One panel against all rows of x; sums in `c` [rows, 32].
static void multiply_blocks(const QuantizedRows& x, const Linear& w, int64_t panel, float* c) {
    RecordSource source(w, panel);
    const BlockForm& form = form_of(source.segment.kind);
    std::fill(c, c + x.tiling.rows * kPanel, 0.0f);
    const size_t record_room = size_t(kTogetherUnits * kForms[kQ8_0].record_bytes());
    uint8_t* room = static_cast<uint8_t*>(Scratch<Buffer::kRecords>::get(record_room));
    if (x.tiling.rows <= 2 * kRecordRows && record_tile_for(source.segment.kind, 1))
        return multiply_records(x, w, source, room, c);
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
        const uint8_t* record = source.take(unit / each, count / each, room);
        const uint32_t* first = reinterpret_cast<const uint32_t*>(record + form.head_bytes());
        for (int64_t u = 0; u < count; u += each, record += form.record_bytes()) {
            expand_scales(form, record, 0, scales + u * groups * kPanel);
            if (form.offsets) expand_scales(form, record, 1, offsets + u * groups * kPanel);
            const uint32_t* from = reinterpret_cast<const uint32_t*>(record + form.head_bytes());
            for (int64_t i = u; expands && i < u + each; ++i, from += form.unit_words())
                expand_codes_of(form, from, words + i * 8 * kPanel);
        }
        UnitRun run{count,   expands ? 8 * kPanel : form.record_bytes() / int64_t(sizeof(uint32_t)),
                    units,   expands ? words : first,
                    scales,  form.offsets ? offsets : nullptr,
                    nullptr, nullptr,
                    nullptr, form.middle};
        // The records that come next, some lines with each tile: asked for at once they are waited for.
        const uint8_t* ahead = record;
        const int64_t bytes = source.packed ? count / each * form.record_bytes() : 0;
        const uint8_t* const end = ahead + bytes;
        const int64_t share = ceil_div(bytes, 64 * x.tiling.count);
        for (int64_t i = 0, start = 0, next; i < x.tiling.count; ++i, start = next) {
            next = x.tiling.start(i + 1);
            const int size = int(next - start);
            for (int64_t line = 0; line < share && ahead < end; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 3);
            run.x_scale = x.scale + start * units + unit, run.x_total = x.total + start * units + unit;
            run.x_sum = x.sum + 2 * (start * units + unit);
            unit_tile_for(form, size)(run, x.a + start * w.k / 4 + unit * 8 * size, c + start * kPanel);
        }
    }
}

}  // namespace sensorium::SENSORIUM_ISA
