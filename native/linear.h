// bf16 weights: the product, with weights that are packed (panels.h), memory-mapped rows or compact (compact.h).
#pragma once

#include "compact.h"
#include "kernels.h"
#include "ops.h"
#include "panels.h"
#include "tile.h"

namespace sensorium::SENSORIUM_ISA {

// A run of rows that are computed together: x packed into tiles, and how far along k one goes at a time.
struct RowBlock {
    Tiling tiling;
    const PairWord* a = nullptr;
    int64_t pairs = 0, step = 0;
};

static inline int64_t pairs_per_step(int64_t rows, int64_t pairs) {
    if (rows <= kTileRows) return pairs;      // one pass over the weights
    return rows <= 4 * kTileRows ? 64 : 512;  // a slice of the panel stays in L1, or in L2
}

static inline size_t block_bytes(int64_t rows, int64_t k) {
    return align64(size_t(rows * ceil_div(k, 2)) * sizeof(PairWord));
}

// In tiles of at most `height` rows, in `memory` of block_bytes, unless x can stay where it is.
static RowBlock pack_block(const Runtime& runtime, const bf16* x, int64_t stride, int64_t rows, int64_t k,
                           int64_t height, char* memory) {
    const int64_t pairs = ceil_div(k, 2);
    RowBlock block{Tiling(rows, height), nullptr, pairs, pairs_per_step(rows, pairs)};
    if (sizeof(PairWord) == 4 && rows == 1 && k % 2 == 0 && reinterpret_cast<uintptr_t>(x) % 4 == 0) {
        block.a = reinterpret_cast<const PairWord*>(x);
        return block;
    }
    PairWord* a = reinterpret_cast<PairWord*>(memory);
    const auto pack = [&](int64_t i) {
        const int64_t first = block.tiling.start(i);
        pack_rows(x, stride, first, block.tiling.size(i), k, a + first * pairs);
    };
    if (rows * pairs > 16 << 10)
        parallel_for(runtime, block.tiling.count, pack);
    else
        for (int64_t i = 0; i < block.tiling.count; ++i) pack(i);
    block.a = a;
    return block;
}

static inline void store_row(const float* c, const float* bias, void* y, int64_t offset, int count, bool y_fp32) {
    for (int j = 0; j < count; j += kLanes) {
        const int lanes = std::min(kLanes, count - j);
        vf value = vload(c + j);
        if (bias) value = value + vload_n(bias + j, lanes);
        if (y_fp32)
            vstore_n(static_cast<float*>(y) + offset + j, value, lanes);
        else
            vstore_bf16_n(static_cast<bf16*>(y) + offset + j, value, lanes);
    }
}

// Pairs [p, p + length) of one panel against the tiles from `tile` on; `ahead` of b is fetched meanwhile.
static inline void multiply_piece(const RowBlock& block, int64_t tile, int64_t p, int64_t length, const uint32_t* b,
                                  int vectors, float* c, int64_t ahead) {
    for (int64_t i = tile; i < block.tiling.count; ++i) {
        const int64_t first = block.tiling.start(i);
        const int size = block.tiling.size(i);
        tile_for<DotPairs, 0>(size, vectors)(block.a + first * block.pairs + p * size, b, length, c + first * kPanel,
                                             kPanel, p > 0, ahead);
    }
}

// One panel of the weights against all rows of the block; sums in `c` [rows, 32].
static inline void multiply_panel(const RowBlock& block, const uint32_t* b, int vectors, float* c) {
    const int width = vectors * kLanes;
    const int64_t rows = block.tiling.rows;
    const int64_t ahead = rows <= 4 ? 4096 : rows <= kTileRows ? 8192 : block.step * width * 4 + 8192;
    for (int64_t p = 0; p < block.pairs; p += block.step) {
        const int64_t length = std::min(block.step, block.pairs - p);
        multiply_piece(block, 0, p, length, b + p * width, vectors, c, ahead);
    }
}

// The same with memory-mapped rows: a panel is packed piece by piece while it is multiplied.
static inline void multiply_rows(const RowBlock& block, const Linear& w, int64_t panel, float* c) {
    constexpr int64_t kFew = 32;  // pairs at a time of few rows: 4 KB
    const int vectors = panel_vectors(w.n, panel);
    const PanelRows rows(w, panel);
    const bool few = block.tiling.rows <= kTileRows;
    const int64_t step = few ? kFew : block.step;
    uint32_t* b = static_cast<uint32_t*>(Scratch<Buffer::kWeightPiece>::get(size_t(step * kPanel) * 4));
    for (int64_t p = 0; p < block.pairs; p += step) {
        const int64_t length = std::min(step, block.pairs - p);
        (few ? pack_piece<true> : pack_piece<false>)(rows, vectors, w.k, p, length, b);
        multiply_piece(block, 0, p, length, b, vectors, c, 0);
    }
}

// The same with a compact panel. The next piece is prefetched while the second tile of rows is multiplied.
static inline void multiply_compact(const RowBlock& block, const Linear& w, int64_t panel, float* c) {
    const int rows = block.tiling.size(0);
    CompactPanel source(w, panel);
    uint32_t* b = static_cast<uint32_t*>(Scratch<Buffer::kWeightPiece>::get(size_t((block.step + 1) * kPanel) * 4));
    for (int64_t p = 0; p < block.pairs; p += block.step) {
        const int64_t length = std::min(block.step, block.pairs - p);
        multiply_expanding(source, block.a + p * rows, rows, length, block.tiling.count > 1, b, c, p > 0);
        multiply_piece(block, 1, p, length, b, 2, c, intptr_t(source.at) - intptr_t(b));
    }
}

// Blocks have segments that each begin with a panel of their own, see blocks.h.
static inline const BlockSegment* segments_of(const Linear& w) { return static_cast<const BlockSegment*>(w.weight); }
static inline int64_t panels_of(const BlockSegment& segment) { return ceil_div(segment.rows, kPanel); }
static inline const BlockSegment& segment_of_panel(const Linear& w, int64_t panel) {
    const BlockSegment* found = segments_of(w);
    while (found->first_panel + panels_of(*found) <= panel) ++found;
    return *found;
}
static inline int64_t panel_count(const Linear& w) {
    if (w.layout != kBlocks) return ceil_div(w.n, kPanel);
    const BlockSegment& last = segments_of(w)[w.group - 1];
    return last.first_panel + panels_of(last);
}

struct PanelColumns {
    int64_t first;
    int count;
};
static inline PanelColumns columns_of(const Linear& w, int64_t panel) {
    int64_t start = 0, end = w.n;
    if (w.layout == kBlocks) {
        const BlockSegment& segment = segment_of_panel(w, panel);
        start = segment.first_row, end = start + segment.rows, panel -= segment.first_panel;
    }
    const int64_t first = start + panel * kPanel;
    return {first, int(std::min<int64_t>(kPanel, end - first))};
}

// Where a product goes: [rows, n], or [rows, n / 2] in bf16, the activation of its first half times its second.
struct Output {
    void* y;
    bool fp32;
    bool gated = false;  // for more than kTileRows rows; n is a multiple of two panels
    int32_t activation = 0;
};

static inline void store_panel(const float* c, const Linear& w, int64_t panel, int64_t first, int64_t rows,
                               const Output& out) {
    const PanelColumns columns = columns_of(w, panel);
    const float* bias = w.bias ? w.bias + columns.first : nullptr;
    for (int64_t row = 0; row < rows; ++row)
        store_row(c + row * kPanel, bias, out.y, (first + row) * w.n + columns.first, columns.count, out.fp32);
}

// Rounds in between, as `gated` in ops.h finds a product that was stored.
static inline void store_gated(const float* gate, const float* up, const Linear& w, int64_t panel, int64_t first,
                               int64_t rows, const Output& out) {
    const int64_t half = w.n / 2, column = panel * kPanel;
    bf16* y = static_cast<bf16*>(out.y) + first * half + column;
    for (int64_t row = 0; row < rows; ++row, gate += kPanel, up += kPanel, y += half)
        for (int j = 0; j < kPanel; j += kLanes) {
            vf g = vload(gate + j), u = vload(up + j);
            if (w.bias) g = g + vload(w.bias + column + j), u = u + vload(w.bias + half + column + j);
            vstore_bf16(y + j, gate_product(rounded(g), rounded(u), out.activation));
        }
}

constexpr int64_t kLinearRows = 256;  // of a block: with k of 1,536 they stay in 1 MB of L2 from panel to panel

}  // namespace sensorium::SENSORIUM_ISA
