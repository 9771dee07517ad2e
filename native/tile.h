// The one inner loop of every matrix product here: C[MR, 32] (+)= A[MR, k] x B[k, 32].
// A and B come in words of neighbours along k: two bf16 (of A, where that is faster, two floats), four bytes or one
// float.
// B: [words][width], C: fp32 or int32.
// Sums run over k in order, one chain per output, so that a result depends neither on the number of rows computed with
// it nor on blocking.
#pragma once

#include "vec.h"

namespace sensorium::SENSORIUM_ISA {

// Only where it was measured: the portable code takes long enough to compile.
#if defined(SENSORIUM_AVX512)
#define SENSORIUM_PRAGMA(text) _Pragma(#text)
#define SENSORIUM_UNROLL(times) SENSORIUM_PRAGMA(GCC unroll times)
#else
#define SENSORIUM_UNROLL(times)
#endif

#if defined(SENSORIUM_AVX512)
constexpr int kTileRows = 12;
#elif defined(SENSORIUM_AVX2)
constexpr int kTileRows = 2;
#else
constexpr int kTileRows = 4;
#endif

#if defined(SENSORIUM_FLOAT_PAIRS)
using PairWord = FloatPair;
#else
using PairWord = uint32_t;
#endif

// What a word of A and a 32-bit word of B hold, and how they are summed.
struct FloatSums {
    static constexpr bool kUnrolled = true;
    using Value = float;
    static vf zero() { return vzero(); }
    static vf load(const float* p) { return vload(p); }
    static void store(float* p, vf v) { vstore(p, v); }
};
struct DotPairs : FloatSums {
    using Word = PairWord;
    static vpair weights(const uint32_t* p) { return pload(reinterpret_cast<const bf16*>(p)); }
    static auto broadcast(Word word) { return pbroadcast(word); }
    template <class Broadcast>
    static vf dot(vf sum, vpair w, Broadcast x) {
        return dot_pair(sum, w, x);
    }
};
struct DotFloats : FloatSums {
    using Word = float;
    static vf weights(const uint32_t* p) { return vload(reinterpret_cast<const float*>(p)); }
    static vf broadcast(float word) { return vset(word); }
    static vf dot(vf sum, vf w, vf x) { return fma(w, x, sum); }
};
struct DotQuads {                             // A: four signed bytes, B: four unsigned ones
    static constexpr bool kUnrolled = false;  // GCC 12 would move most of the sums to memory and back
    using Value = int32_t;
    using Word = uint32_t;
    static vi zero() { return izero(); }
    static vi load(const int32_t* p) { return iload(p); }
    static void store(int32_t* p, vi v) { istore(p, v); }
    static vquad weights(const uint32_t* p) { return qload(p); }
    static vquad_broadcast broadcast(uint32_t word) { return qbroadcast(word); }
    static vi dot(vi sum, vquad w, vquad_broadcast x) { return dot_quad(sum, w, x); }
};

// Word p of row i is a[i * RowStep + p * WordStep]; NV vectors of 16 columns; `ahead`: bytes of B to prefetch, or 0.
template <class Dot, int MR, int NV, int RowStep, int WordStep>
static inline void tile(const typename Dot::Word* a, const uint32_t* b, int64_t words, typename Dot::Value* c,
                        int64_t c_stride, bool accumulate, int64_t ahead) {
    decltype(Dot::zero()) sum[MR][NV];
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NV; ++j) sum[i][j] = accumulate ? Dot::load(c + i * c_stride + j * kLanes) : Dot::zero();
    const auto add_word = [&] {
        // Few rows take the weights at the memory's pace and want them in L1; more rows leave time to wait for L2.
        constexpr int kLocality = MR <= 4 ? 3 : 2;
        __builtin_prefetch(reinterpret_cast<const char*>(b) + ahead, 0, kLocality);
        if (NV == 2) __builtin_prefetch(reinterpret_cast<const char*>(b) + ahead + 64, 0, kLocality);
        decltype(Dot::weights(b)) w[NV];
        for (int j = 0; j < NV; ++j) w[j] = Dot::weights(b + j * kLanes);
        for (int i = 0; i < MR; ++i) {
            const auto x = Dot::broadcast(a[i * RowStep]);
            for (int j = 0; j < NV; ++j) sum[i][j] = Dot::dot(sum[i][j], w[j], x);
        }
        a += WordStep;
        b += NV * kLanes;
    };
    if constexpr (Dot::kUnrolled) {
        SENSORIUM_UNROLL(4)
        for (int64_t p = 0; p < words; ++p) add_word();
    } else {
        for (int64_t p = 0; p < words; ++p) add_word();
    }
    for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NV; ++j) Dot::store(c + i * c_stride + j * kLanes, sum[i][j]);
}

template <class Dot>
using Tile = void (*)(const typename Dot::Word* a, const uint32_t* b, int64_t words, typename Dot::Value* c,
                      int64_t c_stride, bool accumulate, int64_t ahead);

// RowStep 0: A is packed as [words][MR]; otherwise A is a plain matrix with that many words to a row.
template <class Dot, int MR, int NV, int RowStep>
static void tile_entry(const typename Dot::Word* a, const uint32_t* b, int64_t words, typename Dot::Value* c,
                       int64_t c_stride, bool accumulate, int64_t ahead) {
    tile<Dot, MR, NV, RowStep ? RowStep : 1, RowStep ? 1 : MR>(a, b, words, c, c_stride, accumulate, ahead);
}

template <class Dot, int NV, int RowStep, int... I>
static Tile<Dot> pick_tile(int rows, std::integer_sequence<int, I...>) {
    static constexpr Tile<Dot> table[] = {tile_entry<Dot, I + 1, NV, RowStep>...};
    return table[rows - 1];
}

template <class Dot, int RowStep>
static inline Tile<Dot> tile_for(int rows, int vectors) {
    constexpr auto sizes = std::make_integer_sequence<int, kTileRows>{};
    return vectors == 2 ? pick_tile<Dot, 2, RowStep>(rows, sizes) : pick_tile<Dot, 1, RowStep>(rows, sizes);
}

// Cuts `rows` into tiles of nearly equal height.
struct Tiling {
    int64_t rows = 0, count = 0;
    Tiling() = default;
    explicit Tiling(int64_t rows, int64_t height = kTileRows) : rows(rows), count((rows + height - 1) / height) {}
    int64_t start(int64_t i) const { return rows * i / count; }
    int size(int64_t i) const { return int(start(i + 1) - start(i)); }
};

#if defined(SENSORIUM_AVX512)
// 16 x 16 transpose of 32-bit values held in registers.
static inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
#endif

// out[p * step + i] = rows[i][p]: up to 16 rows of `pairs` pairs become columns. A null row reads as zero.
// `stream`: 16 columns are whole cache lines that nobody reads soon.
static inline void transpose_pairs(const bf16* const* rows, int count, int64_t pairs, uint32_t* out, int64_t step,
                                   bool stream = false) {
    int64_t p = 0;
    (void)stream;
#if defined(SENSORIUM_AVX512)
    const __mmask16 keep = lanes_mask(count);
    for (; p < pairs; p += 16) {
        const int width = int(pairs - p < 16 ? pairs - p : 16);
        const __mmask16 columns = lanes_mask(width);
        __m512i r[16];
        for (int i = 0; i < 16; ++i)
            r[i] = i < count && rows[i] ? _mm512_maskz_loadu_epi32(columns, rows[i] + 2 * p) : _mm512_setzero_si512();
        transpose16(r);
        if (stream && width == 16 && count == 16) {
            for (int i = 0; i < 16; ++i) _mm512_stream_si512((__m512i*)(out + (p + i) * step), r[i]);
            continue;
        }
        for (int i = 0; i < 16; ++i)
            if (i < width) _mm512_mask_storeu_epi32(out + (p + i) * step, keep, r[i]);
    }
#endif
    for (; p < pairs; ++p)
        for (int i = 0; i < count; ++i) {
            uint32_t pair = 0;
            if (rows[i]) std::memcpy(&pair, rows[i] + 2 * p, 4);
            out[p * step + i] = pair;
        }
}

// Where to put `count` pairs of bf16, so that `finish_words` can make words of A of them in place.
static inline uint32_t* raw_pairs(PairWord* out, int64_t count) {
    return reinterpret_cast<uint32_t*>(out) + (sizeof(PairWord) / sizeof(uint32_t) - 1) * size_t(count);
}
static inline void finish_words(PairWord* out, int64_t count) {
#if defined(SENSORIUM_FLOAT_PAIRS)
    widen_pairs(raw_pairs(out, count), count, out);
#else
    (void)out, (void)count;
#endif
}

// Packs rows [first, first + count) of x for tile<.., 0>: words [pairs][count]. An odd last element is paired with
// zero.
static inline void pack_rows(const bf16* x, int64_t stride, int64_t first, int count, int64_t k, PairWord* words) {
    const int64_t size_words = (k + 1) / 2 * count;
    uint32_t* out = raw_pairs(words, size_words);
    for (int start = 0; start < count; start += 16) {
        const bf16* rows[16];
        const int size = count - start < 16 ? count - start : 16;
        for (int i = 0; i < size; ++i) rows[i] = x + (first + start + i) * stride;
        transpose_pairs(rows, size, k / 2, out + start, count);
        if (k % 2)
            for (int i = 0; i < size; ++i) out[(k / 2) * count + start + i] = rows[i][k - 1];
    }
    finish_words(words, size_words);
}

}  // namespace sensorium::SENSORIUM_ISA
