// How a block of a product is computed on this CPU: internal to gemm*.cpp and their test.
//
// A product is taken in blocks of `rows` x `columns` of c, over `depth` k's at a time:
//   panels  `rows` rows of a, or `columns` columns of b, over one depth, packed in the order in
//           which multiply() reads them; k padded with zeros to a multiple of `step`
//   block   `rows` x `columns` floats, row by row, that multiply() writes or adds to
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

// T: what a and b are stored as. P: what they are packed as.
template <class T, class P> struct Kernel {
    const char* name;
    int rows, columns, step, depth;
    // a(i, p) = a[i·a_row + p·a_column] for i < m ≤ rows, p < k ≤ depth; likewise b(p, j), j < n.
    void (*pack_a)(P* panel, int64_t m, int64_t k, const T* a, int64_t a_row, int64_t a_column);
    void (*pack_b)(P* panel, int64_t k, int64_t n, const T* b, int64_t b_row, int64_t b_column);
    void (*multiply)(int64_t k, const P* a, const P* b, float* block, bool add);
    // The same of an a not packed: `rows` whole rows, k a multiple of step. direct says whether the
    // kernel takes those strides.
    bool (*direct)(int64_t a_row, int64_t a_column);
    void (*multiply_direct)(int64_t k, const T* a, int64_t a_row, int64_t a_column, const P* b,
                            float* block, bool add);
    // The first m rows and n columns of a block into out, or added to it; bias: (n), or null.
    void (*store_float)(const float* block, int64_t m, int64_t n, float* out, int64_t out_row,
                        bool accumulate, const float* bias);
    void (*store_bf16)(const float* block, int64_t m, int64_t n, bf16* out, int64_t out_row,
                       bool accumulate, const bf16* bias);
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

// One row of a block, as every kernel's store may end. Formulas: out = bias + block, or
// out += block.
template <class OUT>
inline void store_row(const float* block, int64_t n, OUT* out, bool accumulate, const OUT* bias) {
    if (accumulate)
        for (int64_t j = 0; j < n; j++) out[j] = OUT(float(out[j]) + block[j]);
    else if (bias)
        for (int64_t j = 0; j < n; j++) out[j] = OUT(float(bias[j]) + block[j]);
    else
        for (int64_t j = 0; j < n; j++) out[j] = OUT(block[j]);
}

} // namespace lns
