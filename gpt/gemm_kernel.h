// How blocks of a product are computed on this CPU: internal to gemm*.cpp and their test.
//
// A product is taken in blocks of `rows` x `columns` of c, over `depth` k's at a time:
//   panels  `rows` rows of a, or `columns` columns of b, over one depth, packed in the order in
//           which multiply() reads them; k padded with zeros to a multiple of `step`
//   sums    `rows` x `columns` floats, row by row, for each block that awaits further depths
// Rows and columns that lie beyond the matrix are zeros in the panels, so that what they hold
// reaches no number that is stored.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "gpt/bf16.h"

namespace lns {

// One panel of a times `count` panels of b: a row of blocks, over one depth.
template <class P> struct BlockRow {
    int64_t k; // a multiple of step
    const P* a;
    const P* b;
    int64_t b_panel; // from one panel of b to the next
    int64_t count;
    float* sums; // of the earlier depths if add; the sums with this depth's, unless it is the last
    bool add, last;

    // At the last depth: m rows and n columns of out = the sums + bias, or out += the sums. Of
    // out_float and out_bf16 one is null; bias, of the same type, may be.
    int64_t m, n, out_row;
    float* out_float;
    const float* bias_float;
    bf16* out_bf16;
    const bf16* bias_bf16;
    bool accumulate;
};

// T: what a and b are stored as. P: what they are packed as.
template <class T, class P> struct Kernel {
    const char* name;
    int rows, columns, step, depth;
    // a(i, p) = a[i·a_row + p·a_column] for i < m ≤ rows, p < k ≤ depth; likewise b(p, j), j < n.
    void (*pack_a)(P* panel, int64_t m, int64_t k, const T* a, int64_t a_row, int64_t a_column);
    void (*pack_b)(P* panel, int64_t k, int64_t n, const T* b, int64_t b_row, int64_t b_column);
    void (*multiply)(const BlockRow<P>& row);
    // Around a thread's calls of multiply(): AMX's registers are given their shape, and let go.
    void (*begin)();
    void (*end)();

    int64_t padded(int64_t k) const { return (k + step - 1) / step * step; }
};

// The fastest that CPU and build have, whatever oneDNN may do; by unit for bf16. Null where the
// CPU lacks the unit.
const Kernel<float, float>* float_kernel(bool allow_avx512 = true);
const Kernel<bf16, float>* widening_kernel(bool allow_avx512 = true);
const Kernel<bf16, bf16>* bf16_kernel(Bf16Unit unit);

// The kernels' products for all threads, and oneDNN's; what gemm() chooses from. oneDNN's are
// false, and nothing done, in builds without it.
template <class T, class P, class OUT>
void kernel_gemm(const Kernel<T, P>& kernel, bool a_transposed, bool b_transposed, int64_t m,
                 int64_t n, int64_t k, const T* a, const T* b, OUT* out, bool accumulate,
                 const OUT* bias);
template <class T, class OUT>
bool onednn_gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const T* a,
                 const T* b, OUT* out, bool accumulate, const OUT* bias);

// packed_gemm() by a given kernel; packed as kernel_pack() left it, kernel_packed_size() P's.
template <class T, class P>
int64_t kernel_packed_size(const Kernel<T, P>& kernel, int64_t k, int64_t n);
template <class T, class P>
void kernel_pack(const Kernel<T, P>& kernel, P* packed, int64_t k, int64_t n, const T* b,
                 int64_t b_row, int64_t b_column);
template <class T, class P>
void kernel_packed_gemm(const Kernel<T, P>& kernel, int64_t m, int64_t n, int64_t k, const T* a,
                        int64_t a_row, int64_t a_column, const P* packed, int64_t packed_k,
                        int64_t packed_n, float* c, int64_t c_row, bool accumulate);

// Memory that only grows and is not cleared, 64-byte aligned. One per thread and use.
struct Scratch {
    void* get(int64_t bytes);
    ~Scratch();

    void* data = nullptr;
    int64_t size = 0;
};

// What ends a block at the last depth, where a kernel has no faster way: columns from j on.
template <class P, class OUT>
inline void store_block(const BlockRow<P>& row, const float* sums, int64_t columns, int64_t j,
                        OUT* out, const OUT* bias) {
    const int64_t n = std::min(columns, row.n - j);
    for (int64_t i = 0; i < row.m; i++) {
        const float* x = sums + i * columns;
        OUT* y = out + i * row.out_row + j;
        if (row.accumulate)
            for (int64_t q = 0; q < n; q++) y[q] = OUT(float(y[q]) + x[q]);
        else if (bias)
            for (int64_t q = 0; q < n; q++) y[q] = OUT(float(bias[j + q]) + x[q]);
        else
            for (int64_t q = 0; q < n; q++) y[q] = OUT(x[q]);
    }
}

template <class P>
inline void store_block(const BlockRow<P>& row, const float* sums, int64_t columns, int64_t j) {
    if (row.out_bf16)
        store_block(row, sums, columns, j, row.out_bf16, row.bias_bf16);
    else
        store_block(row, sums, columns, j, row.out_float, row.bias_float);
}

} // namespace lns
