// Blocks that lie in a mapped file, row by row: a panel's records (see blocks.h) are made of them while they are
// multiplied, so that nothing is copied when a model is loaded.
#pragma once

#include "blocks.h"

namespace sensorium::SENSORIUM_ISA {

// The blocks of a panel's rows, of whom the last stands for those that are not there, and of the next panel's.
struct PanelBlocks {
    const uint8_t* at[kPanel];
    const uint8_t *ahead, *end;  // what is not asked for yet of the next panel

    // Rows from `first` on, at their distance.
    PanelBlocks(const uint8_t* first, int64_t stride, int64_t rows) : ahead(nullptr), end(nullptr) {
        for (int64_t i = 0; i < kPanel; ++i) at[i] = first + std::min(i, rows - 1) * stride;
    }
    PanelBlocks(const BlockSegment& segment, int64_t panel, int64_t row_bytes) {
        const uint8_t* const* rows = static_cast<const uint8_t* const*>(segment.data);
        for (int64_t i = 0; i < kPanel; ++i) at[i] = rows[std::min(panel * kPanel + i, segment.rows - 1)];
        const int64_t next = (panel + 1) * kPanel, count = std::min<int64_t>(kPanel, segment.rows - next);
        ahead = count > 0 ? rows[next] : nullptr;
        end = ahead + (count > 0 ? count * row_bytes : 0);
    }
    // Asks for some more lines, from first to last, as the memory is fastest.
    void fetch() {
        constexpr int kLines = 18;  // of the 1 KB that 16 rows of words are, and what is beside them
        for (int i = 0; i < kLines && ahead < end; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    }
};

// One block of each row at `offset` -> a record.
static inline void gather_loose(int32_t kind, const PanelBlocks& rows, int64_t offset, uint8_t* record) {
    LooseBlock block;
    for (int64_t i = 0; i < kPanel; ++i) {
        take_block(kind, rows.at[i] + offset, block);
        put_block(form_of(kind), block, i, record);
    }
}

#if defined(SENSORIUM_AVX512)

static inline void put(void* to, __m512i words) { _mm512_storeu_si512(to, words); }

// 64 bytes of 16 rows at `offset` -> words, a vector of 16 columns each.
static inline void take_words(PanelBlocks& panel, const uint8_t* const* rows, int64_t offset, __m512i (&words)[16]) {
    panel.fetch();
    for (int i = 0; i < 16; ++i) words[i] = _mm512_loadu_si512(rows[i] + offset);
    transpose16(words);
}

// 16 bytes of 16 rows at `offset` -> four words.
static inline void take_head(const uint8_t* const* rows, int64_t offset, __m512i (&words)[4]) {
    __m512i z[4];
    for (int i = 0; i < 4; ++i) {
        const auto row = [&](int j) { return _mm_loadu_si128((const __m128i*)(rows[4 * j + i] + offset)); };
        z[i] = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(1), 1);
        z[i] = _mm512_inserti32x4(_mm512_inserti32x4(z[i], row(2), 2), row(3), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(z[0], z[1]), b = _mm512_unpackhi_epi32(z[0], z[1]);
    const __m512i c = _mm512_unpacklo_epi32(z[2], z[3]), d = _mm512_unpackhi_epi32(z[2], z[3]);
    words[0] = _mm512_unpacklo_epi64(a, c), words[1] = _mm512_unpackhi_epi64(a, c);
    words[2] = _mm512_unpacklo_epi64(b, d), words[3] = _mm512_unpackhi_epi64(b, d);
}

// Bytes of words -> [4][32] bytes, of which 16 columns are written.
static inline void put_bytes(__m512i words, int8_t* to) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_permutexvar_epi32(lanes, _mm512_shuffle_epi8(words, order));
    _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(bytes));
    _mm_storeu_si128((__m128i*)(to + kPanel), _mm512_extracti32x4_epi32(bytes, 1));
    _mm_storeu_si128((__m128i*)(to + 2 * kPanel), _mm512_extracti32x4_epi32(bytes, 2));
    _mm_storeu_si128((__m128i*)(to + 3 * kPanel), _mm512_extracti32x4_epi32(bytes, 3));
}

static inline void put_halves(__m512i words, uint16_t* to) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(words));
}

// 16 columns' float16 at `offset`.
static inline void copy_halves(const uint8_t* const* rows, int64_t offset, uint16_t* to) {
    for (int i = 0; i < 16; ++i) to[i] = load16(rows[i] + offset);
}

// Of every field of 2 * Shift bits the upper half of `a` and the lower one of `b` change places.
template <int Shift>
static inline void swap_fields(__m512i& a, __m512i& b) {
    const __m512i mask = _mm512_set1_epi8(Shift == 1 ? 0x55 : Shift == 2 ? 0x33 : 0x0f);
    const __m512i low = _mm512_ternarylogic_epi32(mask, a, _mm512_slli_epi32(b, Shift), 0xca);
    b = _mm512_ternarylogic_epi32(mask, _mm512_srli_epi32(a, Shift), b, 0xca);
    a = low;
}

// Eight words, of which the low nibbles are a unit's codes and the high ones another's.
static inline void put_nibbles(const __m512i* both, uint32_t* low, uint32_t* high) {
    for (int w = 0; w < 4; ++w) {
        __m512i first = both[2 * w], second = both[2 * w + 1];
        swap_fields<4>(first, second);
        put(low + w * kPanel, first), put(high + w * kPanel, second);
    }
}

// The first 16 bytes of Q4_K and Q5_K, see take_k_scales.
static inline void put_k_scales(const uint8_t* const* rows, int64_t offset, int64_t column, uint8_t* record) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(record) + column;
    int8_t* bytes = reinterpret_cast<int8_t*>(record + 4 * kPanel) + column;
    __m512i head[4];
    take_head(rows, offset, head);
    put_halves(head[0], halves), put_halves(_mm512_srli_epi32(head[0], 16), halves + kPanel);
    const __m512i six = _mm512_set1_epi8(63), four = _mm512_set1_epi8(15), upper = _mm512_set1_epi8(0x30);
    const auto with_upper = [&](__m512i low, __m512i first) {  // low | (first >> 2 & 0x30)
        return _mm512_ternarylogic_epi32(low, _mm512_srli_epi32(first, 2), upper, 0xf8);
    };
    const __m512i zero = _mm512_setzero_si512(), mixed = head[3];
    put_bytes(_mm512_and_si512(head[1], six), bytes);
    put_bytes(with_upper(_mm512_and_si512(mixed, four), head[1]), bytes + 4 * kPanel);
    const __m512i least = with_upper(_mm512_and_si512(_mm512_srli_epi32(mixed, 4), four), head[2]);
    put_bytes(_mm512_sub_epi8(zero, _mm512_and_si512(head[2], six)), bytes + 8 * kPanel);
    put_bytes(_mm512_sub_epi8(zero, least), bytes + 12 * kPanel);
}

static inline void gather_q4k(PanelBlocks& panel, const uint8_t* const* rows, int64_t offset, int64_t column,
                              uint8_t* record) {
    constexpr BlockForm form = kForms[kQ4K];
    put_k_scales(rows, offset, column, record);
    uint32_t* words = reinterpret_cast<uint32_t*>(record + form.head_bytes()) + column;
    __m512i both[16];
    for (int half = 0; half < 2; ++half)  // of the block's runs of 32 bytes
    {
        take_words(panel, rows, offset + 16 + 64 * half, both);
        for (int run = 0; run < 2; ++run, words += 2 * form.unit_words())
            put_nibbles(both + 8 * run, words, words + form.unit_words());
    }
}

static inline void gather_q5k(PanelBlocks& panel, const uint8_t* const* rows, int64_t offset, int64_t column,
                              uint8_t* record) {
    constexpr BlockForm form = kForms[kQ5K];
    put_k_scales(rows, offset, column, record);
    uint32_t* words = reinterpret_cast<uint32_t*>(record + form.head_bytes()) + column;
    const auto put_run = [&](int run, const __m512i* both) {
        uint32_t* low = words + 2 * run * form.unit_words();
        put_nibbles(both, low, low + form.unit_words());
    };
    __m512i both[16];
    take_words(panel, rows, offset + 16, both);  // the fifth bits, and a run
    put_run(0, both + 8);
    for (int i = 0; i < 8; i += 2) swap_fields<1>(both[i], both[i + 1]);
    for (int i = 0; i < 8; i += 4) swap_fields<2>(both[i], both[i + 2]), swap_fields<2>(both[i + 1], both[i + 3]);
    for (int i = 0; i < 4; ++i) swap_fields<4>(both[i], both[i + 4]);
    for (int unit = 0; unit < 8; ++unit) put(words + unit * form.unit_words() + 4 * kPanel, both[unit]);
    take_words(panel, rows, offset + 80, both);
    put_run(1, both), put_run(2, both + 8);
    take_words(panel, rows, offset + 112, both);
    put_run(3, both + 8);
}

static inline void gather_q6k(PanelBlocks& panel, const uint8_t* const* rows, int64_t offset, int64_t column,
                              uint8_t* record) {
    constexpr BlockForm form = kForms[kQ6K];
    copy_halves(rows, offset + 208, reinterpret_cast<uint16_t*>(record) + column);
    __m512i head[4], both[16];
    take_head(rows, offset + 192, head);
    for (int i = 0; i < 4; ++i)
        put_bytes(head[i], reinterpret_cast<int8_t*>(record + 2 * kPanel) + 4 * i * kPanel + column);
    uint32_t* words = reinterpret_cast<uint32_t*>(record + form.head_bytes()) + column;
    const auto unit = [&](int i) { return words + i * form.unit_words(); };
    for (int half = 0; half < 2; ++half) {
        take_words(panel, rows, offset + 64 * half, both);
        put_nibbles(both, unit(4 * half), unit(4 * half + 2));
        put_nibbles(both + 8, unit(4 * half + 1), unit(4 * half + 3));
    }
    take_words(panel, rows, offset + 128, both);
    for (int i = 0; i < 16; i += 4) {
        swap_fields<2>(both[i], both[i + 1]), swap_fields<2>(both[i + 2], both[i + 3]);
        swap_fields<4>(both[i], both[i + 2]), swap_fields<4>(both[i + 1], both[i + 3]);
        for (int part = 0; part < 4; ++part) put(unit(i / 8 * 4 + part) + (4 + i / 4 % 2) * kPanel, both[i + part]);
    }
}

// Two blocks or one.
static inline void gather_q8_0(const uint8_t* const* rows, int64_t offset, int64_t count, int64_t column,
                               uint8_t* record) {
    constexpr BlockForm form = kForms[kQ8_0];
    __m512i codes[16];
    for (int i = 0; i < 16; ++i) {
        const uint8_t* from = rows[i] + offset + 2;
        const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
        codes[i] = count < 2
                       ? first
                       : _mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i*)(from + form.file_bytes)), 1);
    }
    transpose16(codes);
    for (int64_t one = 0; one < count; ++one, record += form.record_bytes()) {
        copy_halves(rows, offset + one * form.file_bytes, reinterpret_cast<uint16_t*>(record) + column);
        uint32_t* words = reinterpret_cast<uint32_t*>(record + form.head_bytes()) + column;
        for (int q = 0; q < 8; ++q)
            put(words + q * kPanel, _mm512_xor_si512(codes[8 * one + q], _mm512_set1_epi8(-128)));
    }
}

// Four words of nibbles in the order of a block of 32 -> a unit's words.
static inline void put_block_nibbles(__m512i* both, uint32_t* words) {
    swap_fields<4>(both[0], both[1]), swap_fields<4>(both[2], both[3]);
    put(words, both[0]), put(words + kPanel, both[2]);
    put(words + 2 * kPanel, both[1]), put(words + 3 * kPanel, both[3]);
}

// And of every kind that has its fields.
static inline void gather_q4_0(const uint8_t* const* rows, int64_t offset, int64_t column, uint8_t* record) {
    constexpr BlockForm form = kForms[kQ4_0];
    copy_halves(rows, offset, reinterpret_cast<uint16_t*>(record) + column);
    __m512i both[4];
    take_head(rows, offset + 2, both);
    put_block_nibbles(both, reinterpret_cast<uint32_t*>(record + form.head_bytes()) + column);
}

static inline void gather_iq4xs(PanelBlocks& panel, const uint8_t* const* rows, int64_t offset, int64_t column,
                                uint8_t* record) {
    constexpr BlockForm form = kForms[kIq4Xs];
    int8_t* bytes = reinterpret_cast<int8_t*>(record + 2 * kPanel) + column;
    __m512i head[4], both[16];
    take_head(rows, offset, head);
    put_halves(head[0], reinterpret_cast<uint16_t*>(record) + column);
    // Fields of 2 * Shift bits, each of which gets twice as many.
    const auto spread = [](__m512i x, unsigned shift, int mask) {
        return _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi32(x, shift)), _mm512_set1_epi32(mask));
    };
    for (int part = 0; part < 2; ++part) {
        const __m512i sixteen = _mm512_srli_epi32(_mm512_slli_epi32(head[1], 16 - 16 * unsigned(part)), 16);
        const __m512i eight = _mm512_srli_epi32(_mm512_slli_epi32(head[0], 8 - 8 * unsigned(part)), 24);
        const __m512i low = spread(spread(sixteen, 8, 0x00ff00ff), 4, 0x0f0f0f0f);
        const __m512i high = spread(spread(eight, 12, 0x000f000f), 6, 0x03030303);
        const __m512i scales = _mm512_or_si512(low, _mm512_slli_epi32(high, 4));
        put_bytes(_mm512_sub_epi8(scales, _mm512_set1_epi8(32)), bytes + 4 * part * kPanel);
    }
    uint32_t* words = reinterpret_cast<uint32_t*>(record + form.head_bytes()) + column;
    for (int unit = 0; unit < 8; ++unit, words += form.unit_words()) {
        if (unit % 4 == 0) take_words(panel, rows, offset + 8 + 16 * unit, both);
        put_block_nibbles(both + unit % 4 * 4, words);
    }
}

#endif

// The blocks `first` to `first + count - 1` of every row -> as many records.
static inline void gather_records(int32_t kind, PanelBlocks& rows, int64_t first, int64_t count, uint8_t* records) {
    const BlockForm& form = form_of(kind);
    for (int64_t i = 0; i < count; ++i, records += form.record_bytes()) {
        const int64_t offset = (first + i) * form.file_bytes;
#if defined(SENSORIUM_AVX512)
        if (kind == kQ8_0 && i % 2) continue;
        bool done = true;
        for (int64_t column = 0; column < kPanel; column += kLanes) {
            const uint8_t* const* own = rows.at + column;
            if (form.inputs == kUnit && (kind == kQ8_0 || i % 4 == 0)) rows.fetch();
            switch (kind) {
                case kQ4K:
                    gather_q4k(rows, own, offset, column, records);
                    break;
                case kQ5K:
                    gather_q5k(rows, own, offset, column, records);
                    break;
                case kQ6K:
                    gather_q6k(rows, own, offset, column, records);
                    break;
                case kQ8_0:
                    gather_q8_0(own, offset, std::min<int64_t>(2, count - i), column, records);
                    break;
                case kIq4Xs:
                    gather_iq4xs(rows, own, offset, column, records);
                    break;
                case kQ4_0:
                case kIq4Nl:
                case kNf4:
                case kFp4:
                    gather_q4_0(own, offset, column, records);
                    break;
                default:
                    done = false;
            }
        }
        if (done) continue;
#endif
        gather_loose(kind, rows, offset, records);
    }
}

// Rows of the file's blocks, all of one segment. Columns beyond a segment's last are its last row, or zero already.
static void pack_blocks(const Runtime& runtime, const Linear& w, const uint8_t* blocks, int64_t stride, int64_t rows,
                        int64_t row_start) {
    const BlockSegment& segment = segment_of_row(w, row_start);
    const BlockForm& form = form_of(segment.kind);
    const int64_t begin = row_start - segment.first_row, end = begin + rows, first_panel = begin / kPanel;
    const int64_t records = w.k / form.inputs;
    const auto pack = [&](int64_t task) {
        const int64_t panel = first_panel + task;
        uint8_t* record = const_cast<uint8_t*>(panel_of(w, segment, panel));
        const int64_t first = std::max(panel * kPanel, begin), last = std::min((panel + 1) * kPanel, end);
        const uint8_t* from = blocks + (first - begin) * stride;
        if (first == panel * kPanel && (last - first == kPanel || last == segment.rows)) {
            PanelBlocks own(from, stride, last - first);
            gather_records(segment.kind, own, 0, records, record);
            return;
        }
        LooseBlock block;
        for (int64_t at = 0; at < records; ++at, record += form.record_bytes())
            for (int64_t row = first; row < last; ++row) {
                take_block(segment.kind, from + (row - first) * stride + at * form.file_bytes, block);
                put_block(form, block, row - panel * kPanel, record);
            }
    };
    with_team(runtime, rows * w.k > 1 << 16,
              [&](const Runtime& team) { parallel_for(team, ceil_div(end, kPanel) - first_panel, pack); });
}

}  // namespace sensorium::SENSORIUM_ISA
