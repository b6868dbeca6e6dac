// Always optimized and without sanitizers: it accesses only the simulator's own memory.
#include "dev/sim/products.h"

#include <algorithm>
#include <cstring>

#include "dev/sim/parallel.h"
#include "dev/sim/sim.h"

namespace lns::sim {

void multiply_add(float* d, const float* a, const float* b, int m, int n, int k) {
    for (int i = 0; i < m; i++)
        for (int l = 0; l < k; l++) {
            const float x = a[i * k + l];
            for (int j = 0; j < n; j++) d[i * n + j] += x * b[l * n + j];
        }
}

namespace {
typedef float Vector __attribute__((vector_size(64)));
const int64_t vector_width = 16, block_rows = 6, block_width = 2 * vector_width;
} // namespace

int64_t padded_width(int64_t m) { return (m + block_width - 1) / block_width * block_width; }

void product(float* sums, const float* b, int64_t b_row, const float* a, int64_t n, int64_t m,
             int64_t k, bool backwards) {
    const int64_t blocks = (n + block_rows - 1) / block_rows;
    auto do_block = [&](int64_t block) {
        const int64_t j0 = block * block_rows, rows = std::min(block_rows, n - j0);
        for (int64_t i0 = 0; i0 < m; i0 += block_width) {
            Vector sum[block_rows][2] = {};
            for (int64_t step = 0; step < k; step++) {
                const int64_t l = backwards ? k - 1 - step : step;
                Vector x0, x1;
                std::memcpy(&x0, a + l * m + i0, sizeof x0);
                std::memcpy(&x1, a + l * m + i0 + vector_width, sizeof x1);
                for (int64_t r = 0; r < block_rows; r++) {
                    const float y = b[(j0 + std::min(r, rows - 1)) * b_row + l];
                    sum[r][0] += x0 * y, sum[r][1] += x1 * y;
                }
            }
            for (int64_t r = 0; r < rows; r++) {
                float* row = sums + (j0 + r) * m + i0;
                for (int64_t i = 0; i < block_width; i++)
                    row[i] += sum[r][i / vector_width][i % vector_width];
            }
        }
    };
    if (n * m * k > 1000000)
        parallel_for(blocks, do_block);
    else
        for (int64_t block = 0; block < blocks; block++) do_block(block);
}

} // namespace lns::sim
