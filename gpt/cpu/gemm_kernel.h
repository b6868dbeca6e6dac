// The matmul kernels of this CPU: internal to gemm*.cpp and their test.
//
// A matmul is computed in blocks of `rows` x `columns` of c, over at most `depth` k's at a time:
//   panels        `rows` rows of a, or `columns` columns of b, over one depth, packed in the order
//                 in which multiply() reads them; k is padded with zeros to a multiple of `step`
//   accumulators  `rows` x `columns` floats, row-major, for each block with further depths to come
// Rows and columns beyond the matrix are zero in the panels and are not stored.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "gpt/cpu/bf16.h"

namespace lns {

// Kernels sum parts of k separately, from zero, and then add them up: parts of this length in
// float, of a depth in bf16. The rounding error of a sum over K grows as √(part + K/part), and
// without parts as √K.
const int64_t sum_part = 256;

// A column of blocks over one depth: `count` panels of a times one panel of b.
template <class P> struct BlockColumn {
    int64_t k; // a multiple of step
    const P* a;
    int64_t a_panel_stride; // stride between panels
    int64_t count;
    const P* b;
    float* accumulators;        // read if valid, written unless last_depth
    int64_t accumulator_stride; // stride between blocks
    bool accumulators_valid;    // not the first depth
    bool last_depth;            // the last depth

    // At the last depth: m rows and n columns of out = accumulators + bias, or out += accumulators.
    // One of out_float and out_bf16 is null. bias has the same type and may be null.
    int64_t m, n, out_row;
    float* out_float;
    const float* bias_float;
    bf16* out_bf16;
    const bf16* bias_bf16;
    bool accumulate;
};

// T: the type that a and b are stored in. P: the type that they are packed in.
template <class T, class P> struct Kernel {
    const char* name;
    int rows, columns, step, depth;
    // a(i, p) = a[i·a_row + p·a_column] for i < m ≤ rows, p < k ≤ depth; likewise b(p, j), j < n.
    void (*pack_a)(P* panel, int64_t m, int64_t k, const T* a, int64_t a_row, int64_t a_column);
    void (*pack_b)(P* panel, int64_t k, int64_t n, const T* b, int64_t b_row, int64_t b_column);
    void (*multiply)(const BlockColumn<P>& x);
    // Called around a thread's calls of multiply(): configure and release AMX's tiles.
    void (*begin)();
    void (*end)();

    int64_t padded(int64_t k) const { return (k + step - 1) / step * step; }
    // The length of all parts of k but the last.
    int64_t depth_of(int64_t k) const {
        const int64_t parts = (k + depth - 1) / depth;
        return padded((k + parts - 1) / parts);
    }
};

// The fastest kernels of this CPU and build; for bf16, those of a unit, or null for Bf16Unit::none.
const Kernel<float, float>* float_kernel();
const Kernel<bf16, float>* widening_kernel();
const Kernel<bf16, bf16>* bf16_kernel(Bf16Unit unit);

// The multithreaded matmuls that gemm() chooses from. In builds without oneDNN, onednn_gemm() does
// nothing and returns false.
template <class T, class P, class OUT>
void kernel_gemm(const Kernel<T, P>& kernel, bool a_transposed, bool b_transposed, int64_t m,
                 int64_t n, int64_t k, const T* a, const T* b, OUT* out, bool accumulate,
                 const OUT* bias);
template <class T, class OUT>
bool onednn_gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const T* a,
                 const T* b, OUT* out, bool accumulate, const OUT* bias);

// packed_size(), pack() and packed_gemm() with a given kernel; sizes in elements of P.
template <class T, class P>
int64_t kernel_packed_size(const Kernel<T, P>& kernel, int64_t k, int64_t n);
template <class T, class P>
void kernel_pack(const Kernel<T, P>& kernel, P* packed, int64_t k, int64_t n, const T* b,
                 int64_t b_row, int64_t b_column);
template <class T, class P>
void kernel_packed_gemm(const Kernel<T, P>& kernel, int64_t m, int64_t n, int64_t k, const T* a,
                        int64_t a_row, int64_t a_column, const P* packed, int64_t packed_k,
                        int64_t packed_n, float* c, int64_t c_row, bool accumulate);

// Uninitialized memory that only grows; aligned for any vector. One per thread and use.
struct Scratch {
    void* get(int64_t bytes);
    ~Scratch();

    void* data = nullptr;
    int64_t size = 0;
};

// Stores block i after the last depth, for kernels without a faster way.
template <class P, class OUT>
inline void store_block(const BlockColumn<P>& x, const float* accumulators, int64_t i, int64_t rows,
                        int64_t columns, OUT* out, const OUT* bias) {
    for (int64_t r = 0; r < std::min(rows, x.m - i * rows); r++) {
        const float* sum = accumulators + r * columns;
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
inline void store_block(const BlockColumn<P>& x, const float* accumulators, int64_t i, int64_t rows,
                        int64_t columns) {
    if (x.out_bf16)
        store_block(x, accumulators, i, rows, columns, x.out_bf16, x.bias_bf16);
    else
        store_block(x, accumulators, i, rows, columns, x.out_float, x.bias_float);
}

} // namespace lns
