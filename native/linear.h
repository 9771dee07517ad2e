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
    const PairWord* a;
    int64_t pairs, step;
};

static inline int64_t pairs_per_step(int64_t rows, int64_t pairs) {
    if (rows <= kTileRows) return pairs;      // one pass over the weights
    return rows <= 4 * kTileRows ? 64 : 512;  // a slice of the panel stays in L1, or in L2
}

static RowBlock pack_block(const Runtime& runtime, const bf16* x, int64_t stride, int64_t rows, int64_t k) {
    const int64_t pairs = ceil_div(k, 2);
    RowBlock block{Tiling(rows), nullptr, pairs, pairs_per_step(rows, pairs)};
    if (sizeof(PairWord) == 4 && rows == 1 && k % 2 == 0 && reinterpret_cast<uintptr_t>(x) % 4 == 0) {
        block.a = reinterpret_cast<const PairWord*>(x);
        return block;
    }
    PairWord* a = static_cast<PairWord*>(Scratch<Buffer::kActivations>::get(size_t(rows * pairs) * sizeof(PairWord)));
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

// Where a product goes: [rows, n], or [rows, n / 2] in bf16, the activation of its first half times its second.
struct Output {
    void* y;
    bool fp32;
    bool gated = false;  // for more than kTileRows rows; n is a multiple of two panels
    int32_t activation = 0;
};

static inline void store_panel(const float* c, const Linear& w, int64_t panel, int64_t first, int64_t rows,
                               const Output& out) {
    const int64_t column = panel * kPanel;
    const int columns = int(std::min<int64_t>(kPanel, w.n - column));
    for (int64_t row = 0; row < rows; ++row)
        store_row(c + row * kPanel, w.bias ? w.bias + column : nullptr, out.y, (first + row) * w.n + column, columns,
                  out.fp32);
}

static inline vf rounded(vf x) {
    bf16 lanes[kLanes];
    vstore_bf16(lanes, x);
    return vload_bf16(lanes);
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
            vstore_bf16(y + j, activated(rounded(g), out.activation) * rounded(u));
        }
}

// Below this many multiplications waking another thread costs more than it saves.
static inline bool wants_team(int64_t rows, int64_t n, int64_t k) {
    return std::max<int64_t>(rows, 4) * n * k > 1 << 20;
}

// Calls sums(panel, c) for every panel, which leaves the panel's products in c [rows, 32], and stores them from `first`
// on. With few rows a panel is read in a microsecond or two: several make a task.
template <class Sums>
static inline void over_panels(const Runtime& runtime, const Linear& w, int64_t first, int64_t rows,
                               int64_t panel_bytes, const Output& out, const Sums& sums) {
    constexpr int64_t kTaskBytes = 256 << 10, kLeastTasks = 16;
    const int64_t together = out.gated ? 2 : 1, panels = ceil_div(w.n, kPanel) / together;
    const auto finish = [&](int64_t panel) {
        float* c =
            static_cast<float*>(Scratch<Buffer::kProducts>::get(size_t(rows * together) * kPanel * sizeof(float)));
        sums(panel, c);
        if (out.gated) {
            float* up = c + rows * kPanel;
            sums(panel + panels, up);
            store_gated(c, up, w, panel, first, rows, out);
        } else {
            store_panel(c, w, panel, first, rows, out);
        }
    };
    if (!wants_team(rows, w.n, w.k)) {
        for (int64_t panel = 0; panel < panels; ++panel) finish(panel);
        return;
    }
    int64_t size = rows <= kTileRows ? std::min(kTaskBytes / panel_bytes, panels / kLeastTasks) : 1;
    size = std::max<int64_t>(1, size);
    parallel_for(runtime, ceil_div(panels, size), [&](int64_t task) {
        for (int64_t panel = task * size; panel < std::min(panels, (task + 1) * size); ++panel) finish(panel);
    });
}

constexpr int64_t kLinearRows = 256;  // of a block: with k of 1,536 they stay in 1 MB of L2 from panel to panel

static void linear_block(const Runtime& runtime, const Linear& w, const bf16* x, int64_t stride, int64_t first,
                         int64_t rows, const Output& out) {
    const int64_t pairs = ceil_div(w.k, 2);
    const uint32_t* weight = static_cast<const uint32_t*>(w.weight);
    const RowBlock block = pack_block(runtime, x + first * stride, stride, rows, w.k);
    const int64_t panel_bytes = w.layout == kCompact ? compact_panel_bytes(w.k) : pairs * kPanel * 4;
    over_panels(runtime, w, first, rows, panel_bytes, out, [&](int64_t panel, float* c) {
        if (w.layout == kRows)
            multiply_rows(block, w, panel, c);
        else if (w.layout == kCompact)
            multiply_compact(block, w, panel, c);
        else
            multiply_panel(block, weight + panel * kPanel * pairs, panel_vectors(w.n, panel), c);
    });
}

}  // namespace sensorium::SENSORIUM_ISA
