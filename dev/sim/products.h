// The arithmetic of cuBLASLt's products.
#pragma once

#include <cstdint>

namespace lns::sim {

// m rounded up to whole vectors.
int64_t padded_width(int64_t m);

// sums (n, m) += b (n, k) · a (k, m), k ascending or descending; rows of b are b_row elements
// apart, a and sums are contiguous; m is a padded width.
void product(float* sums, const float* b, int64_t b_row, const float* a, int64_t n, int64_t m,
             int64_t k, bool backwards);

} // namespace lns::sim
