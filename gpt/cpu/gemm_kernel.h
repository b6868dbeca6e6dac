// How blocks of a product are computed on this CPU: internal to gemm*.cpp and their test.
//
// A product is taken in blocks of `rows` x `columns` of c, over at most `depth` k's at a time:
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

#include "gpt/cpu/bf16.h"

namespace lns {

// Every kernel sums parts of k from zero and adds what came before at their ends: so many k's in
// float, a depth in bf16. The error of a sum over K grows as √(part + K/part), that of one chain
// of additions, each rounded at the size of the whole sum, as √K.
const int64_t sum_part = 256;

// `count` panels of a times one of b: a column of blocks, over one depth.
template <class P> struct BlockColumn {
    int64_t k; // a multiple of step
    const P* a;
    int64_t a_panel; // from one panel of a to the next
    int64_t count;
    const P* b;
    float* sums; // of the earlier depths if add; the sums with this depth's, unless it is the last
    int64_t sums_block; // from one block's to the next
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
    void (*multiply)(const BlockColumn<P>& x);
    // Around a thread's calls of multiply(): AMX's registers are given their shape, and let go.
    void (*begin)();
    void (*end)();

    int64_t padded(int64_t k) const { return (k + step - 1) / step * step; }
    // The depth that all but the last of k's parts have.
    int64_t depth_of(int64_t k) const {
        const int64_t parts = (k + depth - 1) / depth;
        return padded((k + parts - 1) / parts);
    }
};

// The fastest that CPU and build have, whatever oneDNN may do; by unit for bf16. Null where the
// CPU lacks the unit.
const Kernel<float, float>* float_kernel();
const Kernel<bf16, float>* widening_kernel();
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

// What ends block i at the last depth, where a kernel has no faster way.
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
