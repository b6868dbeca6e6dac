// Blocks of products in float32, by the compilers' vector types: any CPU. Also for bf16, widened
// while packing, where the CPU multiplies no bf16.
#include "gpt/gemm_kernel.h"

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

// A block keeps its sums in registers.
void multiply_block(int64_t k, const float* a, const float* b, float* sums, bool add) {
    Vector sum[block_rows][block_vectors] = {};
    if (add)
        for (int i = 0; i < block_rows; i++)
            for (int j = 0; j < block_vectors; j++)
                sum[i][j] = *(const Unaligned*)(sums + i * block_columns + j * width);
    for (int64_t p = 0; p < k; p++, a += block_rows, b += block_columns) {
        Vector x[block_vectors];
        for (int j = 0; j < block_vectors; j++) x[j] = *(const Unaligned*)(b + j * width);
        for (int i = 0; i < block_rows; i++)
            for (int j = 0; j < block_vectors; j++) sum[i][j] += a[i] * x[j];
    }
    for (int i = 0; i < block_rows; i++)
        for (int j = 0; j < block_vectors; j++)
            *(Unaligned*)(sums + i * block_columns + j * width) = sum[i][j];
}

void multiply(const BlockColumn<float>& x) {
    alignas(64) float block[block_rows * block_columns];
    for (int64_t i = 0; i < x.count; i++) {
        float* sums = x.last && !x.add ? block : x.sums + i * x.sums_block;
        multiply_block(x.k, x.a + i * x.a_panel, x.b, sums, x.add);
        if (x.last) store_block(x, sums, i, block_rows, block_columns);
    }
}

template <class T>
void pack_a(float* panel, int64_t m, int64_t k, const T* a, int64_t a_row, int64_t a_column) {
    if (m < block_rows) std::fill(panel, panel + k * block_rows, 0.0f);
    for (int64_t p0 = 0; p0 < k; p0 += 16) // few lines of the panel at a time
        for (int64_t i = 0; i < m; i++)
            for (int64_t p = p0; p < std::min(k, p0 + 16); p++)
                panel[p * block_rows + i] = float(a[i * a_row + p * a_column]);
}

template <class T>
void pack_b(float* panel, int64_t k, int64_t n, const T* b, int64_t b_row, int64_t b_column) {
    if (n < block_columns) std::fill(panel, panel + k * block_columns, 0.0f);
    if (b_column == 1) {
        for (int64_t p = 0; p < k; p++)
            for (int64_t j = 0; j < n; j++) panel[p * block_columns + j] = float(b[p * b_row + j]);
        return;
    }
    for (int64_t p0 = 0; p0 < k; p0 += 16)
        for (int64_t j = 0; j < n; j++)
            for (int64_t p = p0; p < std::min(k, p0 + 16); p++)
                panel[p * block_columns + j] = float(b[p * b_row + j * b_column]);
}

void nothing() {}

template <class T>
const Kernel<T, float> plain_kernel = {"vector types", block_rows, block_columns, 1,       256,
                                       pack_a<T>,      pack_b<T>,  multiply,      nothing, nothing};

} // namespace

const Kernel<float, float>* float_kernel(bool) { return &plain_kernel<float>; }
const Kernel<bf16, float>* widening_kernel(bool) { return &plain_kernel<bf16>; }

} // namespace lns
