// Products with weights of every layout: rows of x are made what a layout multiplies with, then panels are computed and
// stored, some to a task. Several products may share one loop over the tasks of all.
#pragma once

#include <vector>

#include "block_product.h"
#include "fp4.h"
#include "kernels.h"
#include "linear.h"
#include "ops.h"
#include "quantized.h"

namespace sensorium::SENSORIUM_ISA {

static inline bool has_codes(const Linear& w) { return w.layout == kInt8 || w.layout == kInt4 || w.layout == kBlocks; }

// A run of rows, ready to be multiplied, and its part of the tasks.
struct Operand {
    const Linear* w;
    int64_t first, rows;  // of the rows of `out`
    Output out;
    RowBlock floats;
    QuantizedRows codes;
    int64_t panels, panel_bytes;  // panels that are finished one by one: of a gated product half of all
    int64_t together = 1, first_task = 0;
};

static inline int64_t panel_bytes_of(const Linear& w) {
    if (w.layout == kBlocks) return form_of(segments_of(w)->kind).panel_bytes(w.k);
    if (has_codes(w)) return Codes(w).words() * kPanel * 4;
    if (w.layout == kCompact) return compact_panel_bytes(w.k);
    return w.layout == kMxfp4 ? fp4_panel_bytes(w.k) : ceil_div(w.k, 2) * kPanel * 4;
}

static inline size_t operand_bytes(const Linear& w, int64_t rows) {
    return has_codes(w) ? quantized_bytes(Codes(w), rows) : block_bytes(rows, w.k);
}

// Rows `first` and on of x, in `memory` of operand_bytes.
static Operand make_operand(const Runtime& runtime, const Linear& w, const bf16* x, int64_t stride, int64_t first,
                            int64_t rows, const Output& out, char* memory) {
    Operand made{&w, first, rows, out, {}, {}, panel_count(w) / (out.gated ? 2 : 1), panel_bytes_of(w)};
    const bf16* from = x + first * stride;
    if (has_codes(w))
        made.codes = quantize_rows(runtime, Codes(w), from, stride, rows, memory);
    else
        made.floats = pack_block(runtime, from, stride, rows, w.k, w.layout == kMxfp4 ? kFp4Rows : kTileRows, memory);
    return made;
}

static inline void panel_sums(const Operand& operand, int64_t panel, float* c) {
    const Linear& w = *operand.w;
    const RowBlock& floats = operand.floats;
    switch (w.layout) {
        case kBf16:
            multiply_panel(floats, static_cast<const uint32_t*>(w.weight) + panel * kPanel * floats.pairs,
                           panel_vectors(w.n, panel), c);
            break;
        case kRows:
            multiply_rows(floats, w, panel, c);
            break;
        case kCompact:
            multiply_compact(floats, w, panel, c);
            break;
        case kMxfp4:
            multiply_fp4(floats, w, panel, c);
            break;
        case kBlocks:
            multiply_blocks(operand.codes, w, panel, c);
            break;
        default:
            multiply_codes(operand.codes, Codes(w), w, panel, c);
    }
}

static void finish_panel(const Operand& operand, int64_t panel) {
    const size_t floats = size_t(operand.rows) * kPanel * (operand.out.gated ? 2 : 1);
    float* c = static_cast<float*>(Scratch<Buffer::kProducts>::get(floats * sizeof(float)));
    panel_sums(operand, panel, c);
    if (!operand.out.gated) {
        store_panel(c, *operand.w, panel, operand.first, operand.rows, operand.out);
        return;
    }
    float* up = c + operand.rows * kPanel;
    panel_sums(operand, panel + operand.panels, up);
    store_gated(c, up, *operand.w, panel, operand.first, operand.rows, operand.out);
}

// Below this many multiplications waking another thread costs more than it saves.
static inline int64_t multiplications(int64_t rows, const Linear& w) { return std::max<int64_t>(rows, 4) * w.n * w.k; }
static inline bool wants_team(int64_t multiplications) { return multiplications > 1 << 20; }

// Finishes all panels of all operands. With few rows a panel is read in a microsecond or two: several make a task.
static void over_panels(const Runtime& runtime, Operand* operands, int64_t count) {
    constexpr int64_t kTaskBytes = 256 << 10, kLeastTasks = 16;
    int64_t panels = 0, tasks = 0, work = 0;
    for (int64_t i = 0; i < count; ++i) {
        panels += operands[i].panels;
        work += multiplications(operands[i].rows, *operands[i].w);
    }
    for (Operand* one = operands; one < operands + count; ++one) {
        if (one->rows <= kTileRows)
            one->together = std::max<int64_t>(1, std::min(kTaskBytes / one->panel_bytes, panels / kLeastTasks));
        one->first_task = tasks;
        tasks += ceil_div(one->panels, one->together);
    }
    const auto run = [&](int64_t task) {
        const Operand* one = operands;
        while (one + 1 < operands + count && (one + 1)->first_task <= task) ++one;
        const int64_t panel = (task - one->first_task) * one->together;
        for (int64_t i = panel; i < std::min(one->panels, panel + one->together); ++i) finish_panel(*one, i);
    };
    if (wants_team(work))
        parallel_for(runtime, tasks, run);
    else
        for (int64_t task = 0; task < tasks; ++task) run(task);
}

// A block of rows at a time, all nearly equal.
static void multiply(const Runtime& runtime, const Linear& w, const bf16* x, int64_t stride, int64_t rows,
                     const Output& out) {
    const int64_t blocks = ceil_div(rows, has_codes(w) ? kQuantizedRows : kLinearRows);
    with_team(runtime, wants_team(multiplications(rows, w)), [&](const Runtime& team) {
        for (int64_t i = 0; i < blocks; ++i) {
            const int64_t first = rows * i / blocks, count = rows * (i + 1) / blocks - first;
            char* memory = static_cast<char*>(Scratch<Buffer::kActivations>::get(operand_bytes(w, count)));
            Operand operand = make_operand(team, w, x, stride, first, count, out, memory);
            over_panels(team, &operand, 1);
        }
    });
}

static void linear(const Runtime& runtime, const Linear& w, const bf16* x, int64_t stride, int64_t rows, void* y,
                   int32_t y_fp32) {
    multiply(runtime, w, x, stride, rows, Output{y, y_fp32 != 0});
}

// All at once: what one thread has finished with leaves none of them waiting for the others.
static void linear_many(const Runtime& runtime, const Product* products, int64_t count) {
    constexpr int64_t kAlone = 32 << 10;  // elements of x that one thread has ready before another is awake
    static thread_local std::vector<Operand> made;
    made.resize(size_t(count));
    std::vector<Operand>& operands = made;
    size_t bytes = 0;
    int64_t work = 0, elements = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Product& one = products[i];
        operands[size_t(i)].first_task = int64_t(bytes);
        bytes += operand_bytes(*one.w, one.rows);
        work += multiplications(one.rows, *one.w), elements += one.rows * one.w->k;
    }
    char* memory = static_cast<char*>(Scratch<Buffer::kActivations>::get(bytes));
    const Runtime alone{1, nullptr, runtime.kernels, nullptr};
    const auto prepare = [&](int64_t i) {
        const Product& one = products[i];
        operands[size_t(i)] = make_operand(alone, *one.w, one.x, one.stride, 0, one.rows,
                                           Output{one.y, one.y_fp32 != 0}, memory + operands[size_t(i)].first_task);
    };
    with_team(runtime, wants_team(work), [&](const Runtime& team) {
        if (elements > kAlone)
            parallel_for(team, count, prepare);
        else
            for (int64_t i = 0; i < count; ++i) prepare(i);
        over_panels(team, operands.data(), count);
    });
}

// The product of gate and up, and `gated`. In one, for many rows, where a panel has either gates or ups: what is
// between need not go to memory. Few rows stay in the caches, and read the weights best from first to last.
static void linear_gated(const Runtime& runtime, const Linear& w, const bf16* x, int64_t stride, int64_t rows, bf16* y,
                         int32_t activation) {
    if (rows > kTileRows && w.n % (2 * kPanel) == 0 && panel_count(w) * kPanel == w.n) {
        multiply(runtime, w, x, stride, rows, Output{y, false, true, activation});
        return;
    }
    bf16* both = static_cast<bf16*>(Scratch<Buffer::kGateUp>::get(size_t(rows * w.n) * sizeof(bf16)));
    linear(runtime, w, x, stride, rows, both, 0);
    gated(runtime, both, y, rows, w.n / 2, activation);
}

}  // namespace sensorium::SENSORIUM_ISA
