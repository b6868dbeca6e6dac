#include "gpt/gemm.h"

#include <atomic>
#include <utility>

#include "gpt/gemm_kernel.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lns {

void* Scratch::get(int64_t bytes) {
    if (bytes > size) {
        ::operator delete(std::exchange(data, nullptr), std::align_val_t(64));
        size = 0;
        data = ::operator new(size_t(bytes + bytes / 4), std::align_val_t(64));
        size = bytes + bytes / 4;
    }
    return data;
}

Scratch::~Scratch() { ::operator delete(data, std::align_val_t(64)); }

namespace {

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

int threads_to_use() {
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

// A packed b of k rows and n columns: for each `depth` of its rows, all panels of that depth.
template <class T, class P> struct PackedB {
    const Kernel<T, P>& kernel;
    int64_t k, n;

    int64_t panels() const { return blocks(n, kernel.columns); }
    int64_t depths() const { return blocks(k, kernel.depth); }
    int64_t size() const { return kernel.padded(k) * panels() * kernel.columns; }
    int64_t at(int64_t depth, int64_t panel) const {
        const int64_t p = depth * kernel.depth;
        const int64_t rows = std::min<int64_t>(kernel.depth, kernel.padded(k) - p);
        return (p * panels() + rows * panel) * kernel.columns;
    }
    void pack(P* packed, int64_t depth, int64_t panel, const T* b, int64_t b_row,
              int64_t b_column) const {
        const int64_t p = depth * kernel.depth, j = panel * kernel.columns;
        kernel.pack_b(packed + at(depth, panel), std::min<int64_t>(kernel.depth, k - p),
                      std::min<int64_t>(kernel.columns, n - j), b + p * b_row + j * b_column, b_row,
                      b_column);
    }
};

template <class T, class P, class OUT>
void store(const Kernel<T, P>& kernel, const float* block, int64_t m, int64_t n, OUT* out,
           int64_t out_row, bool accumulate, const OUT* bias) {
    if constexpr (std::is_same_v<OUT, bf16>)
        kernel.store_bf16(block, m, n, out, out_row, accumulate, bias);
    else
        kernel.store_float(block, m, n, out, out_row, accumulate, bias);
}

// What every task of one product reads.
template <class T, class P, class OUT> struct Product {
    const Kernel<T, P>& kernel;
    int64_t m, n, k;
    const T* a;
    int64_t a_row, a_column;
    PackedB<T, P> layout;
    const P* packed;
    OUT* out;
    int64_t out_row;
    bool accumulate;
    const OUT* bias;
};

// Rows i0 to i1 and columns j0 to j1 (both begin blocks) of a product, by one thread. The sums of
// all but the last depth wait in a buffer that the second cache holds.
template <class T, class P, class OUT>
void multiply_part(const Product<T, P, OUT>& x, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    static thread_local Scratch panel_memory, sum_memory;
    const Kernel<T, P>& kernel = x.kernel;
    const int64_t R = kernel.rows, Q = kernel.columns, depths = blocks(x.k, kernel.depth);
    const int64_t row_blocks = blocks(i1 - i0, R);
    const int64_t chunk = std::min(blocks(j1 - j0, Q), std::max<int64_t>(1, 512 / Q));
    P* panels = (P*)panel_memory.get(row_blocks * R * kernel.padded(x.k) * int64_t(sizeof(P)));
    float* sums = (float*)sum_memory.get((depths > 1 ? row_blocks * chunk : 1) * R * Q * 4);

    for (int64_t jc = j0; jc < j1; jc += chunk * Q) {
        const int64_t jend = std::min(j1, jc + chunk * Q);
        for (int64_t d = 0; d < depths; d++) {
            const int64_t p = d * kernel.depth, kd = std::min<int64_t>(kernel.depth, x.k - p);
            const int64_t whole = kd / kernel.step * kernel.step, rest = kd - whole;
            for (int64_t ib = 0; ib < row_blocks; ib++) {
                const int64_t i = i0 + ib * R, rows = std::min(R, i1 - i);
                const T* a = x.a + i * x.a_row + p * x.a_column;
                P* panel = panels + (row_blocks * p + ib * kernel.padded(kd)) * R;
                if (jc == j0) kernel.pack_a(panel, rows, kd, a, x.a_row, x.a_column);
                (void)whole, (void)rest;
                for (int64_t j = jc; j < jend; j += Q) {
                    float* block = depths > 1 ? sums + (ib * chunk + (j - jc) / Q) * R * Q : sums;
                    kernel.multiply(kernel.padded(kd), panel, x.packed + x.layout.at(d, j / Q),
                                    block, d > 0);
                    if (d == depths - 1)
                        store(kernel, block, rows, std::min(Q, x.n - j), x.out + i * x.out_row + j,
                              x.out_row, x.accumulate, x.bias ? x.bias + j : nullptr);
                }
            }
        }
    }
}

} // namespace

template <class T, class P, class OUT>
void kernel_gemm(const Kernel<T, P>& kernel, bool a_transposed, bool b_transposed, int64_t m,
                 int64_t n, int64_t k, const T* a, const T* b, OUT* out, bool accumulate,
                 const OUT* bias) {
    static thread_local Scratch packed_memory;
    const int64_t b_row = b_transposed ? 1 : n, b_column = b_transposed ? k : 1;
    const int threads = threads_to_use();
    const int64_t R = kernel.rows, Q = kernel.columns;
    // Columns are taken in parts whose packed b is not absurdly large.
    const int64_t most =
        std::max<int64_t>(1, (int64_t(16) << 20) / (kernel.padded(k) * Q * int64_t(sizeof(P)))) * Q;
    for (int64_t n0 = 0; n0 < n; n0 += most) {
        const int64_t part = std::min(most, n - n0);
        const PackedB<T, P> layout{kernel, k, part};
        P* packed = (P*)packed_memory.get(layout.size() * int64_t(sizeof(P)));
        const Product<T, P, OUT> product{kernel,
                                         m,
                                         part,
                                         k,
                                         a,
                                         a_transposed ? 1 : k,
                                         a_transposed ? m : 1,
                                         layout,
                                         packed,
                                         out + n0,
                                         n,
                                         accumulate,
                                         bias ? bias + n0 : nullptr};
        const int64_t rounds = blocks(blocks(m, 256), threads);
        const int64_t row_tasks = rounds * threads;
        const int64_t task_rows = blocks(blocks(m, row_tasks), R) * R;
        const int64_t panels = layout.panels(), pieces = panels * layout.depths();
#pragma omp parallel num_threads(threads)
        {
#pragma omp for
            for (int64_t piece = 0; piece < pieces; piece++)
                layout.pack(packed, piece / panels, piece % panels, b + n0 * b_column, b_row,
                            b_column);
            kernel.begin();
#pragma omp for
            for (int64_t task = 0; task < row_tasks; task++)
                if (task * task_rows < m)
                    multiply_part(product, task * task_rows, std::min(m, (task + 1) * task_rows), 0,
                                  part);
            kernel.end();
        }
    }
}

template <class T, class P>
int64_t kernel_packed_size(const Kernel<T, P>& kernel, int64_t k, int64_t n) {
    return PackedB<T, P>{kernel, k, n}.size();
}

template <class T, class P>
void kernel_pack(const Kernel<T, P>& kernel, P* packed, int64_t k, int64_t n, const T* b,
                 int64_t b_row, int64_t b_column) {
    const PackedB<T, P> layout{kernel, k, n};
    for (int64_t depth = 0; depth < layout.depths(); depth++)
        for (int64_t panel = 0; panel < layout.panels(); panel++)
            layout.pack(packed, depth, panel, b, b_row, b_column);
}

template <class T, class P>
void kernel_packed_gemm(const Kernel<T, P>& kernel, int64_t m, int64_t n, int64_t k, const T* a,
                        int64_t a_row, int64_t a_column, const P* packed, int64_t packed_k,
                        int64_t packed_n, float* c, int64_t c_row, bool accumulate) {
    static thread_local Scratch panel_memory, tail_memory;
    const PackedB<T, P> layout{kernel, packed_k, packed_n};
    const int64_t R = kernel.rows, Q = kernel.columns;
    alignas(64) float block[32 * 48];
    P* panel = (P*)panel_memory.get(R * kernel.padded(k) * int64_t(sizeof(P)));
    kernel.begin();
    // Where b's next rows lie in the same step, the last step is copied without them.
    const int64_t whole = k / kernel.step * kernel.step, rest = k < packed_k ? k - whole : 0;
    P* tail = nullptr;
    if (rest) {
        const int64_t step = kernel.step * Q;
        tail = (P*)tail_memory.get(blocks(n, Q) * step * int64_t(sizeof(P)));
        const int64_t d = whole / kernel.depth;
        for (int64_t j = 0; j < n; j += Q) {
            const P* from = packed + layout.at(d, j / Q) + (whole - d * kernel.depth) * Q;
            P* to = tail + j / Q * step;
            std::copy(from, from + step, to);
            // Pairs of rows lie side by side (packed_pair in gemm_bf16.cpp).
            for (int64_t p = rest; p < kernel.step; p++)
                for (int64_t q = 0; q < Q; q++)
                    to[q / 16 * kernel.step * 16 + p / 2 * 32 + q % 16 * 2 + p % 2] = P(0);
        }
    }
    for (int64_t i = 0; i < m; i += R) {
        const int64_t rows = std::min(R, m - i);
        for (int64_t p = 0; p < k; p += kernel.depth) {
            const int64_t kd = std::min<int64_t>(kernel.depth, k - p);
            kernel.pack_a(panel + p * R, rows, kd, a + i * a_row + p * a_column, a_row, a_column);
        }
        for (int64_t j = 0; j < n; j += Q) {
            const int64_t end = tail ? whole : kernel.padded(k);
            for (int64_t p = 0; p < end; p += kernel.depth)
                kernel.multiply(std::min<int64_t>(kernel.depth, end - p), panel + p * R,
                                packed + layout.at(p / kernel.depth, j / Q), block, p > 0);
            if (tail)
                kernel.multiply(kernel.step, panel + whole * R, tail + j / Q * kernel.step * Q,
                                block, whole > 0);
            kernel.store_float(block, rows, std::min(Q, n - j), c + i * c_row + j, c_row,
                               accumulate, nullptr);
        }
    }
    kernel.end();
}

#define LNS_INSTANCES(T, P)                                                                        \
    template int64_t kernel_packed_size(const Kernel<T, P>&, int64_t, int64_t);                    \
    template void kernel_pack(const Kernel<T, P>&, P*, int64_t, int64_t, const T*, int64_t,        \
                              int64_t);                                                            \
    template void kernel_packed_gemm(const Kernel<T, P>&, int64_t, int64_t, int64_t, const T*,     \
                                     int64_t, int64_t, const P*, int64_t, int64_t, float*,         \
                                     int64_t, bool);                                               \
    template void kernel_gemm(const Kernel<T, P>&, bool, bool, int64_t, int64_t, int64_t,          \
                              const T*, const T*, float*, bool, const float*);
LNS_INSTANCES(float, float)
LNS_INSTANCES(bf16, float)
LNS_INSTANCES(bf16, bf16)
#undef LNS_INSTANCES
template void kernel_gemm(const Kernel<bf16, float>&, bool, bool, int64_t, int64_t, int64_t,
                          const bf16*, const bf16*, bf16*, bool, const bf16*);
template void kernel_gemm(const Kernel<bf16, bf16>&, bool, bool, int64_t, int64_t, int64_t,
                          const bf16*, const bf16*, bf16*, bool, const bf16*);

namespace {

template <class OUT>
void bf16_gemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, const bf16* a, const bf16* b,
               OUT* out, bool accumulate, const OUT* bias) {
    const Bf16Unit unit = bf16_unit();
    if (unit != Bf16Unit::none && onednn_gemm(ta, tb, m, n, k, a, b, out, accumulate, bias)) return;
    if (const auto* kernel = bf16_kernel(unit))
        kernel_gemm(*kernel, ta, tb, m, n, k, a, b, out, accumulate, bias);
    else
        kernel_gemm(*widening_kernel(), ta, tb, m, n, k, a, b, out, accumulate, bias);
}

} // namespace

void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const double* a,
          const double* b, double* out, bool accumulate, const double* bias) {
    plain_gemm(a_transposed, b_transposed, m, n, k, a, b, out, accumulate, bias);
}

void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const float* a,
          const float* b, float* out, bool accumulate, const float* bias) {
    if (!onednn_gemm(a_transposed, b_transposed, m, n, k, a, b, out, accumulate, bias))
        kernel_gemm(*float_kernel(), a_transposed, b_transposed, m, n, k, a, b, out, accumulate,
                    bias);
}

void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const bf16* a,
          const bf16* b, bf16* out, bool accumulate, const bf16* bias) {
    bf16_gemm(a_transposed, b_transposed, m, n, k, a, b, out, accumulate, bias);
}

void gemm(bool a_transposed, bool b_transposed, int64_t m, int64_t n, int64_t k, const bf16* a,
          const bf16* b, float* out, bool accumulate, const float* bias) {
    bf16_gemm(a_transposed, b_transposed, m, n, k, a, b, out, accumulate, bias);
}

template <> int64_t packed_size<double>(int64_t k, int64_t n) { return k * n; }

template <> int64_t packed_size<float>(int64_t k, int64_t n) {
    return kernel_packed_size(*float_kernel(), k, n);
}

template <> int64_t packed_size<bf16>(int64_t k, int64_t n) {
    if (const auto* kernel = bf16_kernel(bf16_unit())) return kernel_packed_size(*kernel, k, n);
    return kernel_packed_size(*widening_kernel(), k, n) * int64_t(sizeof(float) / sizeof(bf16));
}

template <>
void pack(double* packed, int64_t k, int64_t n, const double* b, int64_t b_row, int64_t b_column) {
    for (int64_t p = 0; p < k; p++)
        for (int64_t j = 0; j < n; j++) packed[p * n + j] = b[p * b_row + j * b_column];
}

template <>
void pack(float* packed, int64_t k, int64_t n, const float* b, int64_t b_row, int64_t b_column) {
    kernel_pack(*float_kernel(), packed, k, n, b, b_row, b_column);
}

template <>
void pack(bf16* packed, int64_t k, int64_t n, const bf16* b, int64_t b_row, int64_t b_column) {
    if (const auto* kernel = bf16_kernel(bf16_unit()))
        kernel_pack(*kernel, packed, k, n, b, b_row, b_column);
    else
        kernel_pack(*widening_kernel(), (float*)packed, k, n, b, b_row, b_column);
}

template <>
void packed_gemm(int64_t m, int64_t n, int64_t k, const double* a, int64_t a_row, int64_t a_column,
                 const double* packed, int64_t, int64_t packed_n, double* c, int64_t c_row,
                 bool accumulate) {
    small_gemm(m, n, k, a, a_row, a_column, packed, packed_n, c, c_row, accumulate);
}

template <>
void packed_gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_column,
                 const float* packed, int64_t packed_k, int64_t packed_n, float* c, int64_t c_row,
                 bool accumulate) {
    kernel_packed_gemm(*float_kernel(), m, n, k, a, a_row, a_column, packed, packed_k, packed_n, c,
                       c_row, accumulate);
}

template <>
void packed_gemm(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t a_row, int64_t a_column,
                 const bf16* packed, int64_t packed_k, int64_t packed_n, float* c, int64_t c_row,
                 bool accumulate) {
    if (const auto* kernel = bf16_kernel(bf16_unit()))
        kernel_packed_gemm(*kernel, m, n, k, a, a_row, a_column, packed, packed_k, packed_n, c,
                           c_row, accumulate);
    else
        kernel_packed_gemm(*widening_kernel(), m, n, k, a, a_row, a_column, (const float*)packed,
                           packed_k, packed_n, c, c_row, accumulate);
}

} // namespace lns
