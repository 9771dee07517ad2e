// bf16 weights: packing and the product.
// Packed: panels of 32 output columns (the last one 32 or 16), each [ceil(k / 2)][width][2], padded with zeros. One
// row of x walks a panel once, in order, which is what memory likes best; many rows walk it out of L2.
// Weights that stay as a checkpoint's file has them (kRows) are packed on the way, a piece of a panel at a time.
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
    with_team(runtime, rows * k > 1 << 16, [&](const Runtime& team) {
        parallel_for(team, ceil_div(row_end, kPanel) - first_panel, pack);
    });
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

// A run of rows that are computed together: x packed into tiles, and how far along k one goes at a time.
struct RowBlock {
    Tiling tiling;
    const PairWord* a;
    int64_t pairs, step;
};

static inline int64_t pairs_per_step(int64_t rows, int64_t pairs) {
    if (rows <= kTileRows) return pairs;        // one pass over the weights
    return rows <= 4 * kTileRows ? 64 : 512;  // a slice of the panel stays in L1, or in L2
}

static RowBlock pack_block(const Runtime& runtime, const bf16* x, int64_t stride, int64_t rows, int64_t k) {
    const int64_t pairs = ceil_div(k, 2);
    RowBlock block{Tiling(rows), nullptr, pairs, pairs_per_step(rows, pairs)};
    if (sizeof(PairWord) == 4 && rows == 1 && k % 2 == 0 && reinterpret_cast<uintptr_t>(x) % 4 == 0) {
        block.a = reinterpret_cast<const PairWord*>(x);
        return block;
    }
    PairWord* a = static_cast<PairWord*>(Scratch<0>::get(size_t(rows * pairs) * sizeof(PairWord)));
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

// One panel of the weights against all rows of the block; sums in `c` [rows, 32].
static inline void multiply_panel(const RowBlock& block, const uint32_t* b, int vectors, float* c) {
    const int width = vectors * kLanes;
    const int64_t rows = block.tiling.rows;
    const int64_t ahead = rows <= 4 ? 4096 : rows <= kTileRows ? 8192 : block.step * width * 4 + 8192;
    for (int64_t p = 0; p < block.pairs; p += block.step) {
        const int64_t length = std::min(block.step, block.pairs - p);
        for (int64_t i = 0; i < block.tiling.count; ++i) {
            const int64_t first = block.tiling.start(i);
            const int size = block.tiling.size(i);
            tile_for<DotPairs, 0>(size, vectors)(block.a + first * block.pairs + p * size, b + p * width, length,
                                                 c + first * kPanel, kPanel, p > 0, ahead);
        }
    }
}

// The rows of a panel that stay where they are, null beyond the last; `next` are those to fetch meanwhile.
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
static inline void spread_rows(const PanelRows& rows, int vectors, int64_t k, int64_t p, int64_t count, uint32_t* out) {
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

static inline void multiply_rows(const RowBlock& block, const Linear& w, int64_t panel, float* c) {
    constexpr int64_t kFew = 32;  // pairs at a time of few rows: 4 KB
    const int vectors = panel_vectors(w.n, panel), width = vectors * kLanes;
    const PanelRows rows(w, panel);
    const bool few = block.tiling.rows <= kTileRows;
    const int64_t step = few ? std::min(kFew, block.pairs) : block.step;
    uint32_t* b = static_cast<uint32_t*>(Scratch<10>::get(size_t(step * width) * 4));
    for (int64_t p = 0; p < block.pairs; p += step) {
        const int64_t length = std::min(step, block.pairs - p);
        if (few)
            spread_rows<true>(rows, vectors, w.k, p, length, b);
        else
            spread_rows<false>(rows, vectors, w.k, p, length, b);
        for (int64_t i = 0; i < block.tiling.count; ++i) {
            const int64_t first = block.tiling.start(i);
            const int size = block.tiling.size(i);
            tile_for<DotPairs, 0>(size, vectors)(block.a + first * block.pairs + p * size, b, length,
                                                 c + first * kPanel, kPanel, p > 0, 0);
        }
    }
}

constexpr int64_t kBlockRows = 480;

// Below this many multiplications waking another thread costs more than it saves.
static inline bool wants_team(int64_t rows, int64_t n, int64_t k) {
    return std::max<int64_t>(rows, 4) * n * k > 1 << 20;
}

// Calls body(panel) for every panel. With few rows a panel is read in a microsecond or two: several make a task.
template <class Body>
static inline void over_panels(const Runtime& runtime, const Linear& w, int64_t rows, int64_t panel_bytes,
                               const Body& body) {
    constexpr int64_t kTaskBytes = 256 << 10, kLeastTasks = 16;
    const int64_t panels = ceil_div(w.n, kPanel);
    if (!wants_team(rows, w.n, w.k)) {
        for (int64_t panel = 0; panel < panels; ++panel) body(panel);
        return;
    }
    int64_t size = rows <= kTileRows ? std::min(kTaskBytes / panel_bytes, panels / kLeastTasks) : 1;
    size = std::max<int64_t>(1, size);
    parallel_for(runtime, ceil_div(panels, size), [&](int64_t task) {
        for (int64_t panel = task * size; panel < std::min(panels, (task + 1) * size); ++panel) body(panel);
    });
}

static void linear_block(const Runtime& runtime, const Linear& w, const bf16* x, int64_t stride, int64_t first,
                         int64_t rows, void* y, bool y_fp32) {
    const int64_t pairs = ceil_div(w.k, 2);
    const uint32_t* weight = static_cast<const uint32_t*>(w.weight);
    const RowBlock block = pack_block(runtime, x + first * stride, stride, rows, w.k);
    const auto multiply = [&](int64_t panel) {
        float* c = static_cast<float*>(Scratch<1>::get(size_t(rows) * kPanel * sizeof(float)));
        if (w.form == kRows)
            multiply_rows(block, w, panel, c);
        else
            multiply_panel(block, weight + panel * kPanel * pairs, panel_vectors(w.n, panel), c);
        const int64_t column = panel * kPanel;
        const int columns = int(std::min<int64_t>(kPanel, w.n - column));
        for (int64_t row = 0; row < rows; ++row)
            store_row(c + row * kPanel, w.bias ? w.bias + column : nullptr, y, (first + row) * w.n + column, columns,
                      y_fp32);
    };
    over_panels(runtime, w, rows, pairs * kPanel * 4, multiply);
}

static void linear_bf16(const Runtime& runtime, const Linear& w, const bf16* x, int64_t stride, int64_t rows, void* y,
                        bool y_fp32) {
    with_team(runtime, wants_team(rows, w.n, w.k), [&](const Runtime& team) {
        const int64_t blocks = ceil_div(rows, kBlockRows);
        for (int64_t i = 0; i < blocks; ++i) {
            const int64_t first = rows * i / blocks, count = rows * (i + 1) / blocks - first;
            linear_block(team, w, x, stride, first, count, y, y_fp32);
        }
    });
}

}  // namespace sensorium::SENSORIUM_ISA
