// Row-major matmuls. gemm() uses all threads, packed_gemm() the calling one. Results do not depend
// on the number of threads, and each depends only on its own row of a and column of b, whatever
// else the operands hold. Accumulators of bf16 are float.
//
// The implementations that gemm() chooses from, with the kernels' speedup over oneDNN 2.6.3 where
// measured (one thread of a Xeon with AMX, 2048 rows, 768 and 3072 columns; forward, gradient of
// the input, of the weights):
//   double                          plain loops, below: the reference
//   bf16 with AMX                   gemm_bf16.cpp          1.15-1.7, 1.2-1.5, 1.4-1.7
//   bf16 with AVX512-BF16           oneDNN; in builds without it gemm_bf16.cpp
//   bf16 on other CPUs              gemm_float.cpp, widening while packing
//   float, built for AVX-512, b not transposed and at least 256 columns
//                                   gemm_float.cpp              -, 1.0-2.5, 0.95-2.7
//   other float                     oneDNN; in builds without it gemm_float.cpp
// packed_gemm() never uses oneDNN.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "gpt/cpu/bf16.h"

namespace lns {

// The target CPU's widest vector registers. GCC's and Clang's vector types keep the tiles below in
// registers on any CPU.
#if defined(__AVX512F__)
const int vector_bytes = 64, tile_rows = 8;
#elif defined(__AVX__)
const int vector_bytes = 32, tile_rows = 4;
#else
const int vector_bytes = 16, tile_rows = 4;
#endif

// One tile of MR rows and N vectors of Bytes: c = Σ_p a(i, p) · b(p, ·), or c += it.
template <int MR, int N, int Bytes, class S>
inline void gemm_tile(int64_t k, const S* a, int64_t a_row, int64_t a_column, const S* b,
                      int64_t b_row, S* c, int64_t c_row, bool accumulate) {
    typedef S Vector __attribute__((vector_size(Bytes)));
    typedef S Unaligned __attribute__((vector_size(Bytes), aligned(sizeof(S)), may_alias));
    const int width = Bytes / sizeof(S);
    Vector t[MR][N] = {};
    for (int64_t p = 0; p < k; p++) {
        Vector x[N];
        for (int j = 0; j < N; j++) x[j] = *(const Unaligned*)(b + p * b_row + j * width);
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < N; j++) t[i][j] += a[i * a_row + p * a_column] * x[j];
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < N; j++) {
            Unaligned& to = *(Unaligned*)(c + i * c_row + j * width);
            to = accumulate ? to + t[i][j] : t[i][j];
        }
}

template <int N, int Bytes, class S>
inline void gemm_columns(int64_t m, int64_t k, const S* a, int64_t a_row, int64_t a_column,
                         const S* b, int64_t b_row, S* c, int64_t c_row, bool accumulate) {
    int64_t i = 0;
    for (; i + tile_rows <= m; i += tile_rows)
        gemm_tile<tile_rows, N, Bytes>(k, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row,
                                       c_row, accumulate);
    for (; i < m; i++)
        gemm_tile<1, N, Bytes>(k, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row,
                               accumulate);
}

// c (m, n) = or += a (m, k) · b (k, n), on one thread. Strides are in elements: a(i, p) is
// a[i·a_row + p·a_column], so a may be transposed; columns of b and c are adjacent.
template <class S>
void small_gemm(int64_t m, int64_t n, int64_t k, const S* a, int64_t a_row, int64_t a_column,
                const S* b, int64_t b_row, S* c, int64_t c_row, bool accumulate) {
    int64_t j = 0;
    auto columns = [&]<int N, int Bytes>() {
        for (const int64_t width = N * Bytes / sizeof(S); j + width <= n; j += width)
            gemm_columns<N, Bytes>(m, k, a, a_row, a_column, b + j, b_row, c + j, c_row,
                                   accumulate);
    };
    columns.template operator()<2, vector_bytes>();
    columns.template operator()<1, vector_bytes>();
    columns.template operator()<1, 16>();
    columns.template operator()<1, sizeof(S)>();
}

// out (m, n) = op(a) · op(b) + bias, or out += op(a) · op(b) if accumulate, without bias. op(a) is
// (m, k), stored (k, m) if a_transposed; op(b) is (k, n), stored (n, k) if b_transposed. bias: (n)
// or null.
template <class S>
void plain_gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const S* a,
                const S* b, S* out, bool accumulate, const S* bias) {
    const int64_t rows = 64, columns = 128, depth = 256;
    const int64_t row_blocks = (m + rows - 1) / rows, column_blocks = (n + columns - 1) / columns;
#pragma omp parallel
    {
        std::vector<S> panel(b_transposed ? depth * columns : 0);
#pragma omp for
        for (int64_t block = 0; block < row_blocks * column_blocks; block++) {
            // Consecutive blocks share columns of b.
            const int64_t i0 = block % row_blocks * rows, j0 = block / row_blocks * columns;
            const int64_t mb = std::min(rows, m - i0), nb = std::min(columns, n - j0);
            S* c = out + i0 * n + j0;
            for (int64_t i = 0; i < mb && !accumulate; i++)
                for (int64_t j = 0; j < nb; j++) c[i * n + j] = bias ? bias[j0 + j] : S(0);
            for (int64_t p0 = 0; p0 < k; p0 += depth) {
                const int64_t kb = std::min(depth, k - p0);
                const S* bp = b + p0 * n + j0;
                if (b_transposed) {
                    for (int64_t j = 0; j < nb; j++)
                        for (int64_t p = 0; p < kb; p++)
                            panel[p * columns + j] = b[(j0 + j) * k + p0 + p];
                    bp = panel.data();
                }
                const S* ap = a_transposed ? a + p0 * m + i0 : a + i0 * k + p0;
                small_gemm(mb, nb, kb, ap, a_transposed ? 1 : k, a_transposed ? m : 1, bp,
                           b_transposed ? columns : n, c, n, true);
            }
        }
    }
}

// Approximate bytes of scratch memory that the kernels keep after a matmul of this shape.
int64_t gemm_scratch(int64_t m, int64_t n, int64_t k, int64_t element_bytes, int threads);

void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const double* a,
          const double* b, double* out, bool accumulate, const double* bias = nullptr);
void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const float* a,
          const float* b, float* out, bool accumulate, const float* bias = nullptr);
void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const bf16* a,
          const bf16* b, bf16* out, bool accumulate, const bf16* bias = nullptr);
void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const bf16* a,
          const bf16* b, float* out, bool accumulate, const float* bias = nullptr);

// Single-threaded matmuls for parallel regions: b is packed once and multiplied by many a. S is
// double, float or bf16; accumulators of bf16 are float.
template <class S> using Sum = std::conditional_t<std::is_same_v<S, double>, double, float>;

// The number of S that pack() writes.
template <class S> int64_t packed_size(int64_t k, int64_t n);

// Packs b(p, j) = b[p·b_row + j·b_column], p < k, j < n. packed must be 64-byte aligned.
template <class S>
void pack(S* packed, int64_t k, int64_t n, const S* b, int64_t b_row, int64_t b_column);

// c (m, n) = or += a (m, k) · the first k rows and n columns of b, which pack() was given with
// packed_k rows and packed_n columns. a(i, p) = a[i·a_row + p·a_column], where one stride is 1; c's
// rows are c_row apart, its columns adjacent.
template <class S>
void packed_gemm(int64_t m, int64_t n, int64_t k, const S* a, int64_t a_row, int64_t a_column,
                 const S* packed, int64_t packed_k, int64_t packed_n, Sum<S>* c, int64_t c_row,
                 bool accumulate);

} // namespace lns
