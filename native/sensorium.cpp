// The C interface that src/sensorium/kernels/cpu/library.py loads with ctypes. No torch, no Python, no OpenMP headers.
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "decoder.h"
#include "experts.h"
#include "kernels.h"

using namespace sensorium;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kBest = -1;

bool is_zen5_or_later() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    __builtin_cpu_init();
    if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
    return (a >> 8 & 15) + (a >> 20 & 255) >= 0x1a;
#else
    return false;
#endif
}

const Kernels* find_kernels(int isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    const bool products = avx512 && __builtin_cpu_supports("avx512bf16");
    if (isa == kBest) {
        if (products && !__builtin_cpu_is("intel")) return &avx512_bf16::kKernels;  // Intel: see vec.h
        return avx512 ? &avx512::kKernels : avx2 ? &avx2::kKernels : &portable::kKernels;
    }
    if (isa == 3) return products ? &avx512_bf16::kKernels : nullptr;
    if (isa == 2) return avx512 ? &avx512::kKernels : nullptr;
    if (isa == 1) return avx2 ? &avx2::kKernels : nullptr;
#endif
    return isa == 0 || isa == kBest ? &portable::kKernels : nullptr;
}

bool take_token(const Grammars& grammars, void* matcher, uint32_t token, Taken& taken) {
    taken = {};
    taken.failed = grammars.consume(matcher, token) != 0;
    if (taken.failed) return true;
    const int32_t count = grammars.forced(matcher, taken.forced, kFewForced);
    if (count == kFewForced) {
        taken.num_forced = count;
        return true;
    }
    if (count > 0 && grammars.consume_many(matcher, taken.forced, size_t(count)) == 0) taken.num_forced = count;
    taken.stopped = grammars.is_stopped(matcher);
    taken.failed = taken.stopped && grammars.is_error(matcher);  // one that failed has stopped, too
    return taken.num_forced || taken.stopped;
}

}  // namespace

const int64_t sensorium::kFewRowsAhead = is_zen5_or_later() ? 8192 : 0;

EXPORT int32_t sensorium_abi() { return 21; }

// isa: 0 portable, 1 AVX2 + FMA, 2 AVX-512 with VNNI, 3 the same with BF16, -1 the fastest of these. Null when this
// processor lacks it.
EXPORT Runtime* sensorium_open(int32_t isa, int32_t threads, Fork fork) {
    const Kernels* kernels = find_kernels(isa);
    return kernels ? new Runtime{threads, fork, kernels, nullptr} : nullptr;
}
EXPORT const char* sensorium_isa(const Runtime* runtime) { return runtime->kernels->name; }
EXPORT void sensorium_set_threads(Runtime* runtime, int32_t threads) { runtime->threads = threads; }

// Large pages for weights: fewer page faults while packing, fewer TLB misses while streaming.
EXPORT void sensorium_use_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t page = 2 << 20, begin = (uintptr_t(memory) + page - 1) & ~(page - 1);
    const uintptr_t end = (uintptr_t(memory) + uintptr_t(bytes)) & ~(page - 1);
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

EXPORT void sensorium_pack_bf16(const Runtime* r, const bf16* weight, int64_t stride, int64_t rows, int64_t row_start,
                                int64_t n, int64_t k, bf16* packed) {
    r->kernels->pack_bf16(*r, weight, stride, rows, row_start, n, k, packed);
}
EXPORT void sensorium_unpack_bf16(const Runtime* r, const bf16* packed, int64_t n, int64_t k, const int64_t* ids,
                                  int64_t count, bf16* out) {
    r->kernels->unpack_bf16(packed, n, k, ids, count, out);
}
// See compact.h. Panels of 32 columns, each 64 + ceil(k / 4) * 192 bytes; `to` begins at a multiple of 64.
EXPORT void sensorium_compact(const Runtime* r, const Linear* rows, uint8_t* to, int64_t room, int64_t* exceptions,
                              int64_t* counts) {
    r->kernels->compact(*r, *rows, to, room, exceptions, counts);
}
EXPORT void sensorium_unpack_compact(const Runtime* r, const Linear* w, const int64_t* ids, int64_t count, bf16* out) {
    r->kernels->unpack_compact(*w, ids, count, out);
}
EXPORT void sensorium_gather_rows(const bf16* const* rows, int64_t k, const int64_t* ids, int64_t count, bf16* out) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * k, rows[ids[i]], size_t(k) * sizeof(bf16));
}
// Of rows of a kind of blocks, see blocks.h.
EXPORT int64_t sensorium_block_bytes(const Runtime* r, int32_t kind, int64_t rows, int64_t k) {
    return r->kernels->block_bytes(kind, rows, k);
}
// Rows of bf16 become codes and scales of the linear layer's layout, at `row_start`.
EXPORT void sensorium_quantize(const Runtime* r, const Linear* w, const bf16* weight, int64_t stride, int64_t rows,
                               int64_t row_start) {
    r->kernels->quantize(*r, *w, weight, stride, rows, row_start);
}
// Codes that exist already, one byte each: w + 128 for int8, 0 to 15 for int4. Scales and zeros are the caller's. Of a
// weight in blocks rows of them as the file has them, all of one segment.
EXPORT void sensorium_pack_codes(const Runtime* r, const Linear* w, const uint8_t* codes, int64_t stride, int64_t rows,
                                 int64_t row_start) {
    r->kernels->pack_codes(*r, *w, codes, stride, rows, row_start);
}
EXPORT void sensorium_unpack_quantized(const Runtime* r, const Linear* w, const int64_t* ids, int64_t count,
                                       bf16* out) {
    r->kernels->unpack_quantized(*w, ids, count, out);
}
EXPORT void sensorium_linear(const Runtime* r, const Linear* w, const bf16* x, int64_t stride, int64_t rows, void* y,
                             int32_t y_fp32) {
    r->kernels->linear(*r, *w, x, stride, rows, y, y_fp32);
}
EXPORT void sensorium_attention(const Runtime* r, const Attention* args) { r->kernels->attention(*r, *args); }
EXPORT void sensorium_rms_norm(const Runtime* r, const bf16* x, int64_t stride, const bf16* weight, bf16* y,
                               int64_t y_stride, int64_t rows, int64_t n, float eps, float offset) {
    r->kernels->rms_norm(*r, x, stride, weight, y, y_stride, rows, n, eps, offset);
}
EXPORT void sensorium_add_rms_norm(const Runtime* r, const bf16* x, const bf16* residual, const bf16* weight, bf16* y,
                                   bf16* sum, int64_t rows, int64_t n, float eps, float offset) {
    r->kernels->add_rms_norm(*r, x, residual, weight, y, sum, rows, n, eps, offset);
}
EXPORT void sensorium_layer_norm(const Runtime* r, const bf16* x, const bf16* weight, const bf16* bias, bf16* y,
                                 int64_t rows, int64_t n, float eps) {
    r->kernels->layer_norm(*r, x, weight, bias, y, rows, n, eps);
}
EXPORT void sensorium_gated(const Runtime* r, const bf16* gate_up, bf16* y, int64_t rows, int64_t n,
                            int32_t activation) {
    r->kernels->gated(*r, gate_up, y, rows, n, activation);
}
EXPORT void sensorium_activate(const Runtime* r, const bf16* x, bf16* y, int64_t count, int32_t activation) {
    r->kernels->activate(*r, x, y, count, activation);
}
EXPORT void sensorium_rope(const Runtime* r, const bf16* x, int64_t stride, bf16* y, int64_t y_stride, const float* cos,
                           const float* sin, int64_t tokens, int64_t heads, int64_t head_dim, int64_t rotary) {
    r->kernels->rope(*r, x, stride, y, y_stride, cos, sin, tokens, heads, head_dim, rotary);
}
EXPORT void sensorium_write_kv(const Runtime* r, const bf16* k, int64_t k_stride, const bf16* v, int64_t v_stride,
                               void* k_cache, void* v_cache, const int64_t* slots, int64_t tokens, int64_t heads,
                               int64_t head_dim, int64_t block_size, int32_t int8) {
    r->kernels->write_kv(*r, k, k_stride, v, v_stride, k_cache, v_cache, slots, tokens, heads, head_dim, block_size,
                         int8);
}
EXPORT void sensorium_decoder(const Runtime* r, const Decoder* decoder, const DecoderStep* step) {
    run_decoder(*r, *decoder, *step);
}
EXPORT void sensorium_experts(const Runtime* r, const Experts* experts, const ExpertStep* step) {
    run_experts(*r, *experts, *step);
}
EXPORT void sensorium_choose(const Runtime* r, const Routing* rules, const bf16* logits, int64_t tokens,
                             int64_t* chosen, float* weights) {
    r->kernels->choose(*r, *rules, logits, tokens, chosen, weights);
}
EXPORT void sensorium_draw(const Runtime* r, const Draws* draws) { r->kernels->draw(*r, *draws); }
EXPORT void sensorium_draw_held(const Runtime* r, const HeldDraws* draws) { r->kernels->draw_held(*r, *draws); }
// Grammars take a token each, and what that forces. Returns how many rows of `taken` are not zero.
EXPORT int64_t sensorium_take_held(const Grammars* grammars, void* const* matchers, const uint32_t* tokens,
                                   int64_t count, Taken* taken) {
    int64_t told = 0;
    for (int64_t i = 0; i < count; ++i) told += take_token(*grammars, matchers[i], tokens[i], taken[i]);
    return told;
}
EXPORT void sensorium_causal_conv(const Runtime* r, const CausalConv* args) { r->kernels->causal_conv(*r, *args); }
EXPORT void sensorium_delta_rule(const Runtime* r, const DeltaRule* args) { r->kernels->delta_rule(*r, *args); }
EXPORT void sensorium_delta_gates(const Runtime* r, const bf16* gates, const float* rate, const float* bias,
                                  int64_t tokens, int64_t heads, float* decay, float* learned) {
    r->kernels->delta_gates(*r, gates, rate, bias, tokens, heads, decay, learned);
}
EXPORT void sensorium_norm_gated(const Runtime* r, const bf16* x, const bf16* z, int64_t z_stride, const bf16* weight,
                                 bf16* y, int64_t tokens, int64_t heads, int64_t n, float eps) {
    r->kernels->norm_gated(*r, x, z, z_stride, weight, y, tokens, heads, n, eps);
}
