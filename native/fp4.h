// mxfp4 weights: codes of E2M1 in blocks of 32 inputs that share a power of two, as checkpoints store them, multiplied
// with bf16 as they are: codes become bf16 while they are multiplied, a block's sums are scaled when it is done.
// Packed in panels of 32 output columns: for every two pairs of k 64 bytes of codes, low nibbles for the first pair,
// high ones for the second, a pair's 64 weights ordered as those of compact.h. Scales, a byte each, the exponent plus
// 127: [panels][blocks][32].
#pragma once

#include <algorithm>

#include "compact.h"
#include "kernels.h"
#include "linear.h"

namespace sensorium::SENSORIUM_ISA {

constexpr int64_t kBlock = 32, kBlockPairs = kBlock / 2, kBlockBytes = kBlock * kPanel / 2;
constexpr int kFp4Rows = kTileRows < 6 ? kTileRows : 6;  // of a tile: it holds two kinds of sums in registers

// bf16 of 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same below zero: low bytes, high bytes.
alignas(16) constexpr uint8_t kFp4Low[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0,
                                             0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0};
alignas(16) constexpr uint8_t kFp4High[16] = {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40,
                                              0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0};

static inline int64_t fp4_panel_bytes(int64_t k) { return k / kBlock * kBlockBytes; }

// Sixteen powers of two. Exponents below those of normal numbers: 2 ** -127.
static inline vf load_powers(const uint8_t* scales) {
    alignas(64) uint32_t bits[kLanes];
    for (int i = 0; i < kLanes; ++i) bits[i] = std::max<uint32_t>(uint32_t(scales[i]) << 23, 1u << 22);
    return vload(reinterpret_cast<const float*>(bits));
}

// One pair: 64 codes, the low or the high nibbles of 64 bytes -> words of 16 columns, twice.
static inline void expand_codes(const uint8_t* from, int pair, uint32_t* out) {
#if defined(SENSORIUM_AVX512)
    const __m512i low = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kFp4Low)));
    const __m512i high = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kFp4High)));
    const __m512i both = _mm512_loadu_si512(from);
    const __m512i code = _mm512_and_si512(pair ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
    const __m512i l = _mm512_shuffle_epi8(low, code), h = _mm512_shuffle_epi8(high, code);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi8(l, h));
    _mm512_storeu_si512(out + kLanes, _mm512_unpackhi_epi8(l, h));
#elif defined(SENSORIUM_AVX2)
    const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kFp4Low)));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kFp4High)));
    for (int half = 0; half < 2; ++half) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * half));
        const __m256i code = _mm256_and_si256(pair ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
        const __m256i l = _mm256_shuffle_epi8(low, code), h = _mm256_shuffle_epi8(high, code);
        __m256i* to = reinterpret_cast<__m256i*>(out + 8 * half);
        _mm256_storeu_si256(to, _mm256_unpacklo_epi8(l, h));
        _mm256_storeu_si256(to + 2, _mm256_unpackhi_epi8(l, h));
    }
#else
    bf16* words = reinterpret_cast<bf16*>(out);
    for (int i = 0; i < kPairWeights; ++i) {
        const int code = (from[compact_place(i)] >> (4 * pair)) & 15;
        words[i] = bf16(kFp4High[code] << 8 | kFp4Low[code]);
    }
#endif
}

static inline void expand_pair(const uint8_t* from, int pair, vpair out[2]) {
#if defined(SENSORIUM_AVX512)
    const __m512i low = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kFp4Low)));
    const __m512i high = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kFp4High)));
    const __m512i both = _mm512_loadu_si512(from);
    const __m512i code = _mm512_and_si512(pair ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15));
    const __m512i l = _mm512_shuffle_epi8(low, code), h = _mm512_shuffle_epi8(high, code);
    out[0] = pairs_of(_mm512_unpacklo_epi8(l, h)), out[1] = pairs_of(_mm512_unpackhi_epi8(l, h));
#else
    alignas(64) uint32_t words[kPanel];
    expand_codes(from, pair, words);
    for (int j = 0; j < 2; ++j) out[j] = pload(reinterpret_cast<const bf16*>(words + j * kLanes));
#endif
}

// Some blocks of a panel: its codes, or the words that they stand for.
struct BlockRun {
    int64_t blocks;
    const uint8_t* codes;
    const uint32_t* words;  // null: codes are expanded while they are multiplied
    const uint8_t* scales;
    int64_t ahead;
};

// Adds the products with MR rows to C [MR, 32]. A row's sums are the same with codes and with words.
template <int MR>
static void block_tile(const BlockRun& run, const PairWord* a, float* c) {
    static_assert(MR <= 8);
    vf total[MR][2];
    SENSORIUM_UNROLL(8)
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < 2; ++j) total[i][j] = vload(c + i * kPanel + j * kLanes);
    const uint8_t* codes = run.codes;
    const uint32_t* words = run.words;
    for (int64_t block = 0; block < run.blocks; ++block) {
        vf sum[MR][2];
        SENSORIUM_UNROLL(8)
        for (int i = 0; i < MR; ++i)
            for (int j = 0; j < 2; ++j) sum[i][j] = vzero();
        const auto add = [&](const vpair(&w)[2]) {
            SENSORIUM_UNROLL(8)
            for (int i = 0; i < MR; ++i) {
                const auto x = pbroadcast(a[i]);
                for (int j = 0; j < 2; ++j) sum[i][j] = dot_pair(sum[i][j], w[j], x);
            }
            a += MR;
        };
        if (words) {
            for (int64_t p = 0; p < kBlockPairs; ++p, words += kPanel)
                add({pload(reinterpret_cast<const bf16*>(words)),
                     pload(reinterpret_cast<const bf16*>(words + kLanes))});
        } else {
            for (int64_t p = 0; p < kBlockPairs; p += 2, codes += 64) {
                __builtin_prefetch(codes + run.ahead, 0, 3);
                vpair w[2];
                for (int pair = 0; pair < 2; ++pair) {
                    expand_pair(codes, pair, w);
                    add(w);
                }
            }
        }
        const uint8_t* scales = run.scales + block * kPanel;
        __builtin_prefetch(scales + 512, 0, 3);
        SENSORIUM_UNROLL(2)
        for (int j = 0; j < 2; ++j) {
            const vf scale = load_powers(scales + j * kLanes);
            SENSORIUM_UNROLL(8)
            for (int i = 0; i < MR; ++i) total[i][j] = fma(sum[i][j], scale, total[i][j]);
        }
    }
    SENSORIUM_UNROLL(8)
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < 2; ++j) vstore(c + i * kPanel + j * kLanes, total[i][j]);
}

using BlockTile = void (*)(const BlockRun& run, const PairWord* a, float* c);

template <int... I>
static inline BlockTile block_tile_for(int rows, std::integer_sequence<int, I...>) {
    static constexpr BlockTile table[] = {block_tile<I + 1>...};
    return table[rows - 1];
}

// One panel against all rows of the block, which is in tiles of kFp4Rows; sums in `c` [rows, 32]. Of several tiles the
// codes are expanded for all.
static inline void multiply_fp4(const RowBlock& x, const Linear& w, int64_t panel, float* c) {
    constexpr int64_t kTogether = 8;  // blocks: 16 KB of words
    const int64_t blocks = w.k / kBlock, step = x.tiling.count > 1 ? kTogether : blocks;
    const uint8_t* codes = static_cast<const uint8_t*>(w.weight) + panel * fp4_panel_bytes(w.k);
    const uint8_t* scales = static_cast<const uint8_t*>(w.scales) + panel * blocks * kPanel;
    uint32_t* words = nullptr;
    if (x.tiling.count > 1)
        words = static_cast<uint32_t*>(
            Scratch<Buffer::kWeightPiece>::get(size_t(kTogether * kBlockPairs * kPanel) * sizeof(uint32_t)));
    std::fill(c, c + x.tiling.rows * kPanel, 0.0f);
    for (int64_t block = 0; block < blocks; block += step) {
        const int64_t count = std::min(step, blocks - block);
        const uint8_t* from = codes + block * kBlockBytes;
        for (int64_t p = 0; words && p < count * kBlockPairs; ++p)
            expand_codes(from + p / 2 * 64, int(p % 2), words + p * kPanel);
        const BlockRun run{count, from, words, scales + block * kPanel, 8192};
        for (int64_t i = 0; i < x.tiling.count; ++i) {
            const int64_t first = x.tiling.start(i);
            const int size = x.tiling.size(i);
            block_tile_for(size, std::make_integer_sequence<int, kFp4Rows>{})(
                run, x.a + first * x.pairs + block * kBlockPairs * size, c + first * kPanel);
        }
    }
}

// Codes of a byte each [rows][k] to their places; columns beyond the last are zero.
static void pack_fp4(const Runtime& runtime, const Linear& w, const uint8_t* codes, int64_t stride, int64_t rows,
                     int64_t row_start) {
    const int64_t first_panel = row_start / kPanel, row_end = row_start + rows;
    const auto pack = [&](int64_t task) {
        const int64_t panel = first_panel + task, column = panel * kPanel;
        const int64_t first = std::max(column, row_start);
        const int64_t last = row_end == w.n ? column + kPanel : std::min(column + kPanel, row_end);
        uint8_t* to = static_cast<uint8_t*>(w.weight) + panel * fp4_panel_bytes(w.k);
        for (int64_t at = 0; at < w.k; at += 4, to += 64)
            for (int64_t row = first; row < last; ++row) {
                uint32_t four = 0;
                if (row < row_end) std::memcpy(&four, codes + (row - row_start) * stride + at, 4);
                uint8_t* place = to + compact_place(int(2 * (row - column)));
                place[0] = uint8_t((four & 15) | (four >> 12 & 0xf0));
                place[1] = uint8_t((four >> 8 & 15) | (four >> 20 & 0xf0));
            }
    };
    with_team(runtime, rows * w.k > 1 << 16,
              [&](const Runtime& team) { parallel_for(team, ceil_div(row_end, kPanel) - first_panel, pack); });
}

static void unpack_fp4(const Linear& w, const int64_t* ids, int64_t count, bf16* out) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t panel = ids[i] / kPanel, column = ids[i] % kPanel;
        const uint8_t* codes = static_cast<const uint8_t*>(w.weight) + panel * fp4_panel_bytes(w.k);
        const uint8_t* scales = static_cast<const uint8_t*>(w.scales) + panel * (w.k / kBlock) * kPanel + column;
        for (int64_t at = 0; at < w.k; ++at) {
            const uint8_t byte = codes[at / 4 * 64 + compact_place(int(2 * column + at % 2))];
            const int code = (byte >> (at % 4 / 2 * 4)) & 15, power = scales[at / kBlock * kPanel];
            const float value = bf16_to_float(bf16(kFp4High[code] << 8 | kFp4Low[code]));
            out[i * w.k + at] = float_to_bf16(std::ldexp(value, power - 127));
        }
    }
}

}  // namespace sensorium::SENSORIUM_ISA
