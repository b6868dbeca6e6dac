// bf16 matmul kernels for AMX tiles and for AVX512-BF16's dot products of pairs. Compiled in every
// x86-64 build; bf16_unit() tells at run time whether the CPU supports them.
//
// Both instructions sum pairs of k: b's panel holds b(2q, j) and b(2q + 1, j) side by side. Per
// step of 32 k's, a panel of a is two tiles of 16 rows of 32 k's, and a panel of b two tiles of 16
// pairs of 16 columns; a tile has 1 KiB. Products are exact and summed in float; subnormals count
// as 0 (Intel, Software Developer's Manual, TDPBF16PS).
#include "gpt/cpu/gemm_kernel.h"

#if defined(__x86_64__)
#if !defined(__clang__)
// g++ 12 warns of registers that its own headers leave undefined on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace lns {

#if defined(__x86_64__)

// For every function that uses these instructions or is inlined into one that does.
#define LNS_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prfchw")))
#define LNS_AMX                                                                                    \
    __attribute__((                                                                                \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,prfchw")))

namespace {

const int block_rows = 32, block_columns = 32, step = 32, tile = 512;

LNS_AVX512 inline __mmask32 first(int64_t count) {
    return count >= 32 ? ~__mmask32(0) : count <= 0 ? 0 : (__mmask32(1) << count) - 1;
}

// Transposes 16 x 16 values of 32 bits.
LNS_AVX512 inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { // r[i + c]: column c of each 4 x 4 block in rows i to i + 3
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; c++) {
        t[c] = _mm512_shuffle_i32x4(r[c], r[c + 4], 0x88);
        t[c + 4] = _mm512_shuffle_i32x4(r[c], r[c + 4], 0xdd);
        t[c + 8] = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0x88);
        t[c + 12] = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0xdd);
    }
    for (int c = 0; c < 4; c++) {
        r[c] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0x88);
        r[c + 8] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0xdd);
        r[c + 4] = _mm512_shuffle_i32x4(t[c + 4], t[c + 12], 0x88);
        r[c + 12] = _mm512_shuffle_i32x4(t[c + 4], t[c + 12], 0xdd);
    }
}

// Interleaves rows x and y of 32 values as pairs (x, y): the first 16 and the last 16.
LNS_AVX512 inline void pair(__m512i x, __m512i y, __m512i& low, __m512i& high) {
    const __m512i from_low =
        _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i from_high = _mm512_add_epi16(from_low, _mm512_set1_epi16(16));
    low = _mm512_permutex2var_epi16(x, from_low, y);
    high = _mm512_permutex2var_epi16(x, from_high, y);
}

LNS_AVX512 void pack_a(bf16* panel, int64_t m, int64_t k, const bf16* a, int64_t a_row,
                       int64_t a_column) {
    if (a_column == 1) {
        for (int64_t p = 0; p < k; p += step, panel += 2 * tile) {
            const __mmask32 mask = first(k - p);
            for (int64_t i = 0; i < m; i++)
                _mm512_store_si512(panel + i * step,
                                   _mm512_maskz_loadu_epi16(mask, a + i * a_row + p));
            for (int64_t i = m; i < block_rows; i++)
                _mm512_store_si512(panel + i * step, _mm512_setzero_si512());
        }
        return;
    }
    const __mmask32 mask = first(m);
    for (int64_t p = 0; p < k; p += step, panel += 2 * tile) {
        __m512i low[16], high[16];
        const bf16* row = a + p * a_column;
        for (int64_t q = 0; q < 16; q++, row += 2 * a_column) {
            const int64_t left = k - p - 2 * q;
            pair(_mm512_maskz_loadu_epi16(left > 0 ? mask : 0, row),
                 _mm512_maskz_loadu_epi16(left > 1 ? mask : 0, row + a_column), low[q], high[q]);
        }
        transpose(low);
        for (int i = 0; i < 16; i++) _mm512_store_si512(panel + i * step, low[i]);
        transpose(high);
        for (int i = 0; i < 16; i++) _mm512_store_si512(panel + tile + i * step, high[i]);
    }
}

LNS_AVX512 void pack_b(bf16* panel, int64_t k, int64_t n, const bf16* b, int64_t b_row,
                       int64_t b_column) {
    if (b_column == 1) {
        const __mmask32 mask = first(n);
        for (int64_t p = 0; p < k; p += step, panel += 2 * tile)
            for (int64_t q = 0; q < 16; q++) {
                const int64_t left = k - p - 2 * q;
                const bf16* row = b + (p + 2 * q) * b_row;
                __m512i low, high;
                pair(_mm512_maskz_loadu_epi16(left > 0 ? mask : 0, row),
                     _mm512_maskz_loadu_epi16(left > 1 ? mask : 0, row + b_row), low, high);
                _mm512_store_si512(panel + q * 32, low);
                _mm512_store_si512(panel + tile + q * 32, high);
            }
        return;
    }
    for (int64_t p = 0; p < k; p += step)
        for (int64_t j0 = 0; j0 < block_columns; j0 += 16, panel += tile) {
            const __mmask32 mask = first(k - p);
            __m512i r[16];
            for (int64_t j = 0; j < 16; j++)
                r[j] = _mm512_maskz_loadu_epi16(j0 + j < n ? mask : 0, b + (j0 + j) * b_column + p);
            transpose(r);
            for (int q = 0; q < 16; q++) _mm512_store_si512(panel + q * 32, r[q]);
        }
}

LNS_AVX512 inline __m512 widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

LNS_AVX512 inline __m512 widen_low(__m512i x) { return widen(_mm512_castsi512_si256(x)); }
LNS_AVX512 inline __m512 widen_high(__m512i x) { return widen(_mm512_extracti64x4_epi64(x, 1)); }

// Stores row i after the last depth; y0 and y1 are its sums over all depths.
LNS_AVX512 inline void store_row(const BlockColumn<bf16>& x, int64_t i, __mmask32 mask, __m512 y0,
                                 __m512 y1) {
    const __mmask16 low = __mmask16(mask), high = __mmask16(mask >> 16);
    if (x.out_bf16) {
        bf16* out = x.out_bf16 + i * x.out_row;
        if (const bf16* before = x.accumulate ? out : x.bias_bf16) {
            const __m512i z = _mm512_maskz_loadu_epi16(mask, before);
            y0 = _mm512_add_ps(widen_low(z), y0), y1 = _mm512_add_ps(widen_high(z), y1);
        }
        _mm512_mask_storeu_epi16(out, mask, (__m512i)_mm512_cvtne2ps_pbh(y1, y0));
    } else {
        float* out = x.out_float + i * x.out_row;
        if (const float* before = x.accumulate ? out : x.bias_float) {
            y0 = _mm512_add_ps(_mm512_maskz_loadu_ps(low, before), y0);
            y1 = _mm512_add_ps(_mm512_maskz_loadu_ps(high, before + 16), y1);
        }
        _mm512_mask_storeu_ps(out, low, y0);
        _mm512_mask_storeu_ps(out + 16, high, y1);
    }
}

// Adds to row i its sums y0 and y1 over one depth, and stores it after the last.
LNS_AVX512 inline void accumulate_row(const BlockColumn<bf16>& x, int64_t i, __mmask32 mask,
                                      __m512 y0, __m512 y1) {
    float* accumulators = nullptr; // stays null if there is only one depth
    if (x.accumulators)
        accumulators =
            x.accumulators + i / block_rows * x.accumulator_stride + i % block_rows * block_columns;
    if (x.accumulators_valid) y0 = _mm512_add_ps(_mm512_load_ps(accumulators), y0);
    if (x.accumulators_valid) y1 = _mm512_add_ps(_mm512_load_ps(accumulators + 16), y1);
    if (x.last_depth) {
        store_row(x, i, mask, y0, y1);
    } else {
        _mm512_store_ps(accumulators, y0);
        _mm512_store_ps(accumulators + 16, y1);
    }
}

template <int M>
LNS_AVX512 inline void dot_rows(const BlockColumn<bf16>& x, int64_t block, int64_t i0) {
    const bf16 *a = x.a + block * x.a_panel_stride + i0 * step, *b = x.b;
    __m512 sum[M][2];
    for (int i = 0; i < M; i++)
        for (int q = 0; q < 2; q++) sum[i][q] = _mm512_setzero_ps();
    for (int64_t p = 0; p < x.k; p += step, a += 2 * tile, b += 2 * tile)
        for (int q = 0; q < 16; q++) {
            const __m512bh b0 = (__m512bh)_mm512_load_si512(b + q * 32);
            const __m512bh b1 = (__m512bh)_mm512_load_si512(b + tile + q * 32);
            for (int i = 0; i < M; i++) {
                int two;
                __builtin_memcpy(&two, a + i * step + 2 * q, 4);
                const __m512bh y = (__m512bh)_mm512_set1_epi32(two);
                sum[i][0] = _mm512_dpbf16_ps(sum[i][0], y, b0);
                sum[i][1] = _mm512_dpbf16_ps(sum[i][1], y, b1);
            }
        }
    for (int i = 0; i < M; i++)
        if (!x.last_depth || block * block_rows + i0 + i < x.m)
            accumulate_row(x, block * block_rows + i0 + i, first(x.n), sum[i][0], sum[i][1]);
}

LNS_AVX512 void dot(const BlockColumn<bf16>& x) {
    for (int64_t block = 0; block < x.count; block++)
        for (int i = 0; i < block_rows; i += 8)
            if (block * block_rows + i < x.m) dot_rows<8>(x, block, i);
}

void nothing() {}

const Kernel<bf16, bf16> avx512_kernel = {
    "AVX512-BF16", block_rows, block_columns, step, 256, pack_a, pack_b, dot, nothing, nothing};

struct alignas(64) TileShapes { // Intel, Software Developer's Manual, LDTILECFG
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileShapes tile_shapes;

// Tiles 0 to 3 are the block's quarters, 4 and 5 a's rows, 6 and 7 b's columns. Blocks that cannot
// be stored directly from the tiles alternate between two buffers: while the tiles multiply one
// block, the vector units accumulate or store the previous one, a few rows at each step.
LNS_AMX void multiply_tiles(const BlockColumn<bf16>& x) {
    alignas(64) float buffers[2][block_rows * block_columns];
    const int64_t steps = x.k / step;
    const int64_t slice = (block_rows + steps - 1) / steps;
    const __mmask32 mask = first(x.n);
    // Whether full blocks can be stored directly from the tiles.
    const bool direct =
        !x.accumulators_valid &&
        (!x.last_depth || (x.out_float && !x.accumulate && !x.bias_float && x.n == block_columns));
    for (int64_t i = 0; i < x.count; i++) {
        const bf16 *a = x.a + i * x.a_panel_stride, *b = x.b;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        float* c = x.accumulators + i * x.accumulator_stride;
        int64_t row = block_columns;
        const bool full = !x.last_depth || (i + 1) * block_rows <= x.m;
        if (!direct || !full)
            c = buffers[i % 2];
        else if (x.last_depth)
            c = x.out_float + i * block_rows * x.out_row, row = x.out_row;
        int64_t previous = (i - 1) * block_rows;
        const int64_t previous_end = i > 0 && !direct ? previous + block_rows : previous;
        // Prefetch this block's output into the L2 cache: rows a multiple of 4 KiB apart would
        // evict each other from L1.
        int64_t fetched = i * block_rows;
        const int64_t fetched_end = x.last_depth ? std::min(x.m, fetched + block_rows) : fetched;
        for (int64_t s = 0; s < steps; s++, a += 2 * tile, b += 2 * tile) {
            for (int64_t end = std::min(fetched_end, fetched + slice); fetched < end; fetched++) {
                if (x.out_bf16)
                    _mm_prefetch(x.out_bf16 + fetched * x.out_row, _MM_HINT_T1);
                else {
                    _mm_prefetch(x.out_float + fetched * x.out_row, _MM_HINT_T1);
                    _mm_prefetch(x.out_float + fetched * x.out_row + 16, _MM_HINT_T1);
                }
            }
            _tile_loadd(4, a, 64);
            _tile_loadd(6, b, 64);
            _tile_loadd(7, b + tile, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, a + tile, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            for (int64_t end = std::min(previous_end, previous + slice); previous < end;
                 previous++) {
                const float* y = buffers[(i + 1) % 2] + previous % block_rows * block_columns;
                accumulate_row(x, previous, mask, _mm512_load_ps(y), _mm512_load_ps(y + 16));
            }
        }
        _tile_stored(0, c, row * 4);
        _tile_stored(1, c + 16, row * 4);
        _tile_stored(2, c + 16 * row, row * 4);
        _tile_stored(3, c + 16 * row + 16, row * 4);
    }
    const int64_t end = x.last_depth ? x.m : x.count * block_rows;
    if (!direct || end % block_rows != 0)
        for (int64_t i = (x.count - 1) * block_rows; i < end; i++) {
            const float* y = buffers[(x.count + 1) % 2] + i % block_rows * block_columns;
            accumulate_row(x, i, mask, _mm512_load_ps(y), _mm512_load_ps(y + 16));
        }
}

// g++ 12 misses that _tile_loadconfig reads memory, and would drop the stores before it.
LNS_AMX void begin_tiles() { asm volatile("ldtilecfg %0" ::"m"(tile_shapes)); }
LNS_AMX void end_tiles() { _tile_release(); }

const Kernel<bf16, bf16> amx_kernel = {"AMX-BF16",  block_rows, block_columns, step,
                                       1024,        pack_a,     pack_b,        multiply_tiles,
                                       begin_tiles, end_tiles};

} // namespace

const Kernel<bf16, bf16>* bf16_kernel(Bf16Unit unit) {
    return unit == Bf16Unit::amx      ? &amx_kernel
           : unit == Bf16Unit::avx512 ? &avx512_kernel
                                      : nullptr;
}

#else

const Kernel<bf16, bf16>* bf16_kernel(Bf16Unit) { return nullptr; }

#endif

} // namespace lns
