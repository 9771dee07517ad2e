// Attention without materialised scores: a tile of query rows walks the keys 64 at a time with a running maximum.
// Rows are (token, head of the group) pairs, so grouped queries share each packed key and value. A sequence whose rows
// fit one tile is split along the keys at fixed places, and the parts are merged in order.
#pragma once

#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "linear.h"
#include "ops.h"

namespace sensorium::SENSORIUM_ISA {

constexpr int kKeys = 64;            // keys per step
constexpr int kAttentionRows = 96;   // query rows per tile, about
constexpr int kFewRows = 4;          // float32 rows for which keys are not packed
constexpr int64_t kSplitKeys = 512;  // keys per part of a split sequence
constexpr float kMasked = -1e30f;    // finite: infinity minus infinity is not a number
constexpr float kLog2e = 1.44269504088896f;

struct AttentionTask {
    int32_t sequence, kv_head;
    int32_t token, tokens;  // of the sequence's queries
    int32_t key, key_end;
    int32_t part, parts;
};

// Where the rows of one tile keep their state while they walk over the keys.
struct AttentionState {
    int rows, dim;  // dim: head_dim rounded up to whole vectors
    float* out;     // [rows, dim]
    float* peak;    // [rows], in log2 units
    float* total;   // [rows]
};

// Pointers to 64 keys or values; null beyond the end.
struct Rows {
    const char* at[kKeys];
    float scale[kKeys];  // int8 only
};

// Blocks may be anywhere in the cache, so the hardware prefetcher cannot predict the next rows.
static inline void prefetch_rows(const Rows& rows, int first, int count, int row_bytes) {
    for (int i = first; i < first + count; ++i)
        for (int byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(rows.at[i] + byte, 0, 2);
}

// What queries, keys and values are, and how they are multiplied.
struct Bf16Elements {
    using Element = bf16;
    using Dot = DotPairs;
    using Weight = std::conditional<sizeof(PairWord) == 4, bf16, float>::type;  // of a value, as A of a product
    static constexpr int kPerWord = 2;
};
struct FloatElements {
    using Element = float;
    using Dot = DotFloats;
    using Weight = float;
    static constexpr int kPerWord = 1;
};

// Two panels of 32 keys: k [words of head_dim][32], so that a dot product over head_dim is a tile product.
static inline void pack_keys(const bf16* const* rows, int64_t words, uint32_t* out, int group) {
    transpose_pairs(rows + group, kLanes, words, out + (group / kPanel) * words * kPanel + group % kPanel, kPanel);
}

// Panels of 32 (the last 32 or 16) of head_dim, each [keys / 2][width][2].
static inline void pack_values(const bf16* const* rows, int head_dim, bf16* out) {
    for (int panel = 0; panel < head_dim; panel += kPanel) {
        const int width = head_dim - panel > kLanes ? kPanel : kLanes;
        const int count = std::min(width, head_dim - panel);
        for (int pair = 0; pair < kKeys / 2; ++pair) {
            const bf16 *a = rows[2 * pair], *b = rows[2 * pair + 1];
#if defined(SENSORIUM_AVX512)
            const __mmask32 keep = count >= 32 ? ~0u : (1u << count) - 1;
            const __m512i low = _mm512_castsi256_si512(_mm256_setzero_si256());
            __m512i x = low, y = low;
            if (a) x = _mm512_maskz_loadu_epi16(keep, a + panel);
            if (b) y = _mm512_maskz_loadu_epi16(keep, b + panel);
            // zip: spread the 16-bit elements over 32 bits and merge
            const __m512i x0 = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(x));
            const __m512i y0 = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(y));
            _mm512_storeu_si512(out, _mm512_or_si512(x0, _mm512_slli_epi32(y0, 16)));
            if (width == kPanel) {
                const __m512i x1 = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1));
                const __m512i y1 = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(y, 1));
                _mm512_storeu_si512(out + 2 * kLanes, _mm512_or_si512(x1, _mm512_slli_epi32(y1, 16)));
            }
#else
            for (int i = 0; i < width; ++i) {
                out[2 * i] = a && i < count ? a[panel + i] : 0;
                out[2 * i + 1] = b && i < count ? b[panel + i] : 0;
            }
#endif
            out += width * 2;
        }
    }
}

// The same of floats: [keys][width].
static inline void pack_values(const float* const* rows, int head_dim, float* out) {
    for (int panel = 0; panel < head_dim; panel += kPanel) {
        const int width = head_dim - panel > kLanes ? kPanel : kLanes;
        for (int key = 0; key < kKeys; ++key)
            for (int lane = 0; lane < width; lane += kLanes, out += kLanes) {
                const int count = std::min(kLanes, head_dim - panel - lane);
                vstore(out, rows[key] && count > 0 ? vload_n(rows[key] + panel + lane, count) : vzero());
            }
    }
}

static inline void find_rows(const Attention& args, const AttentionTask& task, int64_t key, Rows& k, Rows& v) {
    const int64_t bytes = args.int8 ? 1 : int64_t(args.fp32 ? sizeof(float) : sizeof(bf16));
    for (int i = 0; i < kKeys; ++i) {
        const int64_t index = key + i;
        if (index >= task.key_end) {
            k.at[i] = v.at[i] = nullptr;
            continue;
        }
        int64_t block = 0, row = index + args.query_start[task.sequence];
        if (args.block_tables) {
            block = args.block_tables[task.sequence * args.max_blocks + index / args.block_size];
            row = index % args.block_size;
        }
        const int64_t k_at = block * args.k_block_stride + task.kv_head * args.k_head_stride + row * args.k_row_stride;
        const int64_t v_at = block * args.v_block_stride + task.kv_head * args.v_head_stride + row * args.v_row_stride;
        k.at[i] = static_cast<const char*>(args.k) + k_at * bytes;
        v.at[i] = static_cast<const char*>(args.v) + v_at * bytes;
    }
}

// The rows as bf16: as they are, or int8 codes, which bf16 holds exactly, in `wide`; their scales go to `rows`.
static inline void dequantize_rows(const Attention& args, Rows& rows, bf16* wide, const bf16** out) {
    for (int i = 0; i < kKeys; ++i) {
        out[i] = reinterpret_cast<const bf16*>(rows.at[i]);
        if (!args.int8) continue;
        rows.scale[i] = 0;
        if (!rows.at[i]) continue;
        const int8_t* codes = reinterpret_cast<const int8_t*>(rows.at[i]);
        bf16* to = wide + i * args.head_dim;
        over_lanes(args.head_dim, [&](int64_t d, int lanes) {
            int8_t tail[kLanes] = {};
            if (lanes < kLanes) std::memcpy(tail, codes + d, size_t(lanes));
            store_lanes(to + d, vload_s8(lanes < kLanes ? tail : codes + d), lanes);
        });
        std::memcpy(&rows.scale[i], codes + args.head_dim, kScaleBytes);
        out[i] = to;
    }
}

static inline void store_weights(bf16* p, vf v) { vstore_bf16(p, v); }
static inline void store_weights(float* p, vf v) { vstore(p, v); }

// Scores [kKeys] of one row -> probabilities, relative to the row's running maximum.
template <class Weight>
static inline void softmax_row(const Attention& args, const Rows& k, const Rows& v, float* score, int64_t key,
                               int64_t first, int64_t last, AttentionState& state, int row, Weight* p) {
    constexpr int kVectors = kKeys / kLanes;
    const bool whole = first <= key && key + kKeys <= last;
    const vf factor = vset(args.scale * kLog2e);
    vf s[kVectors];
    vf top = vset(kMasked);
    for (int j = 0; j < kVectors; ++j) {
        s[j] = vload(score + j * kLanes) * factor;
        if (args.int8) s[j] = s[j] * vload(k.scale + j * kLanes);
        if (!whole) s[j] = keep_range(s[j], int(key) + j * kLanes, int(first), int(last), kMasked);
        top = vmax(top, s[j]);
    }
    const float old = state.peak[row], peak = std::max(old, vmax_lane(top));
    vf sum = vzero();
    for (int j = 0; j < kVectors; ++j) {
        const vf value = exp2(s[j] - vset(peak));
        sum = sum + value;
        store_weights(p + j * kLanes, args.int8 ? value * vload(v.scale + j * kLanes) : value);
    }
    if (peak != old) {
        float lanes[kLanes];
        vstore(lanes, exp2(vset(old - peak)));
        state.total[row] *= lanes[0];
        float* out = state.out + int64_t(row) * state.dim;
        const vf shrink = vset(lanes[0]);
        for (int d = 0; d < state.dim; d += kLanes) vstore(out + d, vload(out + d) * shrink);
        state.peak[row] = peak;
    }
    state.total[row] += vsum(sum);
}

// The last key that a causal query may see: `token` is one of the task's, `own` its place among the keys.
static inline int64_t last_key(const Attention& args, const AttentionTask& task, int token, int64_t own) {
    if (!args.visible) return own;
    return args.visible[args.query_start[task.sequence] + task.token + token] - 1;
}

// The keys that a row of the task may see: [first, second).
static inline std::pair<int64_t, int64_t> seen_keys(const Attention& args, const AttentionTask& task, int row) {
    const int token = row / (args.heads / args.kv_heads);
    const int queries = args.query_start[task.sequence + 1] - args.query_start[task.sequence];
    const int64_t own = args.seq_lens[task.sequence] - queries + task.token + token;
    int64_t first = 0, last = task.key_end;
    if (args.window) first = args.causal ? own + 1 - args.window : own - args.window;
    if (args.causal) last = last_key(args, task, token, own) + 1;
    if (args.window && !args.causal) last = own + args.window + 1;
    return {first, std::min<int64_t>(last, task.key_end)};
}

// out [vectors of kLanes] += the weighted sum of the rows, from column d of them; null rows are left out.
template <int vectors>
static inline void add_values(const float* p, const Rows& rows, int64_t d, float* out) {
    vf sum[vectors];
    for (int j = 0; j < vectors; ++j) sum[j] = vload(out + j * kLanes);
    for (int i = 0; i < kKeys && rows.at[i]; ++i) {
        const float* value = reinterpret_cast<const float*>(rows.at[i]) + d;
        for (int j = 0; j < vectors; ++j) sum[j] = fma(vset(p[i]), vload(value + j * kLanes), sum[j]);
    }
    for (int j = 0; j < vectors; ++j) vstore(out + j * kLanes, sum[j]);
}

// `attend` for few rows of floats: keys and values are read once, where they lie. To pack them for products of so few
// rows takes longer than the products.
static void attend_few(const Attention& args, const AttentionTask& task, AttentionState& state) {
    const int group = args.heads / args.kv_heads, rows = state.rows, dim = args.head_dim;
    const int whole = dim / kLanes * kLanes, row_bytes = dim * int(sizeof(float));
    const float* q[kFewRows];
    for (int row = 0; row < rows; ++row) {
        const int64_t token = args.query_start[task.sequence] + task.token + row / group;
        q[row] = static_cast<const float*>(args.q) + token * args.q_stride + (task.kv_head * group + row % group) * dim;
        state.peak[row] = kMasked, state.total[row] = 0;
    }
    std::fill(state.out, state.out + int64_t(rows) * state.dim, 0.0f);
    alignas(64) float scores[kFewRows][kKeys], p[kFewRows][kKeys];
    Rows rows_of[2][2];  // this step's and the next one's, keys and values
    find_rows(args, task, task.key, rows_of[0][0], rows_of[0][1]);
    for (int64_t key = task.key, step = 0; key < task.key_end; key += kKeys, ++step) {
        Rows *now = rows_of[step % 2], *next = rows_of[(step + 1) % 2];
        find_rows(args, task, key + kKeys, next[0], next[1]);
        for (int i = 0; i < kKeys; ++i) {
            if (next[0].at[i]) prefetch_rows(next[0], i, 1, row_bytes);
            const float* one = reinterpret_cast<const float*>(now[0].at[i]);
            for (int row = 0; row < rows; ++row) {
                vf sum = vzero();
                for (int d = 0; one && d < whole; d += kLanes) sum = fma(vload(q[row] + d), vload(one + d), sum);
                if (one && whole < dim)
                    sum = fma(vload_n(q[row] + whole, dim - whole), vload_n(one + whole, dim - whole), sum);
                scores[row][i] = vsum(sum);
            }
        }
        for (int i = 0; i < kKeys && next[1].at[i]; ++i) prefetch_rows(next[1], i, 1, row_bytes);
        for (int row = 0; row < rows; ++row) {
            const auto [first, last] = seen_keys(args, task, row);
            softmax_row(args, now[0], now[1], scores[row], key, first, last, state, row, p[row]);
            float* out = state.out + int64_t(row) * state.dim;
            int d = 0;
            for (; d + 4 * kLanes <= whole; d += 4 * kLanes) add_values<4>(p[row], now[1], d, out + d);
            for (; d < whole; d += kLanes) add_values<1>(p[row], now[1], d, out + d);
            if (d == dim) continue;
            vf sum = vload(out + d);
            for (int i = 0; i < kKeys && now[1].at[i]; ++i)
                sum = fma(vset(p[row][i]), vload_n(reinterpret_cast<const float*>(now[1].at[i]) + d, dim - d), sum);
            vstore(out + d, sum);
        }
    }
}

// Walks the task's keys; leaves sums that are not yet divided by their total in `state`.
template <class Elements>
static void attend(const Attention& args, const AttentionTask& task, AttentionState& state) {
    const int group = args.heads / args.kv_heads, rows = state.rows, dim = args.head_dim;
    using Element = typename Elements::Element;
    using Dot = typename Elements::Dot;
    using Word = typename Dot::Word;
    using Weight = typename Elements::Weight;
    constexpr bool kFloats = Elements::kPerWord == 1;
    constexpr int kKeyWords = kKeys / Elements::kPerWord;
    const int64_t words = dim / Elements::kPerWord;
    if constexpr (kFloats)
        if (rows <= kFewRows) return attend_few(args, task, state);
    const int64_t first_token = args.query_start[task.sequence];
    const size_t q_bytes = align64(size_t(rows) * words * sizeof(Word)),
                 score_bytes = align64(size_t(rows) * kKeys * 4);
    const size_t k_bytes = size_t(kKeys) * words * 4, v_bytes = size_t(kKeys) * state.dim * sizeof(Element);
    const size_t p_bytes = size_t(rows) * kKeys * sizeof(Weight), wide_bytes = args.int8 ? size_t(kKeys) * dim * 2 : 0;
    char* memory = static_cast<char*>(
        Scratch<Buffer::kAttentionTile>::get(q_bytes + score_bytes + k_bytes + v_bytes + p_bytes + wide_bytes));
    Word* q = reinterpret_cast<Word*>(memory);
    float* scores = reinterpret_cast<float*>(memory + q_bytes);
    uint32_t* keys = reinterpret_cast<uint32_t*>(memory + q_bytes + score_bytes);
    Element* values = reinterpret_cast<Element*>(memory + q_bytes + score_bytes + k_bytes);
    Weight* p = reinterpret_cast<Weight*>(memory + q_bytes + score_bytes + k_bytes + v_bytes);
    bf16* wide = reinterpret_cast<bf16*>(memory + q_bytes + score_bytes + k_bytes + v_bytes + p_bytes);

    const Tiling tiling(rows);
    for (int64_t i = 0; i < tiling.count; ++i) {
        const int64_t first = tiling.start(i);
        const bf16* source[kTileRows];
        for (int j = 0; j < tiling.size(i); ++j) {
            const int64_t token = first_token + task.token + (first + j) / group;
            source[j] = reinterpret_cast<const bf16*>(static_cast<const Element*>(args.q) + token * args.q_stride +
                                                      (task.kv_head * group + (first + j) % group) * dim);
        }
        if constexpr (kFloats) {
            transpose_pairs(source, tiling.size(i), words, reinterpret_cast<uint32_t*>(q + first * words),
                            tiling.size(i));
        } else {
            const int64_t count = words * tiling.size(i);
            transpose_pairs(source, tiling.size(i), words, raw_pairs(q + first * words, count), tiling.size(i));
            finish_words(q + first * words, count);
        }
    }
    for (int row = 0; row < rows; ++row) state.peak[row] = kMasked, state.total[row] = 0;
    std::fill(state.out, state.out + int64_t(rows) * state.dim, 0.0f);

    const int row_bytes = args.int8 ? dim + kScaleBytes : dim * int(sizeof(Element));
    Rows rows_of[2][2];  // this step's and the next one's, keys and values
    find_rows(args, task, task.key, rows_of[0][0], rows_of[0][1]);
    for (int64_t key = task.key, step = 0; key < task.key_end; key += kKeys, ++step) {
        Rows *now = rows_of[step % 2], *next = rows_of[(step + 1) % 2];
        find_rows(args, task, key + kKeys, next[0], next[1]);
        const bf16* plain[kKeys];
        dequantize_rows(args, now[0], wide, plain);
        for (int lane = 0; lane < kKeys; lane += kLanes) {
            if (next[0].at[lane]) prefetch_rows(next[0], lane, kLanes, row_bytes);
            pack_keys(plain, words, keys, lane);
        }
        dequantize_rows(args, now[1], wide, plain);
        if (next[1].at[0]) prefetch_rows(next[1], 0, kKeys, row_bytes);
        pack_values(reinterpret_cast<const Element* const*>(plain), dim, values);
        for (int64_t i = 0; i < tiling.count; ++i) {
            const int64_t first = tiling.start(i);
            for (int panel = 0; panel < kKeys / kPanel; ++panel)
                tile_for<Dot, 0>(tiling.size(i), 2)(q + first * words, keys + panel * words * kPanel, words,
                                                    scores + first * kKeys + panel * kPanel, kKeys, false, 0);
        }
        for (int row = 0; row < rows; ++row) {
            const auto [first, last] = seen_keys(args, task, row);
            softmax_row(args, now[0], now[1], scores + row * kKeys, key, first, last, state, row, p + row * kKeys);
        }
        const uint32_t* panel = reinterpret_cast<const uint32_t*>(values);
        for (int d = 0; d < state.dim; d += kPanel) {
            const int vectors = state.dim - d > kLanes ? 2 : 1;
            for (int64_t i = 0; i < tiling.count; ++i) {
                const int64_t first = tiling.start(i);
                tile_for<Dot, kKeyWords>(tiling.size(i), vectors)(reinterpret_cast<Word*>(p + first * kKeys), panel,
                                                                  kKeyWords, state.out + first * state.dim + d,
                                                                  state.dim, true, 0);
            }
            panel += kKeyWords * vectors * kLanes;
        }
    }
}

static void store_rows(const Attention& args, const AttentionTask& task, const AttentionState& state) {
    const int group = args.heads / args.kv_heads;
    for (int row = 0; row < state.rows; ++row) {
        const int64_t token = args.query_start[task.sequence] + task.token + row / group;
        const int64_t at = token * args.out_stride + (task.kv_head * group + row % group) * args.head_dim;
        float total = state.total[row];
        if (args.sinks) {  // may overflow: then the sink has all of the probability
            float lanes[kLanes];
            const float sink = args.sinks[task.kv_head * group + row % group];
            vstore(lanes, exp2(vset(std::min(sink * kLog2e - state.peak[row], 126.0f))));
            total += lanes[0];
        }
        const vf inverse = vset(total > 0 ? 1.0f / total : 0.0f);
        for (int d = 0; d < args.head_dim; d += kLanes) {
            const vf value = vload(state.out + int64_t(row) * state.dim + d) * inverse;
            const int count = std::min(kLanes, args.head_dim - d);
            if (args.fp32)
                vstore_n(static_cast<float*>(args.out) + at + d, value, count);
            else
                vstore_bf16_n(static_cast<bf16*>(args.out) + at + d, value, count);
        }
    }
}

// Joins the parts of one split tile, first to last, in the memory of the first.
static void merge_parts(AttentionState* parts, int count) {
    AttentionState& to = parts[0];
    for (int i = 1; i < count; ++i)
        for (int row = 0; row < to.rows; ++row) {
            const float peak = std::max(to.peak[row], parts[i].peak[row]);
            float lanes[kLanes];
            vstore(lanes, exp2(vset(to.peak[row] - peak)));
            const float keep = lanes[0];
            vstore(lanes, exp2(vset(parts[i].peak[row] - peak)));
            const float add = lanes[0];
            to.total[row] = to.total[row] * keep + parts[i].total[row] * add;
            to.peak[row] = peak;
            float* out = to.out + int64_t(row) * to.dim;
            const float* other = parts[i].out + int64_t(row) * to.dim;
            for (int d = 0; d < to.dim; d += kLanes)
                vstore(out + d, fma(vload(out + d), vset(keep), vload(other + d) * vset(add)));
        }
}

static void plan_attention(const Attention& args, std::vector<AttentionTask>& tasks) {
    const int group = args.heads / args.kv_heads, tile_tokens = std::max(1, kAttentionRows / group);
    for (int32_t sequence = 0; sequence < args.sequences; ++sequence) {
        const int queries = args.query_start[sequence + 1] - args.query_start[sequence];
        const int length = args.seq_lens[sequence];
        // The last tokens see the most keys: start with them.
        for (int token = (queries - 1) / tile_tokens * tile_tokens; token >= 0 && queries > 0; token -= tile_tokens) {
            const int tokens = std::min(tile_tokens, queries - token);
            const int own = length - queries + token;  // the place of the first token among the keys
            int begin = 0, end = args.causal ? own + tokens : length;
            for (int i = 0; args.visible && i < tokens; ++i)
                end = std::max(end, std::min(args.visible[args.query_start[sequence] + token + i], length));
            if (args.window)
                begin = std::max(0, args.causal ? own + 1 - args.window : own - args.window) / kKeys * kKeys;
            if (args.window && !args.causal) end = std::min(length, own + tokens + args.window);
            const bool split = queries <= tile_tokens && end - begin > kSplitKeys;
            const int parts = split ? int(ceil_div(end - begin, kSplitKeys)) : 1;
            for (int head = 0; head < args.kv_heads; ++head)
                for (int part = 0; part < parts; ++part) {
                    const int key = begin + part * int(kSplitKeys);
                    const int key_end = part + 1 < parts ? key + int(kSplitKeys) : end;
                    tasks.push_back({sequence, head, token, tokens, key, key_end, part, parts});
                }
        }
    }
}

static void attention(const Runtime& runtime, const Attention& args) {
    const int group = args.heads / args.kv_heads, dim = int(ceil_div(args.head_dim, kLanes)) * kLanes;
    static thread_local std::vector<AttentionTask> tasks;
    static thread_local std::vector<AttentionState> states;
    tasks.clear();
    plan_attention(args, tasks);
    const int64_t count = int64_t(tasks.size());
    states.assign(size_t(count), AttentionState{});
    size_t split_floats = 0;
    int64_t work = 0;
    for (const AttentionTask& task : tasks) {
        if (task.parts > 1) split_floats += size_t(task.tokens * group) * (dim + 2 * kLanes);
        work += int64_t(std::max(task.tokens * group, 8)) * (task.key_end - task.key) * dim;
    }
    float* split =
        split_floats ? static_cast<float*>(Scratch<Buffer::kAttentionParts>::get(split_floats * 4)) : nullptr;
    AttentionTask* const task_list = tasks.data();  // thread_local names mean another vector on another thread
    AttentionState* const state_list = states.data();
    for (int64_t i = 0; i < count; ++i)
        if (tasks[i].parts > 1) {
            const int rows = tasks[i].tokens * group;
            states[i] = {rows, dim, split, split + int64_t(rows) * dim, split + int64_t(rows) * (dim + kLanes)};
            split += int64_t(rows) * (dim + 2 * kLanes);
        }
    const auto walk = args.fp32 ? attend<FloatElements> : attend<Bf16Elements>;
    const auto run = [&](int64_t i) {
        const AttentionTask& task = task_list[i];
        if (task.parts > 1) {
            walk(args, task, state_list[i]);
            return;
        }
        const int rows = task.tokens * group;
        float* memory = static_cast<float*>(Scratch<Buffer::kAttentionState>::get(size_t(rows) * (dim + 2) * 4));
        AttentionState state{rows, dim, memory, memory + int64_t(rows) * dim, memory + int64_t(rows) * (dim + 1)};
        walk(args, task, state);
        store_rows(args, task, state);
    };
    const auto join = [&](int64_t i) {
        if (task_list[i].parts <= 1 || task_list[i].part != 0) return;
        merge_parts(state_list + i, task_list[i].parts);
        store_rows(args, task_list[i], state_list[i]);
    };
    if (work > 1 << 18)
        with_team(runtime, true, [&](const Runtime& team) { parallel_for(team, count, run); });
    else
        for (int64_t i = 0; i < count; ++i) run(i);
    if (split_floats)
        for (int64_t i = 0; i < count; ++i) join(i);
}

}  // namespace sensorium::SENSORIUM_ISA
