// The arithmetic of cuBLASLt's products.
#pragma once

#include <cstdint>

namespace lns::sim {

// A row of m numbers with what pads it to whole vectors.
int64_t padded_width(int64_t m);

// sums (n, m) += b (n, k) · a (k, m), k in ascending order or backwards; rows of b are b_row
// numbers apart, those of a and sums are behind one another; m is a padded width.
void product(float* sums, const float* b, int64_t b_row, const float* a, int64_t n, int64_t m,
             int64_t k, bool backwards);

} // namespace lns::sim
