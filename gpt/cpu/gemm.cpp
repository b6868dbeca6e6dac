#include "gpt/cpu/gemm.h"

#include <algorithm>
#include <utility>

#include "gpt/cpu/gemm_kernel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace lns {

namespace {
const int64_t alignment = int64_t(1) << 21;
}

void* Scratch::get(int64_t bytes) {
    if (bytes > size) {
        ::operator delete(std::exchange(data, nullptr), std::align_val_t(alignment));
        size = 0;
        bytes += bytes / 4;
        data = ::operator new(size_t(bytes), std::align_val_t(alignment));
#if defined(__linux__)
        // Huge pages cause fewer TLB misses.
        if (bytes >= alignment) madvise(data, size_t(bytes), MADV_HUGEPAGE);
#endif
        size = bytes;
    }
    return data;
}

Scratch::~Scratch() { ::operator delete(data, std::align_val_t(alignment)); }

namespace {

int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

int threads_to_use() {
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

// The layout of a packed b (k, n): depth by depth, all panels of that depth.
template <class T, class P> struct PackedB {
    const Kernel<T, P>& kernel;
    int64_t k, n;

    int64_t panels() const { return ceil_div(n, kernel.columns); }
    int64_t depths() const { return ceil_div(k, kernel.depth_of(k)); }
    int64_t size() const { return kernel.padded(k) * panels() * kernel.columns; }
    int64_t at(int64_t depth, int64_t panel) const {
        const int64_t p = depth * kernel.depth_of(k);
        const int64_t rows = std::min(kernel.depth_of(k), kernel.padded(k) - p);
        return (p * panels() + rows * panel) * kernel.columns;
    }
    // Packs panels j0 to j1 of a depth. If b's columns are adjacent, goes along its rows.
    void pack(P* packed, int64_t depth, int64_t j0, int64_t j1, const T* b, int64_t b_row,
              int64_t b_column) const {
        const int64_t k0 = depth * kernel.depth_of(k), kd = std::min(kernel.depth_of(k), k - k0);
        const int64_t slice = b_column == 1 ? 32 : kd, Q = kernel.columns;
        for (int64_t p = 0; p < kd; p += slice)
            for (int64_t j = j0; j < j1; j++)
                kernel.pack_b(packed + at(depth, j) + p * Q, std::min(slice, kd - p),
                              std::min(Q, n - j * Q), b + (k0 + p) * b_row + j * Q * b_column,
                              b_row, b_column);
    }
};

// The arguments of a matmul, shared by its threads.
template <class T, class P, class OUT> struct Matmul {
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

// The column of blocks at rows i to i + m and columns j to j + n of out. The caller sets the
// panels.
template <class T, class P, class OUT>
BlockColumn<P> block_column(const Matmul<T, P, OUT>& x, int64_t i, int64_t m, int64_t j,
                            int64_t n) {
    BlockColumn<P> column{};
    column.m = m, column.n = n;
    column.count = ceil_div(m, x.kernel.rows);
    column.out_row = x.out_row;
    column.accumulate = x.accumulate;
    OUT* out = x.out + i * x.out_row + j;
    const OUT* bias = x.bias ? x.bias + j : nullptr;
    if constexpr (std::is_same_v<OUT, bf16>)
        column.out_bf16 = out, column.bias_bf16 = bias;
    else
        column.out_float = out, column.bias_float = bias;
    return column;
}

// Computes rows i0 to i1 on one thread. Their block of a stays in the L2 cache while b's panels
// stream past.
template <class T, class P, class OUT>
void multiply_rows(const Matmul<T, P, OUT>& x, int64_t i0, int64_t i1) {
    static thread_local Scratch panel_memory, accumulator_memory;
    const Kernel<T, P>& kernel = x.kernel;
    const int64_t R = kernel.rows, Q = kernel.columns, row_blocks = ceil_div(i1 - i0, R);
    const int64_t depth = kernel.depth_of(x.k), depths = ceil_div(x.k, depth);
    // A float out serves as its own accumulators.
    const bool in_out = std::is_same_v<OUT, float>;
    P* panels = (P*)panel_memory.get(row_blocks * R * depth * int64_t(sizeof(P)));
    float* accumulators = in_out || depths == 1
                              ? nullptr
                              : (float*)accumulator_memory.get(row_blocks * R * ceil_div(x.n, Q) *
                                                               Q * int64_t(sizeof(float)));
    for (int64_t d = 0; d < depths; d++) {
        const int64_t p0 = d * depth, kd = std::min(depth, x.k - p0), padded = kernel.padded(kd);
        // If a's columns are adjacent, a panel is packed at once, else slice by slice with others.
        const int64_t slice = x.a_column == 1 ? kd : 32;
        for (int64_t p = 0; p < kd; p += slice)
            for (int64_t ib = 0; ib < row_blocks; ib++) {
                const int64_t i = i0 + ib * R;
                kernel.pack_a(panels + (ib * padded + p) * R, std::min(R, i1 - i),
                              std::min(slice, kd - p), x.a + i * x.a_row + (p0 + p) * x.a_column,
                              x.a_row, x.a_column);
            }
        for (int64_t j = 0; j < x.n; j += Q) {
            BlockColumn<P> column = block_column(x, i0, i1 - i0, j, std::min(Q, x.n - j));
            column.k = padded;
            column.a = panels, column.a_panel_stride = padded * R;
            column.b = x.packed + x.layout.at(d, j / Q);
            column.last_depth = in_out || d == depths - 1;
            if (in_out && d > 0) column.accumulate = true;
            column.accumulators_valid = !in_out && d > 0;
            if (accumulators)
                column.accumulators = accumulators + j * row_blocks * R,
                column.accumulator_stride = R * Q;
            kernel.multiply(column);
        }
    }
}

// Split-K for small outputs and large k, such as weight gradients of small models: threads sum
// separate parts of k, which are then added in order. The shape alone determines the parts, so that
// results do not depend on the number of threads.
const int64_t max_split_outputs = 32 << 10, min_split_k = 256, max_splits = 16;

template <class T, class P, class OUT>
void split_gemm(const Kernel<T, P>& kernel, bool a_transposed, bool b_transposed, int64_t m,
                int64_t n, int64_t k, const T* a, const T* b, OUT* out, bool accumulate,
                const OUT* bias) {
    static thread_local Scratch partial_memory;
    const int64_t a_row = a_transposed ? 1 : k, a_column = a_transposed ? m : 1;
    const int64_t b_row = b_transposed ? 1 : n, b_column = b_transposed ? k : 1;
    const int64_t part = kernel.padded(ceil_div(k, std::min(max_splits, k / min_split_k)));
    const int64_t parts = ceil_div(k, part);
    float* partial = (float*)partial_memory.get(parts * m * n * int64_t(sizeof(float)));
#pragma omp parallel num_threads(threads_to_use())
    {
        static thread_local Scratch packed_memory;
        kernel.begin();
#pragma omp for
        for (int64_t i = 0; i < parts; i++) {
            const int64_t p = i * part, kp = std::min(part, k - p);
            const PackedB<T, P> layout{kernel, kp, n};
            P* packed = (P*)packed_memory.get(layout.size() * int64_t(sizeof(P)));
            for (int64_t d = 0; d < layout.depths(); d++)
                layout.pack(packed, d, 0, layout.panels(), b + p * b_row, b_row, b_column);
            const Matmul<T, P, float> matmul{kernel, m,        n,      kp,     a + p * a_column,
                                             a_row,  a_column, layout, packed, partial + i * m * n,
                                             n,      false,    nullptr};
            multiply_rows(matmul, 0, m);
        }
        kernel.end();
#pragma omp for
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j += 64) {
                const int64_t count = std::min<int64_t>(64, n - j);
                float sum[64];
                for (int64_t q = 0; q < count; q++)
                    sum[q] = accumulate ? float(out[i * n + j + q]) : bias ? float(bias[j + q]) : 0;
                for (int64_t s = 0; s < parts; s++)
                    for (int64_t q = 0; q < count; q++) sum[q] += partial[(s * m + i) * n + j + q];
                for (int64_t q = 0; q < count; q++) out[i * n + j + q] = OUT(sum[q]);
            }
    }
}

} // namespace

// Limits the packed part of b: it should stay in the L3 cache, but a is repacked for each part.
static int64_t packed_bytes(int64_t m, int64_t k, int64_t bytes) {
    const int64_t mib = int64_t(1) << 20;
    return std::clamp(m * k * bytes / 2, 8 * mib, 64 * mib);
}

// A thread's block of a, which stays in the L2 cache.
static const int64_t block_bytes = int64_t(768) << 10;

int64_t gemm_scratch(int64_t m, int64_t n, int64_t k, int64_t element_bytes, int threads) {
    const int64_t b = std::min(n * k * element_bytes, packed_bytes(m, k, element_bytes));
    return (b + std::min(m * k * element_bytes, threads * block_bytes)) * 5 /
           4; // Scratch::get()'s reserve
}

template <class T, class P, class OUT>
void kernel_gemm(const Kernel<T, P>& kernel, bool a_transposed, bool b_transposed, int64_t m,
                 int64_t n, int64_t k, const T* a, const T* b, OUT* out, bool accumulate,
                 const OUT* bias) {
    if (m * n <= max_split_outputs && k >= 4 * min_split_k) {
        split_gemm(kernel, a_transposed, b_transposed, m, n, k, a, b, out, accumulate, bias);
        return;
    }
    static thread_local Scratch packed_memory;
    const int64_t b_row = b_transposed ? 1 : n, b_column = b_transposed ? k : 1;
    const int threads = threads_to_use();
    const int64_t R = kernel.rows, Q = kernel.columns;
    const int64_t bytes = int64_t(sizeof(P));
    const int64_t parts = ceil_div(n * kernel.padded(k) * bytes, packed_bytes(m, k, bytes));
    const int64_t max_columns = ceil_div(ceil_div(n, parts), Q) * Q;
    for (int64_t n0 = 0; n0 < n; n0 += max_columns) {
        const int64_t part = std::min(max_columns, n - n0);
        const PackedB<T, P> layout{kernel, k, part};
        P* packed = (P*)packed_memory.get(layout.size() * int64_t(sizeof(P)));
        const Matmul<T, P, OUT> matmul{kernel,
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
        const int64_t max_rows =
            std::max<int64_t>(R, block_bytes / int64_t(sizeof(P)) / kernel.depth_of(k));
        const int64_t rounds = ceil_div(ceil_div(m, max_rows), threads);
        const int64_t task = ceil_div(ceil_div(m, rounds * threads), R) * R;
        const int64_t panels = layout.panels(), group = 8;
        const int64_t groups = ceil_div(panels, group), pieces = groups * layout.depths();
#pragma omp parallel num_threads(threads)
        {
#pragma omp for
            for (int64_t piece = 0; piece < pieces; piece++) {
                const int64_t j = piece % groups * group;
                layout.pack(packed, piece / groups, j, std::min(panels, j + group),
                            b + n0 * b_column, b_row, b_column);
            }
            kernel.begin();
#pragma omp for
            for (int64_t thread = 0; thread < threads; thread++)
                for (int64_t round = 0; round < rounds; round++) {
                    const int64_t i = (thread * rounds + round) * task;
                    const int64_t end = std::min(m, i + task);
                    if (i < m) multiply_rows(matmul, i, end);
                }
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
            layout.pack(packed, depth, panel, panel + 1, b, b_row, b_column);
}

template <class T, class P>
void kernel_packed_gemm(const Kernel<T, P>& kernel, int64_t m, int64_t n, int64_t k, const T* a,
                        int64_t a_row, int64_t a_column, const P* packed, int64_t packed_k,
                        int64_t packed_n, float* c, int64_t c_row, bool accumulate) {
    static thread_local Scratch panel_memory, accumulator_memory, tail_memory;
    const PackedB<T, P> layout{kernel, packed_k, packed_n};
    const int64_t R = kernel.rows, Q = kernel.columns, row_blocks = ceil_div(m, R);
    const int64_t depth = kernel.depth_of(packed_k);
    const int64_t padded_k = kernel.padded(k);
    P* panels = (P*)panel_memory.get(row_blocks * R * padded_k * int64_t(sizeof(P)));
    float* accumulators =
        (float*)accumulator_memory.get(row_blocks * R * Q * int64_t(sizeof(float)));

    // If k < packed_k ends within a step, that step is copied with the rows beyond k zeroed.
    const int64_t whole = k / kernel.step * kernel.step, rest = k < packed_k ? k - whole : 0;
    P* tail = nullptr;
    if (rest) {
        const int64_t d = whole / depth, size = kernel.step * Q;
        tail = (P*)tail_memory.get(ceil_div(n, Q) * size * int64_t(sizeof(P)));
        for (int64_t j = 0; j < ceil_div(n, Q); j++) {
            const P* from = packed + layout.at(d, j) + (whole - d * depth) * Q;
            P* to = tail + j * size;
            std::copy(from, from + size, to);
            // The layout is gemm_bf16.cpp's; steps of other kernels have one row.
            for (int64_t p = rest; p < kernel.step; p++)
                for (int64_t q = 0; q < Q; q++)
                    to[q / 16 * kernel.step * 16 + p / 2 * 32 + q % 16 * 2 + p % 2] = P(0);
        }
    }
    const Matmul<T, P, float> matmul{kernel, m,      n, k,     a,          a_row,  a_column,
                                     layout, packed, c, c_row, accumulate, nullptr};
    kernel.begin();
    for (int64_t i = 0; i < m; i += R)
        kernel.pack_a(panels + i * padded_k, std::min(R, m - i), k, a + i * a_row, a_row, a_column);
    for (int64_t j = 0; j < n; j += Q) {
        BlockColumn<P> column = block_column(matmul, 0, m, j, std::min(Q, n - j));
        column.accumulators = accumulators, column.accumulator_stride = R * Q;
        column.a_panel_stride = padded_k * R;
        const int64_t end = tail ? whole : padded_k;
        for (int64_t p = 0; p < end; p += depth, column.accumulators_valid = true) {
            column.k = std::min(depth, end - p);
            column.a = panels + p * R, column.b = packed + layout.at(p / depth, j / Q);
            column.last_depth = p + depth >= end && !tail;
            kernel.multiply(column);
        }
        if (tail) {
            column.k = kernel.step;
            column.a = panels + whole * R, column.b = tail + j * kernel.step;
            column.last_depth = true;
            kernel.multiply(column);
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
    if (unit == Bf16Unit::avx512 && onednn_gemm(ta, tb, m, n, k, a, b, out, accumulate, bias))
        return;
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
#if defined(__AVX512F__)
    const bool kernel = n >= 256 && !b_transposed; // see gemm.h
#else
    const bool kernel = false;
#endif
    if (kernel || !onednn_gemm(a_transposed, b_transposed, m, n, k, a, b, out, accumulate, bias))
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
