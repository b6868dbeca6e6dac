// The matmul kernels of this CPU: internal to gemm*.cpp and their test.
//
// A matmul is computed in blocks of `rows` x `columns` of c, at most `depth` of k at a time:
//   panels  `rows` rows of a, or `columns` columns of b, over one depth, packed in the order in
//           which multiply() reads them; k is padded with zeros to a multiple of `step`
//   sums    the accumulators of a block, `rows` x `columns` floats, between depths
// Panels are padded with zeros beyond the matrix; the results there are not stored.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "gpt/cpu/bf16.h"

namespace lns {

// Kernels sum parts of k from zero, then add the parts: this many k in float, a depth in bf16. The
// rounding error of a sum over K grows as √(part + K/part); that of one chain of additions as √K.
const int64_t sum_part = 256;

// A column of blocks over one depth: `count` panels of a times one of b.
template <class P> struct BlockColumn {
    int64_t k; // a multiple of step
    const P* a;
    int64_t a_panel; // from one panel of a to the next
    int64_t count;
    const P* b;
    float* sums; // in: the earlier depths, if add; out: with this depth, unless it is the last
    int64_t sums_block; // from one block's to the next
    bool add, last;

    // At the last depth: out (m, n) = sums + bias, or out += sums. One of out_float and out_bf16 is
    // null; the bias may be.
    int64_t m, n, out_row;
    float* out_float;
    const float* bias_float;
    bf16* out_bf16;
    const bf16* bias_bf16;
    bool accumulate;
};

// T: the scalar of a and b in memory. P: of the panels.
template <class T, class P> struct Kernel {
    const char* name;
    int rows, columns, step, depth;
    // a(i, p) = a[i·a_row + p·a_column] for i < m ≤ rows, p < k ≤ depth; likewise b(p, j), j < n.
    void (*pack_a)(P* panel, int64_t m, int64_t k, const T* a, int64_t a_row, int64_t a_column);
    void (*pack_b)(P* panel, int64_t k, int64_t n, const T* b, int64_t b_row, int64_t b_column);
    void (*multiply)(const BlockColumn<P>& x);
    // Called around a thread's multiply(): configure and release AMX's tiles.
    void (*begin)();
    void (*end)();

    int64_t padded(int64_t k) const { return (k + step - 1) / step * step; }
    // The depth of every part of k but the last.
    int64_t depth_of(int64_t k) const {
        const int64_t parts = (k + depth - 1) / depth;
        return padded((k + parts - 1) / parts);
    }
};

// The fastest kernel of this CPU and build, oneDNN aside. Null if the CPU lacks the unit.
const Kernel<float, float>* float_kernel();
const Kernel<bf16, float>* widening_kernel();
const Kernel<bf16, bf16>* bf16_kernel(Bf16Unit unit);

// gemm() chooses between these two. onednn_gemm() returns false, and does nothing, without oneDNN.
template <class T, class P, class OUT>
void kernel_gemm(const Kernel<T, P>& kernel, bool a_transposed, bool b_transposed, int64_t m,
                 int64_t n, int64_t k, const T* a, const T* b, OUT* out, bool accumulate,
                 const OUT* bias);
template <class T, class OUT>
bool onednn_gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const T* a,
                 const T* b, OUT* out, bool accumulate, const OUT* bias);

// packed_gemm() by a given kernel; packed: kernel_packed_size() elements by kernel_pack().
template <class T, class P>
int64_t kernel_packed_size(const Kernel<T, P>& kernel, int64_t k, int64_t n);
template <class T, class P>
void kernel_pack(const Kernel<T, P>& kernel, P* packed, int64_t k, int64_t n, const T* b,
                 int64_t b_row, int64_t b_column);
template <class T, class P>
void kernel_packed_gemm(const Kernel<T, P>& kernel, int64_t m, int64_t n, int64_t k, const T* a,
                        int64_t a_row, int64_t a_column, const P* packed, int64_t packed_k,
                        int64_t packed_n, float* c, int64_t c_row, bool accumulate);

// Growing memory, not cleared, 64-byte aligned. One per thread and use.
struct Scratch {
    void* get(int64_t bytes);
    ~Scratch();

    void* data = nullptr;
    int64_t size = 0;
};

// Stores block i after the last depth, unless a kernel has a faster way.
template <class P, class OUT>
inline void store_block(const BlockColumn<P>& x, const float* sums, int64_t i, int64_t rows,
                        int64_t columns, OUT* out, const OUT* bias) {
    for (int64_t r = 0; r < std::min(rows, x.m - i * rows); r++) {
        const float* sum = sums + r * columns;
        OUT* y = out + (i * rows + r) * x.out_row;
        if (x.accumulate)
            for (int64_t j = 0; j < x.n; j++) y[j] = OUT(float(y[j]) + sum[j]);
        else if (bias)
            for (int64_t j = 0; j < x.n; j++) y[j] = OUT(float(bias[j]) + sum[j]);
        else
            for (int64_t j = 0; j < x.n; j++) y[j] = OUT(sum[j]);
    }
}

template <class P>
inline void store_block(const BlockColumn<P>& x, const float* sums, int64_t i, int64_t rows,
                        int64_t columns) {
    if (x.out_bf16)
        store_block(x, sums, i, rows, columns, x.out_bf16, x.bias_bf16);
    else
        store_block(x, sums, i, rows, columns, x.out_float, x.bias_float);
}

} // namespace lns
