// The table of kernels that each instruction set fills in, and the arguments that cross the C boundary.
// The structs are mirrored field by field in src/sensorium/kernels/cpu/library.py; change both together.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace sensorium {

using bf16 = uint16_t;

constexpr int kScaleBytes = 4;  // behind each row of an int8 cache

constexpr int kPanel = 32;  // output columns that are stored together

enum WeightLayout : int32_t { kBf16 = 0, kInt8 = 1, kInt4 = 2, kRows = 3, kCompact = 4, kMxfp4 = 5, kBlocks = 6 };
enum Activation : int32_t {
    kSilu = 0,
    kGelu = 1,
    kGeluTanh = 2,
    kQuickGelu = 3,
    kRelu = 4,
    kTanh = 5,
    kClampedSwiglu = 6
};

// y [rows, n] = x [rows, k] @ weight.T + bias
struct Linear {
    void* weight;  // packed, see panels.h, compact.h and quantized.h; kRows: bf16 const*[n], the address of each row;
                   // kBlocks: BlockSegment[group]
    void* scales;  // int8: float [n rounded up to panels]; int4: fp16 [panels][groups][32]; kCompact: its exceptions;
                   // kMxfp4: see fp4.h
    const uint16_t* zeros;  // int4: what the codes are counted from, fp16, laid out like the scales; null: 8
    const float* bias;      // [n] or null
    int64_t n;
    int64_t k;
    int32_t layout;
    int32_t group;  // int4: elements of k that share a scale, a multiple of 8; kBlocks: segments
};

// Rows of one kind of a weight in blocks, see blocks.h.
struct BlockSegment {
    void* data;  // packed; or uint8_t const*[rows], the address of each row as a file has it, see gather.h
    int64_t first_row, rows, first_panel;
    int32_t kind;
    int32_t in_file;
};

// One of several products that are computed together, of few rows.
struct Product {
    const Linear* w;
    const bf16* x;
    int64_t stride, rows;
    void* y;
    int32_t y_fp32;
};

// Attention of queries over keys in a paged cache (block_tables != null) or in one array.
struct Attention {
    const void* q;  // token t, head h at q + t * q_stride + h * head_dim
    void* out;      // likewise with out_stride
    const void* k;  // paged: block b, head h, row r at k + b * block_stride + h * head_stride + r * row_stride
    const void* v;  // in one array: token t, head h at v + t * row_stride + h * head_stride
    int64_t q_stride, out_stride;
    int64_t k_block_stride, k_head_stride, k_row_stride;
    int64_t v_block_stride, v_head_stride, v_row_stride;
    const int32_t* block_tables;  // [sequences, max_blocks]
    const int32_t* query_start;   // [sequences + 1]
    const int32_t* seq_lens;      // [sequences] keys of each sequence
    const int32_t* visible;  // [tokens] keys that a causal query sees at most, in place of those up to its own; null
    const float* sinks;      // [heads] a score that takes part in each row's softmax and has no value; null: none
    int64_t max_blocks;
    int32_t sequences, heads, kv_heads, head_dim, block_size;
    int32_t causal;  // query i of n sees keys up to seq_len - n + i
    int32_t window;  // 0, or how many keys a causal query sees, its own included; not causal: on either side of its own
    int32_t int8;    // rows of the cache are bytes with their scale behind them, see quantize_head
    int32_t fp32;    // q, k, v in one array and out are float, not bf16
    float scale;
};

// How tokens of rows of logits are drawn. Of a row the logits that its mask leaves, where there are masks.
struct Draws {
    const float* logits;
    const int64_t* rows;        // [count], of the logits
    const uint32_t* masks;      // [count, words], or null
    const float* temperatures;  // [count], 0: the first of the highest logits
    const double* uniforms;     // [count], in [0, 1)
    int64_t* tokens;            // [count]; 0 where no logit is finite
    float* highest;             // [count], of what is left
    int64_t stride, vocab, words, count;
};

// Functions of the grammar library, as its header has them.
struct Grammars {
    int32_t (*validate)(void* matcher, const uint32_t* tokens, size_t count);  // how many may follow
    int32_t (*compute_mask)(void* matcher, uint32_t* bits, size_t bytes);      // 0: done, else nothing was written
    int32_t (*consume)(void* matcher, uint32_t token);                         // 0: taken
    int32_t (*consume_many)(void* matcher, const uint32_t* tokens, size_t count);
    int32_t (*forced)(void* matcher, uint32_t* tokens, size_t room);  // how many tokens were written
    bool (*is_stopped)(const void* matcher);
    bool (*is_error)(const void* matcher);
};

// One row that is held to a grammar.
struct HeldRow {
    int64_t row;  // of the logits
    uint64_t seed, index;
    void* matcher;
    const uint32_t* on_time;  // bits of all tokens but those that come only where there is nothing else; null: all
    int64_t slot;
};

// How tokens are drawn of such rows. Where a grammar leaves nothing, a row's highest logit is minus infinity.
struct HeldDraws {
    const Grammars* grammars;
    const float* logits;
    const HeldRow* rows;
    const float* temperatures;  // [count], 0: the first of the highest logits
    int64_t* costs;             // by slot: what the mask of the last token took, in nanoseconds; 0: it needed none
    int64_t* tokens;            // [count]
    float* highest;             // [count], of what is left
    int64_t stride, vocab, count;
};

// What comes of a token that a grammar takes.
constexpr int kFewForced = 16;
struct Taken {
    int32_t failed, stopped;
    int32_t num_forced;  // that were taken, too; kFewForced: at least so many are forced, and none was taken
    uint32_t forced[kFewForced];
};

// How a routed layer's tokens choose experts by their logits.
struct Routing {
    int32_t experts, per_token;
    int32_t renormalizes;  // weights of a token's experts add up to 1, before `scale`
    float scale;
};

// The MLPs of a routed layer, all of one shape.
struct Experts {
    const Linear *const *gate_up, *const *down;
    int32_t count, activation;
};

// y[token] = the sum of weights[token][j] * down(gated(gate_up(x[token]))) over its experts chosen[token][j], which are
// all different, in ascending order.
struct ExpertStep {
    const bf16* x;  // [tokens, k of gate_up]
    bf16* y;        // [tokens, n of down]
    const int64_t* chosen;
    const float* weights;
    int64_t tokens;
    int32_t per_token;
};

// What stands in the place of an MLP: a router [experts, hidden], experts, and perhaps one more that all tokens take,
// whose output the sigmoid of shared_gate [1, hidden] scales.
struct RoutedMlp {
    const Experts* experts;
    const Linear *router, *shared_gate_up, *shared_down, *shared_gate;  // the last three or the last one may be null
    Routing routing;
    int32_t activation;  // of the shared one
};

// What mixes a layer's tokens in attention's place, between the projections `qkv` and `o`: a gated delta net, or
// without `gates` a gated short convolution. See models/delta_net.py and models/short_conv.py.
struct StateMixer {
    const bf16 *taps, *bias;        // of the convolution: [channels, num_taps], [channels] or null
    const Linear* gates;            // [2 * value_heads, hidden]
    const float *rate, *rate_bias;  // [value_heads]
    const bf16* norm;               // [value_dim]
    int64_t num_taps, key_heads, value_heads, key_dim, value_dim;
    int32_t takes_turns;  // see DeltaRule
    float eps;
};

// One layer of a Llama-like decoder. All norms bf16; those of q, k and of what `o` and `down` give may be null.
struct DecoderLayer {
    const bf16 *input_norm, *q_norm, *k_norm, *attended_norm, *mlp_norm, *after_norm;
    const Linear *qkv, *o, *gate_up, *down;
    const RoutedMlp* routed;  // in place of gate_up and down, or null
    const StateMixer* state;  // in place of attention, or null
    const float* sinks;       // [heads], see Attention, or null
    int64_t window;
    int32_t both_ways;  // queries see as far as `DecoderStep.visible` says
    int32_t gated;      // each query has its gate behind it: what it attends to is multiplied by the gate's sigmoid
    int32_t rotation;   // number of its cos and sin
    int32_t table;      // number of the block table that says which blocks are its
    int32_t paired;     // of a head's rotated dimensions neighbours turn together: the first of each go to the front
};

struct Decoder {
    const DecoderLayer* layers;
    const bf16* final_norm;
    int32_t num_layers, heads, kv_heads, head_dim, rotary, block_size, activation, int8_cache;
    int32_t norms_whole_qk;  // q_norm and k_norm are of all heads together
    float eps, scale, norm_offset;
};

// A step by one of the sequences' block tables.
struct StepTable {
    const int64_t* slots;         // block * block_size + offset of each token's keys and values
    const int32_t* block_tables;  // [sequences, max_blocks]
    int64_t max_blocks;
};

// Runs of a step's tokens and the slots of the states before and behind them: `Segments` of kernels/context.py.
struct StateRuns {
    const int64_t *lengths, *sources, *targets;
    int64_t count, singles;
};

// What changes from step to step. `hidden` is read; `out` [tokens, hidden_size] gets the normed result.
struct DecoderStep {
    const bf16* hidden;
    bf16* out;
    const float* const* rotations;  // cos, sin of each number, [tokens, rotary / 2]
    void* const* caches;            // keys, values of each layer: [blocks, kv_heads, block_size, head_dim]; of one
                                    // with a state the convolution's rows and the delta rule's memory, or null
    const StepTable* tables;
    const int32_t *query_start, *seq_lens, *visible;
    const int64_t* rows;  // ascending: the tokens whose results are wanted, others are undefined; null: all
    int64_t tokens, sequences, num_rows;
    StateRuns runs;  // where layers have states
};

// Of every channel by itself the weighted sum of a token and those before it.
struct CausalConv {
    const bf16* x;       // [tokens, channels]
    const bf16* weight;  // [channels, taps]
    const bf16* bias;    // [channels] or null
    bf16* y;             // [tokens, channels], adjacent
    bf16* states;        // [slots, taps - 1, channels]
    int64_t stride, channels, taps;
    int32_t silu;
    StateRuns runs;
};

// See `Backend.delta_rule` of kernels/backend.py. Heads are adjacent.
struct DeltaRule {
    const bf16 *q, *k;             // [tokens, key_heads, key_dim]
    const bf16* v;                 // [tokens, value_heads, value_dim]
    bf16* out;                     // the same
    const float *decay, *learned;  // [tokens, value_heads]
    float* states;                 // [slots, value_heads, key_dim, value_dim]
    int64_t q_stride, k_stride, v_stride, key_heads, value_heads, key_dim, value_dim;
    StateRuns runs;
    int32_t takes_turns;  // v, out and the gates have the first value heads of all key heads first; states never
};

struct Kernels {
    const char* name;
    void (*pack_bf16)(const Runtime&, const bf16* weight, int64_t stride, int64_t rows, int64_t row_start, int64_t n,
                      int64_t k, bf16* packed);
    void (*unpack_bf16)(const bf16* packed, int64_t n, int64_t k, const int64_t* ids, int64_t count, bf16* out);
    void (*compact)(const Runtime&, const Linear& rows, uint8_t* to, int64_t room, int64_t* exceptions,
                    int64_t* counts);
    void (*unpack_compact)(const Linear&, const int64_t* ids, int64_t count, bf16* out);
    int64_t (*block_bytes)(int32_t kind, int64_t rows, int64_t k);
    void (*quantize)(const Runtime&, const Linear&, const bf16* weight, int64_t stride, int64_t rows,
                     int64_t row_start);
    void (*pack_codes)(const Runtime&, const Linear&, const uint8_t* codes, int64_t stride, int64_t rows,
                       int64_t row_start);
    void (*unpack_quantized)(const Linear&, const int64_t* ids, int64_t count, bf16* out);
    void (*linear)(const Runtime&, const Linear&, const bf16* x, int64_t stride, int64_t rows, void* y, int32_t y_fp32);
    void (*linear_many)(const Runtime&, const Product* products, int64_t count);
    void (*linear_gated)(const Runtime&, const Linear&, const bf16* x, int64_t stride, int64_t rows, bf16* y,
                         int32_t activation);
    void (*attention)(const Runtime&, const Attention&);
    void (*rms_norm)(const Runtime&, const bf16* x, int64_t stride, const bf16* weight, bf16* y, int64_t y_stride,
                     int64_t rows, int64_t n, float eps, float offset);
    void (*add_rms_norm)(const Runtime&, const bf16* x, const bf16* residual, const bf16* weight, bf16* y, bf16* sum,
                         int64_t rows, int64_t n, float eps, float offset);
    void (*layer_norm)(const Runtime&, const bf16* x, const bf16* weight, const bf16* bias, bf16* y, int64_t rows,
                       int64_t n, float eps);
    void (*gated)(const Runtime&, const bf16* gate_up, bf16* y, int64_t rows, int64_t n, int32_t activation);
    void (*activate)(const Runtime&, const bf16* x, bf16* y, int64_t count, int32_t activation);
    void (*rope)(const Runtime&, const bf16* x, int64_t stride, bf16* y, int64_t y_stride, const float* cos,
                 const float* sin, int64_t tokens, int64_t heads, int64_t head_dim, int64_t rotary);
    void (*write_kv)(const Runtime&, const bf16* k, int64_t k_stride, const bf16* v, int64_t v_stride, void* k_cache,
                     void* v_cache, const int64_t* slots, int64_t tokens, int64_t heads, int64_t head_dim,
                     int64_t block_size, int32_t int8);
    void (*choose)(const Runtime&, const Routing&, const bf16* logits, int64_t tokens, int64_t* chosen, float* weights);
    void (*add_experts)(const Runtime&, const float* rows, const int64_t* tokens, const float* weights, int64_t count,
                        int64_t n, float* sums);
    void (*finish_experts)(const Runtime&, const float* sums, const bf16* shared, const bf16* gates, int64_t tokens,
                           int64_t n, bf16* y);
    void (*causal_conv)(const Runtime&, const CausalConv&);
    void (*delta_rule)(const Runtime&, const DeltaRule&);
    void (*delta_gates)(const Runtime&, const bf16* gates, const float* rate, const float* bias, int64_t tokens,
                        int64_t heads, float* decay, float* learned);
    void (*norm_gated)(const Runtime&, const bf16* x, const bf16* z, int64_t z_stride, const bf16* weight, bf16* y,
                       int64_t tokens, int64_t heads, int64_t n, float eps);
    void (*multiply)(const Runtime&, bf16* x, int64_t stride, const bf16* by, int64_t by_stride, int64_t rows,
                     int64_t n, int32_t by_sigmoid);
    void (*draw)(const Runtime&, const Draws&);
    void (*draw_held)(const Runtime&, const HeldDraws&);
};

namespace portable {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}

}  // namespace sensorium
