#include "gpt/gemm_kernel.h"

namespace lns {
const Kernel<bf16, bf16>* bf16_kernel(Bf16Unit) { return nullptr; }
} // namespace lns
