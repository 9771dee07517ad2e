// bf16 weights in 12 bits, without loss. Trained weights use few exponents: of the 256 high bytes (sign and all but the
// last bit of the exponent) sixteen make up nearly all of a panel, so four bits tell which, the low byte stays as it
// is, and the few weights with another high byte are listed. (That exponents carry little information: "70% Size, 100%
// Accuracy: Lossless LLM Compression ... (DFloat11)", arXiv 2504.11651, which codes them in variable length; a fixed
// length is expanded at the memory's pace.)
//
// A panel of 32 output columns: 64 bytes of head, the first 16 of them the high bytes that the codes stand for, then
// 192 for every two pairs of k: 64 of codes, low nibbles for the first pair, high nibbles for the second, then 64 of
// low bytes for either. A pair's 64 weights are ordered so that interleaving the bytes of each half of every 16 gives
// them in the order of panels.h. Exceptions: int64 [panels + 1] where each panel's start, in the same array; each is
// place << 16 | bf16, places counted in bf16 from the start of the expanded panel and ascending.
#pragma once

#include <algorithm>

#include "panels.h"

namespace sensorium::SENSORIUM_ISA {

constexpr int64_t kHeadBytes = 64, kTwoPairsBytes = 192, kPairWeights = 2 * kPanel;

static inline int64_t compact_panel_bytes(int64_t k) { return kHeadBytes + ceil_div(k, 4) * kTwoPairsBytes; }

// The place of word i of a pair's 64 among its 64 bytes.
static inline int compact_place(int i) { return i % 32 / 8 * 16 + i / 32 * 8 + i % 8; }

static inline bf16 compact_word(const uint8_t* head, const uint8_t* from, int pair, int place) {
    const int code = (from[place] >> (pair * 4)) & 15;
    return bf16(head[code] << 8 | from[64 * (pair + 1) + place]);
}

#if defined(SENSORIUM_AVX512)
// Takes two pairs apart: `pair` 0 or 1 gives its columns 0 to 15 and 16 to 31.
struct Expander {
    __m512i table;
    explicit Expander(const uint8_t* head) : table(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)head))) {}
    void operator()(const uint8_t* from, int pair, __m512i out[2]) const {
        const __m512i both = _mm512_load_si512(from), low = _mm512_load_si512(from + 64 * (pair + 1));
        const __m512i code = _mm512_and_si512(pair ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
        const __m512i high = _mm512_shuffle_epi8(table, code);
        out[0] = _mm512_unpacklo_epi8(low, high), out[1] = _mm512_unpackhi_epi8(low, high);
    }
};
#endif

// Two pairs -> 128 words.
static inline void expand_two_pairs(const uint8_t* head, const uint8_t* from, bf16* out) {
#if defined(SENSORIUM_AVX512)
    const Expander expand(head);
    for (int pair = 0; pair < 2; ++pair) {
        __m512i words[2];
        expand(from, pair, words);
        _mm512_store_si512(out + 64 * pair, words[0]);
        _mm512_store_si512(out + 64 * pair + 32, words[1]);
    }
#else
    for (int i = 0; i < 128; ++i) out[i] = compact_word(head, from, i / 64, compact_place(i % 64));
#endif
}

// 128 words -> two pairs. Calls other(i, word) for words whose high byte is not among the sixteen; they get code 0.
template <class Other>
static inline void compact_two_pairs(const uint8_t* head, const bf16* words, uint8_t* to, const Other& other) {
    alignas(64) uint8_t high[128], low[128], code[128];
    for (int i = 0; i < 128; ++i) high[i] = uint8_t(words[i] >> 8), low[i] = uint8_t(words[i]), code[i] = 16;
    for (int j = 0; j < 16; ++j)
        for (int i = 0; i < 128; ++i) code[i] = high[i] == head[j] ? uint8_t(j) : code[i];
    uint8_t any = 0;
    for (int i = 0; i < 128; ++i) any |= code[i];
    if (any & 16)
        for (int i = 0; i < 128; ++i)
            if (code[i] == 16) {
                other(i, words[i]);
                code[i] = 0;
            }
    for (int i = 0; i < 64; i += 8) {  // eight neighbours stay neighbours
        const int place = compact_place(i);
        for (int j = 0; j < 8; ++j) to[place + j] = uint8_t(code[i + j] | code[64 + i + j] << 4);
        std::memcpy(to + 64 + place, low + i, 8);
        std::memcpy(to + 128 + place, low + 64 + i, 8);
    }
}

// The sixteen high bytes that are most frequent. Neighbours are counted apart: often they are alike, and would wait for
// each other.
static inline void choose_high_bytes(const bf16* words, int64_t count, uint8_t* head) {
    int32_t seen[4][256] = {};
    for (int64_t i = 0; i < count; i += 4)
        for (int j = 0; j < 4; ++j) ++seen[j][words[i + j] >> 8];
    for (int e = 0; e < 256; ++e) seen[0][e] += seen[1][e] + seen[2][e] + seen[3][e];
    for (int j = 0; j < 16; ++j) {
        const int best = int(std::max_element(seen[0], seen[0] + 256) - seen[0]);
        head[j] = uint8_t(best);
        seen[0][best] = -1;
    }
}

// Copies memory-mapped rows to `to`, in panels of compact_panel_bytes(k). `exceptions` has room for `room` of
// each panel, counts[panel] says how many there are; -1: too many, the panel is not usable.
static void compact(const Runtime& runtime, const Linear& rows, uint8_t* to, int64_t room, int64_t* exceptions,
                    int64_t* counts) {
    const int64_t pairs = ceil_div(rows.k, 2), even = ceil_div(pairs, 2) * 2, bytes = compact_panel_bytes(rows.k);
    with_team(runtime, true, [&](const Runtime& team) {
        parallel_for(team, ceil_div(rows.n, kPanel), [&](int64_t panel) {
            bf16* words =
                static_cast<bf16*>(Scratch<Buffer::kWeightPiece>::get(size_t(even * kPairWeights) * sizeof(bf16)));
            pack_piece<false>(PanelRows(rows, panel), 2, rows.k, 0, pairs, reinterpret_cast<uint32_t*>(words));
            uint8_t* const head = to + panel * bytes;
            std::memset(head, 0, kHeadBytes);
            choose_high_bytes(words, pairs * kPairWeights, head);
            std::fill(words + pairs * kPairWeights, words + even * kPairWeights, bf16(head[0] << 8));  // not read
            int64_t count = 0;
            for (int64_t p = 0; p < even; p += 2)
                compact_two_pairs(head, words + p * kPairWeights, head + kHeadBytes + p / 2 * kTwoPairsBytes,
                                  [&](int i, bf16 word) {
                                      if (count < room)
                                          exceptions[panel * room + count] = (p * kPairWeights + i) << 16 | word;
                                      ++count;
                                  });
            counts[panel] = count > room ? -1 : count;
        });
    });
}

// A panel that is expanded from its first pair to its last, some at a time.
struct CompactPanel {
    alignas(64) uint8_t head[kHeadBytes];
    const uint8_t* at;
    const int64_t *exception, *last;
    int64_t first = 0;  // word that comes next

    CompactPanel(const Linear& w, int64_t panel)
        : at(static_cast<const uint8_t*>(w.weight) + panel * compact_panel_bytes(w.k)) {
        const int64_t* list = static_cast<const int64_t*>(w.scales);
        exception = list + list[panel], last = list + list[panel + 1];
        std::memcpy(head, at, sizeof head);
        at += kHeadBytes;
    }
    // The word of the next exception, or none.
    int64_t exception_at() const { return exception < last ? *exception >> 16 : INT64_MAX; }
    // An even number of pairs unless they are the last; `out` has room for an even one.
    void next(int64_t count, uint32_t* out) {
        bf16* words = reinterpret_cast<bf16*>(out);
        for (int64_t p = 0; p < count; p += 2, at += kTwoPairsBytes)
            expand_two_pairs(head, at, words + p * kPairWeights);
        for (; exception_at() < first + count * kPairWeights; ++exception)
            words[exception_at() - first] = bf16(*exception);
        first += count * kPairWeights;
    }
};

// The first tile of rows is multiplied with weights as they are expanded, and keeps them in `words` if there are
// others.
#if defined(SENSORIUM_AVX512)
template <int MR, bool Keep>
static void compact_tile(CompactPanel& source, const PairWord* a, int64_t pairs, uint32_t* words, float* c,
                         bool accumulate) {
    // The more there is to do per byte, the further ahead memory has to be asked; `Keep`: other tiles do that.
    constexpr int64_t kAhead = Keep ? 4096 : MR <= 4 ? 8192 : 16384;
    const Expander expand(source.head);
    vf sum[MR][2];
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < 2; ++j) sum[i][j] = accumulate ? vload(c + i * kPanel + j * kLanes) : vzero();
    const auto add = [&](__m512i first, __m512i second) {
        if (Keep) {
            _mm512_store_si512(words, first);
            _mm512_store_si512(words + kLanes, second);
            words += kPanel;
        }
        const vpair w[2] = {pairs_of(first), pairs_of(second)};
        for (int i = 0; i < MR; ++i) {
            const auto x = pbroadcast(a[i]);
            for (int j = 0; j < 2; ++j) sum[i][j] = dot_pair(sum[i][j], w[j], x);
        }
        a += MR;
    };
    const int64_t end = source.first + pairs * kPairWeights;
    while (true) {
        const int64_t until = std::min(source.exception_at(), end);
        const uint8_t* from = source.at;
        for (; source.first + 2 * kPairWeights <= until; source.first += 2 * kPairWeights, from += kTwoPairsBytes) {
            for (int line = 0; line < 3; ++line) __builtin_prefetch(from + kAhead + 64 * line, 0, 3);
            __m512i expanded[2];
            expand(from, 0, expanded);
            add(expanded[0], expanded[1]);
            expand(from, 1, expanded);
            add(expanded[0], expanded[1]);
        }
        source.at = from;
        if (source.first >= end) break;
        alignas(64) uint32_t some[2 * kPanel];  // two pairs with an exception, or the last one alone
        const int64_t count = std::min<int64_t>(2, (end - source.first) / kPairWeights);
        source.next(count, some);
        for (int64_t p = 0; p < count; ++p)
            add(_mm512_load_si512(some + p * kPanel), _mm512_load_si512(some + p * kPanel + kLanes));
    }
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < 2; ++j) vstore(c + i * kPanel + j * kLanes, sum[i][j]);
}

using CompactTile = void (*)(CompactPanel&, const PairWord* a, int64_t pairs, uint32_t* words, float* c, bool);

template <bool Keep, int... I>
static inline CompactTile compact_tile_for(int rows, std::integer_sequence<int, I...>) {
    static constexpr CompactTile table[] = {compact_tile<I + 1, Keep>...};
    return table[rows - 1];
}

static inline void multiply_expanding(CompactPanel& source, const PairWord* a, int rows, int64_t pairs, bool keep,
                                      uint32_t* words, float* c, bool accumulate) {
    constexpr auto sizes = std::make_integer_sequence<int, kTileRows>{};
    const CompactTile tile = keep ? compact_tile_for<true>(rows, sizes) : compact_tile_for<false>(rows, sizes);
    tile(source, a, pairs, words, c, accumulate);
}
#else
static inline void multiply_expanding(CompactPanel& source, const PairWord* a, int rows, int64_t pairs, bool,
                                      uint32_t* words, float* c, bool accumulate) {
    source.next(pairs, words);
    tile_for<DotPairs, 0>(rows, 2)(a, words, pairs, c, kPanel, accumulate, 0);
}
#endif

static void unpack_compact(const Linear& w, const int64_t* ids, int64_t count, bf16* out) {
    const int64_t* list = static_cast<const int64_t*>(w.scales);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t panel = ids[i] / kPanel, column = ids[i] % kPanel;
        const uint8_t* head = static_cast<const uint8_t*>(w.weight) + panel * compact_panel_bytes(w.k);
        bf16* row = out + i * w.k;
        for (int64_t at = 0; at < w.k; ++at) {
            const uint8_t* from = head + kHeadBytes + at / 4 * kTwoPairsBytes;
            row[at] = compact_word(head, from, int(at / 2 % 2), compact_place(int(2 * column + at % 2)));
        }
        for (int64_t e = list[panel]; e < list[panel + 1]; ++e) {
            const int64_t place = list[e] >> 16, at = place / kPairWeights * 2 + place % 2;
            if (place % kPairWeights / 2 == column && at < w.k) row[at] = bf16(list[e]);
        }
    }
}

}  // namespace sensorium::SENSORIUM_ISA
