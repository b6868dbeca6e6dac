// gpt/cuda/gpu.h in a build without CUDA.
#ifndef LNS_CUDA

#include "gpt/cuda/gpu.h"

#include "gpt/base/error.h"

namespace lns {

bool built_with_cuda() { return false; }

std::string why_no_gpu() {
    return "this build has no CUDA (`make` says why when it begins afresh)";
}

void use_gpu(const Ranks&) { fail(why_no_gpu()); }
Gpu gpu() { fail(why_no_gpu()); }
double measured_gpu_flops(DType) { fail(why_no_gpu()); }
Bandwidth measured_gpu_bandwidth() { fail(why_no_gpu()); }

std::unique_ptr<Model> make_cuda_model(const Config&, int, int, const ModelOptions&, const Ranks&) {
    fail(why_no_gpu());
}
MemoryPlan plan_cuda_memory(const Config&, int, int, const ModelOptions&) { fail(why_no_gpu()); }

} // namespace lns
#endif
