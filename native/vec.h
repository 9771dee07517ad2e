// Sixteen fp32 lanes on each instruction set: the only place with intrinsics besides the transposes.
// Everything is in a namespace named after the instruction set, because the same header is compiled several times.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(SENSORIUM_AVX512_BF16)
#define SENSORIUM_AVX512
#define SENSORIUM_ISA avx512_bf16
#include <immintrin.h>
#elif defined(SENSORIUM_AVX512)
#define SENSORIUM_ISA avx512
#include <immintrin.h>
#elif defined(SENSORIUM_AVX2)
#define SENSORIUM_ISA avx2
#include <immintrin.h>
#else
#define SENSORIUM_ISA portable
#endif

namespace sensorium {
using bf16 = uint16_t;

namespace SENSORIUM_ISA {

static inline float bf16_to_float(bf16 value) {
    uint32_t bits = uint32_t(value) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

static inline bf16 float_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40);
    return bf16((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

constexpr int kLanes = 16;

#if defined(SENSORIUM_AVX512)

struct vf {
    __m512 v;
};
static inline vf vset(float x) { return {_mm512_set1_ps(x)}; }
static inline vf vzero() { return {_mm512_setzero_ps()}; }
static inline vf vload(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void vstore(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
static inline __mmask16 lanes_mask(int n) { return __mmask16(n >= 16 ? 0xffff : (1u << n) - 1); }
static inline vf vload_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes_mask(n), p)}; }
static inline void vstore_n(float* p, vf a, int n) { _mm512_mask_storeu_ps(p, lanes_mask(n), a.v); }
static inline vf widen(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
static inline vf vload_bf16(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
static inline vf vload_bf16_n(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(lanes_mask(n), p)); }
static inline __m256i narrow(__m512 x) {
#if defined(SENSORIUM_AVX512_BF16)
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i nan = _mm512_set1_epi32(0x7fc00000);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, nan), 16));
#endif
}
static inline void vstore_bf16(bf16* p, vf a) { _mm256_storeu_si256((__m256i*)p, narrow(a.v)); }
static inline void vstore_bf16_n(bf16* p, vf a, int n) { _mm256_mask_storeu_epi16(p, lanes_mask(n), narrow(a.v)); }
static inline vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline vf vmax(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline vf vmin(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline vf vabs(vf a) { return {_mm512_abs_ps(a.v)}; }
static inline vf vcopysign(vf magnitude, vf sign) {
    const __m512i bit = _mm512_set1_epi32(int(0x80000000u));
    return {_mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign.v), _mm512_castps_si512(magnitude.v), 0xca))};
}
// Lane i becomes `other` unless first <= index + i < last.
static inline vf keep_range(vf a, int index, int first, int last, float other) {
    const __m512i lane = _mm512_add_epi32(_mm512_set1_epi32(index),
                                          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __mmask16 keep = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(first)) &
                           _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(last));
    return {_mm512_mask_blend_ps(keep, _mm512_set1_ps(other), a.v)};
}
// Lane i becomes `other` unless bit i is set.
static inline vf keep_bits(vf a, uint32_t bits, float other) {
    return {_mm512_mask_blend_ps(__mmask16(bits), _mm512_set1_ps(other), a.v)};
}
// 2 ** n for integral n, zero far below and infinity far above.
static inline vf scale_by_power(vf a, vf n) { return {_mm512_scalef_ps(a.v, n.v)}; }
static inline vf vround(vf a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline float vsum(vf a) { return _mm512_reduce_add_ps(a.v); }
static inline float vmax_lane(vf a) { return _mm512_reduce_max_ps(a.v); }

struct vbroadcast {
    __m512i v;
};
static inline vbroadcast broadcast32(uint32_t word) { return {_mm512_set1_epi32(int(word))}; }

#if defined(SENSORIUM_AVX512_BF16)

// Sixteen columns of two interleaved bf16 values each.
struct vpair {
    __m512i v;
};
static inline vpair pairs_of(__m512i x) { return {x}; }
static inline vbroadcast pbroadcast(uint32_t pair) { return broadcast32(pair); }
// acc += w[2i] * x[0] + w[2i + 1] * x[1]
static inline vf dot_pair(vf acc, vpair w, vbroadcast x) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)x.v)};
}

#else

// The same with two fp32 multiply-adds, of a pair of x that is fp32 already. Intel's processors start two of them a
// cycle, and one bf16 product every other cycle, which does as much as one multiply-add a cycle.
#define SENSORIUM_FLOAT_PAIRS
struct vpair {
    __m512 even, odd;
};
static inline vpair pairs_of(__m512i x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u))))};
}
struct FloatPair {
    float x0, x1;
};
struct vpair_broadcast {
    __m512 x0, x1;
};
static inline vpair_broadcast pbroadcast(FloatPair pair) { return {_mm512_set1_ps(pair.x0), _mm512_set1_ps(pair.x1)}; }
static inline vf dot_pair(vf acc, vpair w, vpair_broadcast x) {
    return {_mm512_fmadd_ps(w.odd, x.x1, _mm512_fmadd_ps(w.even, x.x0, acc.v))};
}
// Pairs of bf16, which may lie at the end of `out` itself -> pairs of floats.
static inline void widen_pairs(const uint32_t* from, int64_t count, FloatPair* out) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m512i x = _mm512_loadu_si512(from + i);
        const __m512i even = _mm512_slli_epi32(x, 16), odd = _mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u)));
        _mm512_storeu_si512(out + i, _mm512_permutex2var_epi32(even, low, odd));
        _mm512_storeu_si512(out + i + 8, _mm512_permutex2var_epi32(even, high, odd));
    }
    for (; i < count; ++i) {
        const uint32_t pair = from[i];
        out[i] = {bf16_to_float(bf16(pair)), bf16_to_float(bf16(pair >> 16))};
    }
}

#endif

static inline vpair pload(const bf16* p) { return pairs_of(_mm512_loadu_si512(p)); }
static inline vf vload_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
static inline void vstore_f16(uint16_t* p, vf a) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// a < b ? x : y
static inline vf pick_less(vf a, vf b, vf x, vf y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
static inline bool any_less(vf a, vf b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) != 0; }
// Lane i gets lane i ^ Distance, which is 8, 4, 2 or 1.
template <int Distance>
static inline vf swap_lanes(vf a) {
    if constexpr (Distance >= 4)
        return {_mm512_shuffle_f32x4(a.v, a.v, Distance == 8 ? 0x4e : 0xb1)};
    else
        return {_mm512_permute_ps(a.v, Distance == 2 ? 0x4e : 0xb1)};
}

// Sixteen 32-bit sums; four unsigned bytes for each of sixteen columns; four signed bytes for all of them.
struct vi {
    __m512i v;
};
static inline vi izero() { return {_mm512_setzero_si512()}; }
static inline vi iset(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline vi operator+(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline vi operator-(vi a, vi b) { return {_mm512_sub_epi32(a.v, b.v)}; }
static inline vi times128(vi a) { return {_mm512_slli_epi32(a.v, 7)}; }
static inline vi iload(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
static inline void istore(int32_t* p, vi a) { _mm512_storeu_si512(p, a.v); }
static inline vf to_float(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline vf vload_s8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
// Rounded to nearest and stored as signed bytes; the lanes fit.
static inline void vstore_s8(int8_t* p, vf a) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
struct vquad {
    __m512i v;
};
static inline vquad qload(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
static inline void qstore(uint32_t* p, vquad a) { _mm512_storeu_si512(p, a.v); }
static inline vquad qlow(vquad a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
static inline vquad qhigh(vquad a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// a | (bits << Shift & mask); below zero it is a shift to the right.
template <int Shift>
static inline vquad qadd_bits(vquad a, vquad bits, uint32_t mask) {
    const __m512i shifted = Shift >= 0 ? _mm512_slli_epi32(bits.v, unsigned(Shift >= 0 ? Shift : 0))
                                       : _mm512_srli_epi32(bits.v, unsigned(Shift < 0 ? -Shift : 0));
    return {_mm512_ternarylogic_epi32(a.v, shifted, _mm512_set1_epi32(int(mask)), 0xf8)};
}
// Of bytes below 16 what the table has, which begins at a multiple of 16.
static inline vquad qlookup(vquad a, const uint8_t* table) {
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), a.v)};
}
// Not the intrinsic, around which GCC 12 copies every sum twice: that costs a third of the speed.
static inline vi dot_quad(vi acc, vquad w, vbroadcast x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(x.v));
    return acc;
}
static inline vbroadcast qbroadcast(uint32_t quad) { return broadcast32(quad); }
using vquad_broadcast = vbroadcast;

#elif defined(SENSORIUM_AVX2)

struct vf {
    __m256 a, b;
};
static inline vf vset(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline vf vzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline vf vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void vstore(float* p, vf x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
static inline __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
static inline vf vload_bf16(const bf16* p) {
    return {widen(_mm_loadu_si128((const __m128i*)p)), widen(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
static inline __m128i narrow(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
static inline void vstore_bf16(bf16* p, vf x) {
    _mm_storeu_si128((__m128i*)p, narrow(x.a));
    _mm_storeu_si128((__m128i*)(p + 8), narrow(x.b));
}
static inline vf operator+(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline vf operator-(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline vf operator*(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline vf operator/(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline vf fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline vf vmax(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline vf vmin(vf x, vf y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline vf vabs(vf x) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(bit, x.a), _mm256_andnot_ps(bit, x.b)};
}
static inline vf vcopysign(vf magnitude, vf sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(_mm256_and_ps(bit, sign.a), _mm256_andnot_ps(bit, magnitude.a)),
            _mm256_or_ps(_mm256_and_ps(bit, sign.b), _mm256_andnot_ps(bit, magnitude.b))};
}
static inline __m256 keep_range8(__m256 x, int index, int first, int last, float other) {
    const __m256i lane = _mm256_add_epi32(_mm256_set1_epi32(index), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const __m256i keep = _mm256_and_si256(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(first - 1)),
                                          _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane));
    return _mm256_blendv_ps(_mm256_set1_ps(other), x, _mm256_castsi256_ps(keep));
}
static inline vf keep_range(vf x, int index, int first, int last, float other) {
    return {keep_range8(x.a, index, first, last, other), keep_range8(x.b, index + 8, first, last, other)};
}
static inline __m256 keep_bits8(__m256 x, uint32_t bits, float other) {
    const __m256i own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i keep = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), own), own);
    return _mm256_blendv_ps(_mm256_set1_ps(other), x, _mm256_castsi256_ps(keep));
}
static inline vf keep_bits(vf x, uint32_t bits, float other) {
    return {keep_bits8(x.a, bits, other), keep_bits8(x.b, bits >> 8, other)};
}
static inline __m256 scale8(__m256 x, __m256 n) {
    const __m256 low = _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
    const __m256 bounded = _mm256_min_ps(_mm256_max_ps(n, _mm256_set1_ps(-126.0f)), _mm256_set1_ps(128.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(bounded), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(low, _mm256_mul_ps(x, _mm256_castsi256_ps(power)));
}
static inline vf scale_by_power(vf x, vf n) { return {scale8(x.a, n.a), scale8(x.b, n.b)}; }
static inline vf vround(vf x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline float vsum(vf x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
static inline float vmax_lane(vf x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}

struct vpair {
    __m256 a0, a1, b0, b1;  // even and odd elements of columns 0-7 and 8-15
};
static inline __m256 even(__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
static inline __m256 odd(__m256i x) {
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000u))));
}
static inline vpair pload(const bf16* p) {
    const __m256i a = _mm256_loadu_si256((const __m256i*)p), b = _mm256_loadu_si256((const __m256i*)(p + 16));
    return {even(a), odd(a), even(b), odd(b)};
}
struct vbroadcast {
    __m256 x0, x1;
};
static inline vbroadcast pbroadcast(uint32_t pair) {
    const __m256i x = _mm256_set1_epi32(int(pair));
    return {even(x), odd(x)};
}
static inline vf dot_pair(vf acc, vpair w, vbroadcast x) {
    acc.a = _mm256_fmadd_ps(w.a1, x.x1, _mm256_fmadd_ps(w.a0, x.x0, acc.a));
    acc.b = _mm256_fmadd_ps(w.b1, x.x1, _mm256_fmadd_ps(w.b0, x.x0, acc.b));
    return acc;
}
static inline vf vload_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
static inline void vstore_f16(uint16_t* p, vf x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline vf pick_less(vf p, vf q, vf x, vf y) {
    return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(p.a, q.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(p.b, q.b, _CMP_LT_OQ))};
}
static inline bool any_less(vf p, vf q) {
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(p.a, q.a, _CMP_LT_OQ), _mm256_cmp_ps(p.b, q.b, _CMP_LT_OQ)));
}
template <int Distance>
static inline __m256 swap8(__m256 x) {
    return Distance == 4 ? _mm256_permute2f128_ps(x, x, 1) : _mm256_permute_ps(x, Distance == 2 ? 0x4e : 0xb1);
}
template <int Distance>
static inline vf swap_lanes(vf x) {
    if constexpr (Distance == 8)
        return {x.b, x.a};
    else
        return {swap8<Distance>(x.a), swap8<Distance>(x.b)};
}

struct vi {
    __m256i a, b;
};
static inline vi izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline vi iset(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline vi operator+(vi x, vi y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline vi operator-(vi x, vi y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
static inline vi times128(vi x) { return {_mm256_slli_epi32(x.a, 7), _mm256_slli_epi32(x.b, 7)}; }
static inline vi iload(const int32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
static inline void istore(int32_t* p, vi x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)(p + 8), x.b);
}
static inline vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline vf vload_s8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
static inline void vstore_s8(int8_t* p, vf x) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128((__m128i*)p,
                     _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}
struct vquad {
    __m256i a, b;
};
static inline vquad qload(const uint32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
static inline void qstore(uint32_t* p, vquad x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)(p + 8), x.b);
}
static inline vquad qlow(vquad x) {
    const __m256i nibble = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, nibble), _mm256_and_si256(x.b, nibble)};
}
static inline vquad qhigh(vquad x) { return qlow({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
template <int Shift>
static inline __m256i add_bits8(__m256i x, __m256i bits, uint32_t mask) {
    const __m256i shifted =
        Shift >= 0 ? _mm256_slli_epi32(bits, Shift >= 0 ? Shift : 0) : _mm256_srli_epi32(bits, Shift < 0 ? -Shift : 0);
    return _mm256_or_si256(x, _mm256_and_si256(shifted, _mm256_set1_epi32(int(mask))));
}
template <int Shift>
static inline vquad qadd_bits(vquad x, vquad bits, uint32_t mask) {
    return {add_bits8<Shift>(x.a, bits.a, mask), add_bits8<Shift>(x.b, bits.b, mask)};
}
static inline vquad qlookup(vquad x, const uint8_t* table) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table));
    return {_mm256_shuffle_epi8(both, x.a), _mm256_shuffle_epi8(both, x.b)};
}
// As 16-bit halves: the products of unsigned and signed bytes do not fit the instruction made for them.
struct vquad_broadcast {
    __m256i even, odd;
};
static inline vquad_broadcast qbroadcast(uint32_t quad) {
    const __m256i x = _mm256_set1_epi32(int(quad));
    return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}
static inline __m256i dot_quad8(__m256i acc, __m256i w, vquad_broadcast x) {
    const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
    const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(even, x.even), _mm256_madd_epi16(odd, x.odd));
    return _mm256_add_epi32(acc, sum);
}
static inline vi dot_quad(vi acc, vquad w, vquad_broadcast x) {
    return {dot_quad8(acc.a, w.a, x), dot_quad8(acc.b, w.b, x)};
}
// Products of nibbles do fit it: two of them are at most 15 * 127 * 2.
static inline __m256i nibble_broadcast(uint32_t quad) { return _mm256_set1_epi32(int(quad)); }
static inline __m256i dot_nibbles8(__m256i acc, __m256i w, __m256i x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
static inline vi dot_nibbles(vi acc, vquad w, __m256i x) {
    return {dot_nibbles8(acc.a, w.a, x), dot_nibbles8(acc.b, w.b, x)};
}

#else

typedef float f16_t __attribute__((vector_size(64)));
typedef uint32_t u16_t __attribute__((vector_size(64)));
typedef int32_t i16_t __attribute__((vector_size(64)));

struct vf {
    f16_t v;
};
static inline vf vset(float x) { return {x - (f16_t){}}; }
static inline vf vzero() { return {(f16_t){}}; }
static inline vf vload(const float* p) {
    vf out;
    std::memcpy(&out.v, p, 64);
    return out;
}
static inline void vstore(float* p, vf a) { std::memcpy(p, &a.v, 64); }
static inline vf vload_bf16(const bf16* p) {
    vf out;
    for (int i = 0; i < 16; ++i) out.v[i] = bf16_to_float(p[i]);
    return out;
}
static inline void vstore_bf16(bf16* p, vf a) {
    for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(a.v[i]);
}
static inline vf operator+(vf a, vf b) { return {a.v + b.v}; }
static inline vf operator-(vf a, vf b) { return {a.v - b.v}; }
static inline vf operator*(vf a, vf b) { return {a.v * b.v}; }
static inline vf operator/(vf a, vf b) { return {a.v / b.v}; }
static inline vf fma(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }
static inline vf vmax(vf a, vf b) { return {a.v > b.v ? a.v : b.v}; }
static inline vf vmin(vf a, vf b) { return {a.v < b.v ? a.v : b.v}; }
static inline vf vabs(vf a) { return {(f16_t)((u16_t)a.v & 0x7fffffffu)}; }
static inline vf vcopysign(vf magnitude, vf sign) {
    return {(f16_t)(((u16_t)magnitude.v & 0x7fffffffu) | ((u16_t)sign.v & 0x80000000u))};
}
static inline vf keep_range(vf a, int index, int first, int last, float other) {
    for (int i = 0; i < 16; ++i)
        if (index + i < first || index + i >= last) a.v[i] = other;
    return a;
}
static inline vf keep_bits(vf a, uint32_t bits, float other) {
    for (int i = 0; i < 16; ++i)
        if (!(bits >> i & 1)) a.v[i] = other;
    return a;
}
static inline vf vround(vf a) {
    const f16_t magic = vset(12582912.0f).v;  // 1.5 * 2 ** 23
    f16_t rounded = (a.v + magic) - magic;
    return {vabs(a).v < 4194304.0f ? rounded : a.v};
}
static inline vf scale_by_power(vf a, vf n) {
    const f16_t bounded = vmin(vmax(n, vset(-126.0f)), vset(128.0f)).v;
    const i16_t power = (__builtin_convertvector(bounded, i16_t) + 127) << 23;
    return {n.v < -126.0f ? (f16_t){} : a.v * (f16_t)power};
}
static inline float vsum(vf a) {
    float s[16];
    vstore(s, a);
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; ++i) s[i] += s[i + step];
    return s[0];
}
static inline float vmax_lane(vf a) {
    float m = a.v[0];
    for (int i = 1; i < 16; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
}

struct vpair {
    f16_t even, odd;
};
static inline vpair pload(const bf16* p) {
    u16_t bits;
    std::memcpy(&bits, p, 64);
    // The first of two elements is the low half of the 32 bits on little-endian machines, which all our targets are.
    return {(f16_t)(bits << 16), (f16_t)(bits & 0xffff0000u)};
}
struct vbroadcast {
    float x0, x1;
};
static inline vbroadcast pbroadcast(uint32_t pair) {
    return {bf16_to_float(bf16(pair)), bf16_to_float(bf16(pair >> 16))};
}
static inline vf dot_pair(vf acc, vpair w, vbroadcast x) { return {acc.v + w.even * x.x0 + w.odd * x.x1}; }

static inline float f16_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31, fraction = half & 1023;
    if (exponent == 0) {
        const float small = float(fraction) * (1.0f / 16777216.0f);
        return sign ? -small : small;
    }
    const uint32_t bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
static inline vf vload_f16(const uint16_t* p) {
    vf out;
    for (int i = 0; i < 16; ++i) out.v[i] = f16_to_float(p[i]);
    return out;
}

static inline uint16_t float_to_f16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
    bits &= 0x7fffffffu;
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    if (!(magnitude < 65520.0f)) return sign | 0x7c00;
    if (magnitude < 6.103515625e-5f) return uint16_t(sign | uint16_t(__builtin_nearbyintf(magnitude * 16777216.0f)));
    bits += 0xfff + ((bits >> 13) & 1);
    return uint16_t(sign | ((bits >> 13) - (112 << 10)));
}
static inline void vstore_f16(uint16_t* p, vf a) {
    for (int i = 0; i < 16; ++i) p[i] = float_to_f16(a.v[i]);
}
static inline vf pick_less(vf a, vf b, vf x, vf y) { return {a.v < b.v ? x.v : y.v}; }
static inline bool any_less(vf a, vf b) {
    bool found = false;
    for (int i = 0; i < 16; ++i) found |= a.v[i] < b.v[i];
    return found;
}
template <int Distance>
static inline vf swap_lanes(vf a) {
    vf out;
    for (int i = 0; i < 16; ++i) out.v[i] = a.v[i ^ Distance];
    return out;
}

struct vi {
    i16_t v;
};
static inline vi izero() { return {(i16_t){}}; }
static inline vi iset(int32_t x) { return {(i16_t){} + x}; }
static inline vi operator+(vi a, vi b) { return {a.v + b.v}; }
static inline vi operator-(vi a, vi b) { return {a.v - b.v}; }
static inline vi times128(vi a) { return {a.v << 7}; }
static inline vi iload(const int32_t* p) {
    vi out;
    std::memcpy(&out.v, p, 64);
    return out;
}
static inline void istore(int32_t* p, vi a) { std::memcpy(p, &a.v, 64); }
static inline vf to_float(vi a) { return {__builtin_convertvector(a.v, f16_t)}; }
static inline vf vload_s8(const int8_t* p) {
    vf out;
    for (int i = 0; i < 16; ++i) out.v[i] = float(p[i]);
    return out;
}
static inline void vstore_s8(int8_t* p, vf a) {
    const f16_t rounded = vround(a).v;
    for (int i = 0; i < 16; ++i) p[i] = int8_t(rounded[i]);
}
struct vquad {
    u16_t v;
};
static inline vquad qload(const uint32_t* p) {
    vquad out;
    std::memcpy(&out.v, p, 64);
    return out;
}
static inline void qstore(uint32_t* p, vquad a) { std::memcpy(p, &a.v, 64); }
static inline vquad qlow(vquad a) { return {a.v & 0x0f0f0f0fu}; }
static inline vquad qhigh(vquad a) { return {(a.v >> 4) & 0x0f0f0f0fu}; }
template <int Shift>
static inline vquad qadd_bits(vquad a, vquad bits, uint32_t mask) {
    return {a.v | ((Shift >= 0 ? bits.v << (Shift >= 0 ? Shift : 0) : bits.v >> (Shift < 0 ? -Shift : 0)) & mask)};
}
static inline vquad qlookup(vquad a, const uint8_t* table) {
    uint8_t bytes[64];
    std::memcpy(bytes, &a.v, 64);
    for (uint8_t& one : bytes) one = table[one];
    std::memcpy(&a.v, bytes, 64);
    return a;
}
struct vquad_broadcast {
    int32_t x[4];
};
static inline vquad_broadcast qbroadcast(uint32_t quad) {
    return {{int8_t(quad), int8_t(quad >> 8), int8_t(quad >> 16), int8_t(quad >> 24)}};
}
static inline vi dot_quad(vi acc, vquad w, vquad_broadcast x) {
    return {acc.v + (i16_t)(w.v & 255u) * x.x[0] + (i16_t)((w.v >> 8) & 255u) * x.x[1] +
            (i16_t)((w.v >> 16) & 255u) * x.x[2] + (i16_t)(w.v >> 24) * x.x[3]};
}

#endif

#if !defined(SENSORIUM_AVX2)
static inline vquad_broadcast nibble_broadcast(uint32_t quad) { return qbroadcast(quad); }
static inline vi dot_nibbles(vi acc, vquad w, vquad_broadcast x) { return dot_quad(acc, w, x); }
#endif

#if !defined(SENSORIUM_AVX512)
static inline vf vload_n(const float* p, int n) {
    float lanes[16] = {};
    std::memcpy(lanes, p, sizeof(float) * (n < 16 ? n : 16));
    return vload(lanes);
}
static inline void vstore_n(float* p, vf a, int n) {
    float lanes[16];
    vstore(lanes, a);
    std::memcpy(p, lanes, sizeof(float) * (n < 16 ? n : 16));
}
static inline vf vload_bf16_n(const bf16* p, int n) {
    bf16 lanes[16] = {};
    std::memcpy(lanes, p, sizeof(bf16) * (n < 16 ? n : 16));
    return vload_bf16(lanes);
}
static inline void vstore_bf16_n(bf16* p, vf a, int n) {
    bf16 lanes[16];
    vstore_bf16(lanes, a);
    std::memcpy(p, lanes, sizeof(bf16) * (n < 16 ? n : 16));
}
#endif

// 2 ** x, relative error below 2e-7 (a minimax polynomial on [-0.5, 0.5]); exactly 0 for very negative x.
static inline vf exp2(vf x) {
    const vf n = vround(x);
    const vf f = x - n;
    vf p = vset(1.535335725e-4f);
    p = fma(p, f, vset(1.339887619e-3f));
    p = fma(p, f, vset(9.618437391e-3f));
    p = fma(p, f, vset(5.550332465e-2f));
    p = fma(p, f, vset(2.402264791e-1f));
    p = fma(p, f, vset(6.931472029e-1f));
    p = fma(p, f, vset(1.0f));
    return scale_by_power(p, n);
}
static inline vf exp(vf x) { return exp2(x * vset(1.44269504088896f)); }
static inline vf sigmoid(vf x) {
    const vf bounded = vmin(vmax(x, vset(-89.0f)), vset(89.0f));
    return vset(1.0f) / (vset(1.0f) + exp(vzero() - bounded));
}
static inline vf tanh(vf x) { return vset(2.0f) * sigmoid(vset(2.0f) * x) - vset(1.0f); }
// Abramowitz and Stegun 7.1.26, absolute error below 2e-7.
static inline vf erf(vf x) {
    const vf a = vmin(vabs(x), vset(9.0f));
    const vf t = vset(1.0f) / fma(a, vset(0.3275911f), vset(1.0f));
    vf p = vset(1.061405429f);
    p = fma(p, t, vset(-1.453152027f));
    p = fma(p, t, vset(1.421413741f));
    p = fma(p, t, vset(-0.284496736f));
    p = fma(p, t, vset(0.254829592f));
    const vf magnitude = vset(1.0f) - p * t * exp(vzero() - a * a);
    return vcopysign(magnitude, x);
}

}  // namespace SENSORIUM_ISA
}  // namespace sensorium
