// float32 matmul kernels in the compilers' vector types, for any CPU. They also serve bf16, widened
// while packing, on CPUs without a bf16 unit.
#include "gpt/cpu/gemm_kernel.h"

namespace lns {

namespace {

#if defined(__AVX512F__)
const int vector_bytes = 64, block_rows = 14, block_vectors = 2;
#elif defined(__AVX__)
const int vector_bytes = 32, block_rows = 6, block_vectors = 2;
#elif defined(__aarch64__)
const int vector_bytes = 16, block_rows = 8, block_vectors = 3;
#else
const int vector_bytes = 16, block_rows = 4, block_vectors = 2;
#endif
typedef float Vector __attribute__((vector_size(vector_bytes)));
typedef float Unaligned
    __attribute__((vector_size(vector_bytes), aligned(sizeof(float)), may_alias));
const int width = vector_bytes / int(sizeof(float)), block_columns = block_vectors * width;

// c = start + a · b; start may be null. start_row and c_row are strides. Each part of k is summed
// from zero in registers.
void multiply_block(int64_t k, const float* a, const float* b, const float* start,
                    int64_t start_row, float* c, int64_t c_row) {
    for (; k > 0; k -= sum_part, start = c, start_row = c_row) {
        Vector sum[block_rows][block_vectors] = {};
        for (int64_t p = std::min(k, sum_part); p > 0; p--, a += block_rows, b += block_columns) {
            Vector x[block_vectors];
            for (int j = 0; j < block_vectors; j++) x[j] = *(const Unaligned*)(b + j * width);
            for (int i = 0; i < block_rows; i++)
                for (int j = 0; j < block_vectors; j++) sum[i][j] += a[i] * x[j];
        }
        for (int i = 0; i < block_rows; i++)
            for (int j = 0; j < block_vectors; j++) {
                if (start) sum[i][j] += *(const Unaligned*)(start + i * start_row + j * width);
                *(Unaligned*)(c + i * c_row + j * width) = sum[i][j];
            }
    }
}

void multiply(const BlockColumn<float>& x) {
    alignas(64) float block[block_rows * block_columns];
    for (int64_t i = 0; i < x.count; i++) {
        const float* a = x.a + i * x.a_panel_stride;
        float* accumulators = x.accumulators + i * x.accumulator_stride;
        const float* before = x.accumulators_valid ? accumulators : nullptr;
        if (x.last_depth) // prefetch the next block's output into the L2 cache
            for (int64_t r = (i + 1) * block_rows; r < std::min(x.m, (i + 2) * block_rows); r++)
                for (int j = 0; j < block_columns; j += 16)
                    __builtin_prefetch(x.out_float ? (const char*)(x.out_float + r * x.out_row + j)
                                                   : (const char*)(x.out_bf16 + r * x.out_row + j),
                                       0, 2);
        if (!x.last_depth) {
            multiply_block(x.k, a, x.b, before, block_columns, accumulators, block_columns);
        } else if (x.out_float && !x.accumulators_valid && x.n == block_columns &&
                   (i + 1) * block_rows <= x.m) {
            float* out = x.out_float + i * block_rows * x.out_row;
            const float* start = x.accumulate ? out : x.bias_float;
            multiply_block(x.k, a, x.b, start, x.accumulate ? x.out_row : 0, out, x.out_row);
        } else {
            multiply_block(x.k, a, x.b, before, block_columns, block, block_columns);
            store_block(x, block, i, block_rows, block_columns);
        }
    }
}

typedef float Four __attribute__((vector_size(16)));
typedef float UnalignedFour __attribute__((vector_size(16), aligned(sizeof(float)), may_alias));

template <class T> inline Four four(const T* x) {
    return Four{float(x[0]), float(x[1]), float(x[2]), float(x[3])};
}

// panel(p, j) = x[j·stride + p] for j < count, p < k, in tiles of 4 x 4; the panel has W columns.
template <int W, class T>
void pack_transposed(float* panel, int64_t count, int64_t k, const T* x, int64_t stride) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
        const T* y = x + j * stride;
        int64_t p = 0;
        for (; p + 4 <= k; p += 4, y += 4) {
            const Four a = four(y), b = four(y + stride), c = four(y + 2 * stride),
                       d = four(y + 3 * stride);
            const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
            const Four ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
            const Four cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
            float* to = panel + p * W + j;
            *(UnalignedFour*)to = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
            *(UnalignedFour*)(to + W) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
            *(UnalignedFour*)(to + 2 * W) = __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5);
            *(UnalignedFour*)(to + 3 * W) = __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7);
        }
        for (; p < k; p++, y++)
            for (int q = 0; q < 4; q++) panel[p * W + j + q] = float(y[q * stride]);
    }
    for (; j < count; j++)
        for (int64_t p = 0; p < k; p++) panel[p * W + j] = float(x[j * stride + p]);
}

// panel(p, j) = x[p·stride + j].
template <int W, class T>
void pack_rows(float* panel, int64_t count, int64_t k, const T* x, int64_t stride) {
    for (int64_t p = 0; p < k; p++, panel += W, x += stride)
        if (count == W)
            for (int j = 0; j < W; j++) panel[j] = float(x[j]);
        else
            for (int64_t j = 0; j < count; j++) panel[j] = float(x[j]);
}

template <int W, class T>
void pack(float* panel, int64_t count, int64_t k, const T* x, int64_t stride, int64_t k_stride) {
    if (count < W) std::fill(panel, panel + k * W, 0.0f);
    if (k_stride == 1)
        pack_transposed<W>(panel, count, k, x, stride);
    else
        pack_rows<W>(panel, count, k, x, k_stride);
}

template <class T>
void pack_a(float* panel, int64_t m, int64_t k, const T* a, int64_t a_row, int64_t a_column) {
    pack<block_rows>(panel, m, k, a, a_row, a_column);
}

template <class T>
void pack_b(float* panel, int64_t k, int64_t n, const T* b, int64_t b_row, int64_t b_column) {
    pack<block_columns>(panel, n, k, b, b_column, b_row);
}

void nothing() {}

template <class T>
const Kernel<T, float> plain_kernel = {"vector types", block_rows, block_columns, 1,       1024,
                                       pack_a<T>,      pack_b<T>,  multiply,      nothing, nothing};

} // namespace

const Kernel<float, float>* float_kernel() { return &plain_kernel<float>; }
const Kernel<bf16, float>* widening_kernel() { return &plain_kernel<bf16>; }

} // namespace lns
