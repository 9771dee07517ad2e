// The table of kernels that each instruction set fills in, and the arguments that cross the C boundary.
// The structs are mirrored field by field in src/sensorium/kernels/cpu/library.py; change both together.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace sensorium {

using bf16 = uint16_t;

constexpr int kScaleBytes = 4;  // behind each row of an int8 cache

constexpr int kPanel = 32;  // output columns that are stored together

enum WeightLayout : int32_t { kBf16 = 0, kInt8 = 1, kInt4 = 2, kRows = 3, kCompact = 4 };
enum Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kQuickGelu = 3, kRelu = 4, kTanh = 5 };

// y [rows, n] = x [rows, k] @ weight.T + bias
struct Linear {
    void* weight;  // packed, see panels.h, compact.h and quantized.h; kRows: bf16 const*[n], the address of each row
    void* scales;  // int8: float [n rounded up to panels]; int4: fp16 [panels][groups][32]; kCompact: its exceptions
    const uint8_t* zeros;  // int4: the code of zero, laid out like the scales; null: 8
    const float* bias;     // [n] or null
    int64_t n;
    int64_t k;
    int32_t layout;
    int32_t group;  // int4: elements of k that share a scale, a multiple of 8
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
    int64_t max_blocks;
    int32_t sequences, heads, kv_heads, head_dim, block_size;
    int32_t causal;  // query i of n sees keys up to seq_len - n + i
    int32_t window;  // 0, or how many keys a causal query sees, its own included; not causal: on either side of its own
    int32_t int8;    // rows of the cache are bytes with their scale behind them, see quantize_head
    int32_t fp32;    // q, k, v in one array and out are float, not bf16
    float scale;
};

// One layer of a Llama-like decoder. All norms bf16; those of q, k and of what `o` and `down` give may be null.
struct DecoderLayer {
    const bf16 *input_norm, *q_norm, *k_norm, *attended_norm, *mlp_norm, *after_norm;
    const Linear *qkv, *o, *gate_up, *down;
    int64_t window;
    int32_t both_ways;  // queries see as far as `DecoderStep.visible` says
    int32_t rotation;   // number of its cos and sin
};

struct Decoder {
    const DecoderLayer* layers;
    const bf16* final_norm;
    int32_t num_layers, heads, kv_heads, head_dim, rotary, block_size, activation, int8_cache;
    float eps, scale, norm_offset;
};

// What changes from step to step. `hidden` is read; `out` [tokens, hidden_size] gets the normed result.
struct DecoderStep {
    const bf16* hidden;
    bf16* out;
    const float* const* rotations;  // cos, sin of each number, [tokens, rotary / 2]
    void* const* caches;            // keys, values of each layer: [blocks, kv_heads, block_size, head_dim]
    const int64_t* slots;
    const int32_t *block_tables, *query_start, *seq_lens, *visible;
    const int64_t* rows;  // ascending: the tokens whose results are wanted, others are undefined; null: all
    int64_t tokens, max_blocks, sequences, num_rows;
};

struct Kernels {
    const char* name;
    void (*pack_bf16)(const Runtime&, const bf16* weight, int64_t stride, int64_t rows, int64_t row_start, int64_t n,
                      int64_t k, bf16* packed);
    void (*unpack_bf16)(const bf16* packed, int64_t n, int64_t k, const int64_t* ids, int64_t count, bf16* out);
    void (*compact)(const Runtime&, const Linear& rows, uint8_t* to, int64_t room, int64_t* exceptions,
                    int64_t* counts);
    void (*unpack_compact)(const Linear&, const int64_t* ids, int64_t count, bf16* out);
    void (*quantize)(const Runtime&, const Linear&, const bf16* weight, int64_t stride, int64_t rows,
                     int64_t row_start);
    void (*pack_codes)(const Runtime&, const Linear&, const uint8_t* codes, int64_t stride, int64_t rows,
                       int64_t row_start);
    void (*unpack_quantized)(const Linear&, const int64_t* ids, int64_t count, bf16* out);
    void (*linear)(const Runtime&, const Linear&, const bf16* x, int64_t stride, int64_t rows, void* y, int32_t y_fp32);
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
