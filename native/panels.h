// bf16 weights in panels: packed once, or while they are multiplied.
// Packed: panels of 32 output columns (the last one 32 or 16), each [ceil(k / 2)][width][2], padded with zeros. One
// row of x walks a panel once, in order, which gives the best memory bandwidth; many rows read it from L2.
// Memory-mapped rows of a checkpoint file (kRows) are packed piece by piece while they are multiplied.
#pragma once

#include "kernels.h"
#include "tile.h"

namespace sensorium::SENSORIUM_ISA {

static inline int panel_vectors(int64_t n, int64_t panel) { return n - panel * kPanel > kLanes ? 2 : 1; }
static inline size_t align64(size_t bytes) { return (bytes + 63) & ~size_t(63); }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static void pack_bf16(const Runtime& runtime, const bf16* weight, int64_t stride, int64_t rows, int64_t row_start,
                      int64_t n, int64_t k, bf16* packed) {
    const int64_t pairs = ceil_div(k, 2), first_panel = row_start / kPanel, row_end = row_start + rows;
    const auto pack = [&](int64_t task) {
        const int64_t panel = first_panel + task;
        const int width = panel_vectors(n, panel) * kLanes;
        bf16* const base = packed + panel * kPanel * pairs * 2;
        for (int group = 0; group < width; group += kLanes) {
            const int64_t column = panel * kPanel + group;
            const int64_t first = std::max(column, row_start), last = std::min(column + kLanes, row_end);
            if (first >= last) continue;
            const bf16* source[kLanes];
            const int count = int(last == n ? column + kLanes - first : last - first);
            for (int i = 0; i < count; ++i)
                source[i] = first + i < last ? weight + (first + i - row_start) * stride : nullptr;
            uint32_t* out = reinterpret_cast<uint32_t*>(base) + (first - panel * kPanel);
            transpose_pairs(source, count, k / 2, out, width, reinterpret_cast<uintptr_t>(out) % 64 == 0);
            if (k % 2)
                for (int i = 0; i < count; ++i) out[(k / 2) * width + i] = source[i] ? source[i][k - 1] : 0;
        }
    };
    with_team(runtime, rows * k > 1 << 16,
              [&](const Runtime& team) { parallel_for(team, ceil_div(row_end, kPanel) - first_panel, pack); });
}

static void unpack_bf16(const bf16* packed, int64_t n, int64_t k, const int64_t* ids, int64_t count, bf16* out) {
    const int64_t pairs = ceil_div(k, 2);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t panel = ids[i] / kPanel, column = ids[i] % kPanel;
        const int width = panel_vectors(n, panel) * kLanes;
        const bf16* source = packed + panel * kPanel * pairs * 2 + column * 2;
        bf16* row = out + i * k;
        for (int64_t p = 0; p < k / 2; ++p) std::memcpy(row + 2 * p, source + p * width * 2, 4);
        if (k % 2) row[k - 1] = source[(k / 2) * width * 2];
    }
}

// Pointers to the memory-mapped rows of a panel, null beyond the last; `next` are those to prefetch.
struct PanelRows {
    const bf16* at[kPanel];
    const bf16* next[kPanel];

    PanelRows(const Linear& w, int64_t panel) {
        const bf16* const* rows = static_cast<const bf16* const*>(w.weight);
        for (int64_t i = 0; i < kPanel; ++i) {
            const int64_t column = panel * kPanel + i;
            at[i] = column < w.n ? rows[column] : nullptr;
            next[i] = column + kPanel < w.n ? rows[column + kPanel] : at[i];
        }
    }
};

// Pairs [p, p + count) of a panel's rows -> [count][vectors * 16], as they would be packed.
template <bool Fetch>
static inline void pack_piece(const PanelRows& rows, int vectors, int64_t k, int64_t p, int64_t count, uint32_t* out) {
    const int width = vectors * kLanes;
    for (int64_t at = 0; at < count; at += kLanes, out += kLanes * width) {
        const int64_t some = std::min<int64_t>(kLanes, count - at), pairs = std::min(some, k / 2 - p - at);
        const int64_t offset = 2 * (p + at);
        for (int lane = 0; lane < width; lane += kLanes) {
            const bf16* const* from = rows.at + lane;
            if (Fetch)
                for (int i = 0; i < kLanes; ++i) __builtin_prefetch(rows.next[lane + i] + offset, 0, 2);
#if defined(SENSORIUM_AVX512)
            if (pairs == kLanes && from[kLanes - 1]) {
                __m512i r[kLanes];
                for (int i = 0; i < kLanes; ++i) r[i] = _mm512_loadu_si512(from[i] + offset);
                transpose16(r);
                for (int i = 0; i < kLanes; ++i) _mm512_store_si512(out + i * width + lane, r[i]);
                continue;
            }
#endif
            const bf16* shifted[kLanes];
            for (int i = 0; i < kLanes; ++i) shifted[i] = from[i] ? from[i] + offset : nullptr;
            transpose_pairs(shifted, kLanes, pairs, out + lane, width);
            if (pairs < some)
                for (int i = 0; i < kLanes; ++i) out[pairs * width + lane + i] = from[i] ? shifted[i][2 * pairs] : 0;
        }
    }
}

}  // namespace sensorium::SENSORIUM_ISA
