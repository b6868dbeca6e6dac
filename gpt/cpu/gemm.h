// Matmuls, row-major. gemm() uses all threads, packed_gemm() only the calling one. The same
// operands give the same bits on any number of threads, and a non-finite row or column of an
// operand affects only its own results. The accumulator of bf16 is float.
//
// What gemm() chooses, and the speedup over oneDNN 2.6.3 on one thread of a Xeon with AMX (2048
// rows, 768 and 3072 columns; forward, gradient of the input, of the weights):
//   double                          plain loops, below: the reference
//   bf16 with AMX                   gemm_bf16.cpp          1.15-1.7, 1.2-1.5, 1.4-1.7
//   bf16 with AVX512-BF16           oneDNN; without it gemm_bf16.cpp
//   bf16 without                    gemm_float.cpp, widened while packing
//   float, built for AVX-512, b not transposed and at least 256 columns
//                                   gemm_float.cpp              -, 1.0-2.5, 0.95-2.7
//   float otherwise                 oneDNN; without it gemm_float.cpp
// packed_gemm() is never oneDNN's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "gpt/cpu/bf16.h"

namespace lns {

// The widest vector registers of the target CPU. GCC's and Clang's vector types keep the tiles
// below in registers on any CPU.
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

// c (m, n) = a (m, k) · b (k, n), or c += …, by one thread. Strides are in elements: a(i, p) is
// a[i·a_row + p·a_column], so a may be a transposed matrix; b's and c's columns are adjacent.
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

// out (m, n) = op(a) · op(b) + bias, or out += …; op(a) is (m, k), stored (k, m) if a_transposed;
// op(b) is (k, n), stored (n, k) if b_transposed. bias: (n), or null; not with accumulate.
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
            // Neighbouring blocks share columns, and so the panel of b.
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

// About how much memory the kernels keep after a matmul of this shape.
int64_t gemm_scratch(int64_t m, int64_t n, int64_t k, int64_t element_bytes, int threads);

void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const double* a,
          const double* b, double* out, bool accumulate, const double* bias = nullptr);
void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const float* a,
          const float* b, float* out, bool accumulate, const float* bias = nullptr);
void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const bf16* a,
          const bf16* b, bf16* out, bool accumulate, const bf16* bias = nullptr);
void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const bf16* a,
          const bf16* b, float* out, bool accumulate, const float* bias = nullptr);

// Matmuls of one thread, for use inside a parallel region: b is packed once and multiplied by many
// a. S is double, float or bf16, Sum its accumulator.
template <class S> using Sum = std::conditional_t<std::is_same_v<S, double>, double, float>;

// The elements that pack() writes.
template <class S> int64_t packed_size(int64_t k, int64_t n);

// b(p, j) = b[p·b_row + j·b_column], p < k, j < n. packed is 64-byte aligned.
template <class S>
void pack(S* packed, int64_t k, int64_t n, const S* b, int64_t b_row, int64_t b_column);

// c (m, n) = a (m, k) · b's first k rows and n columns, or c += it; packed_k and packed_n are the
// sizes given to pack(). a(i, p) = a[i·a_row + p·a_column], one of these strides being 1; c's rows
// are c_row apart, its columns adjacent.
template <class S>
void packed_gemm(int64_t m, int64_t n, int64_t k, const S* a, int64_t a_row, int64_t a_column,
                 const S* packed, int64_t packed_k, int64_t packed_n, Sum<S>* c, int64_t c_row,
                 bool accumulate);

} // namespace lns
