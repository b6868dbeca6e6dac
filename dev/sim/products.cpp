// The arithmetic of tensor instructions and of cuBLASLt's products. Always optimized and without
// sanitizers: all that it touches is the simulator's own.
#include "dev/sim/sim.h"

namespace lns::sim {

void multiply_add(float* d, const float* a, const float* b, int m, int n, int k) {
    for (int i = 0; i < m; i++)
        for (int l = 0; l < k; l++) {
            const float x = a[i * k + l];
            for (int j = 0; j < n; j++) d[i * n + j] += x * b[l * n + j];
        }
}

} // namespace lns::sim
