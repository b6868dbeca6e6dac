#include "gpt/run/device.h"

#include <algorithm>
#include <cmath>
#include <unistd.h>

#include "gpt/base/error.h"
#include "gpt/base/random.h"
#include "gpt/base/terminal.h"
#include "gpt/cuda/gpu.h"

namespace lns {

std::unique_ptr<Model> make_model(const Config& config, int B, int T, const ModelOptions& options,
                                  const Ranks& ranks) {
    if (options.device == Device::cuda) {
        use_gpu(ranks);
        return make_cuda_model(config, B, T, options, ranks);
    }
    auto model = make_cpu_model(config, B, T, options);
    model->ranks = &ranks;
    return model;
}

MemoryPlan plan_memory(const Config& config, int B, int T, const ModelOptions& options) {
    return options.device == Device::cuda ? plan_cuda_memory(config, B, T, options)
                                          : plan_cpu_memory(config, B, T, options);
}

void check_devices(const ModelOptions& options, const Ranks& ranks) {
    const bool cuda = options.device == Device::cuda;
    if (ranks.any(cuda) && ranks.any(!cuda))
        fail("some ranks have a GPU and others have none (rank ", ranks.rank, ": ",
             cuda ? "a GPU" : why_no_gpu(),
             "): use --device cpu, or start ranks only on machines with GPUs");
    if (!cuda) return;
    use_gpu(ranks);
    if (ranks.size == 1) return;
    // A launcher may show each rank one GPU or all of them, so compare ids and not indices.
    const Gpu mine = gpu();
    std::vector<double> ids(size_t(ranks.size));
    ids[size_t(ranks.rank)] = double(fnv1a(mine.id) >> 12); // 52 bits: a sum with zeros is exact
    ranks.sum(ids.data(), ranks.size);
    for (int rank = 0; rank < ranks.size; rank++)
        if (rank != ranks.rank && ids[size_t(rank)] == ids[size_t(ranks.rank)])
            fail("ranks ", std::min(rank, ranks.rank), " and ", std::max(rank, ranks.rank),
                 " would share a GPU: rank ", ranks.rank, "'s machine has ", ranks.local_size,
                 " ranks, of which this one sees ", mine.count, mine.count == 1 ? " GPU" : " GPUs",
                 ": start one rank per GPU");
}

namespace {

// The largest batch of T-token sequences that fits into `memory`; 0 if not even one does.
int64_t largest_batch(const Config& config, int most, int T, const ModelOptions& options,
                      double memory) {
    int64_t fits = 0, too_many = int64_t(most) + 1;
    while (too_many - fits > 1) {
        const int64_t B = (fits + too_many) / 2;
        (double(plan_memory(config, int(B), T, options).total()) <= memory ? fits : too_many) = B;
    }
    return fits;
}

// ": try --batch 12, or --batch 16 with --recompute layers"
std::string what_would_fit(const Config& config, int B, int T, ModelOptions options,
                           double memory) {
    std::string advice;
    if (const int64_t batch = largest_batch(config, B, T, options, memory); batch > 0)
        advice = cat(": try --batch ", batch);
    for (auto [recompute, name] : {std::pair{Recompute::activations, "activations"},
                                   std::pair{Recompute::layers, "layers"}}) {
        if (!options.training || int(recompute) <= int(options.recompute)) continue;
        options.recompute = recompute;
        const double needs = double(plan_memory(config, B, T, options).total());
        if (needs > memory && recompute != Recompute::layers) continue;
        const int64_t batch = needs <= memory ? B : largest_batch(config, B, T, options, memory);
        if (batch > 0)
            advice += cat(advice.empty() ? ": try" : ", or", " --batch ", batch,
                          " with --recompute ", name);
        break;
    }
    return advice.empty() ? ", too little for any --batch: lower --seq-len or use a smaller model"
                          : advice;
}

double available_memory(const ModelOptions& options) {
    // CUDA's own memory is already in use; the reserve is for kernels that cuBLASLt loads later.
    if (options.device == Device::cuda) return std::max(double(gpu().free) - 256e6, 0.0);
#ifdef _SC_PHYS_PAGES
    const double bytes = double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGE_SIZE));
    if (bytes > 0) return bytes;
#endif
    return INFINITY;
}

} // namespace

void check_memory(const Config& config, int B, int T, const ModelOptions& options) {
    const double needs = double(plan_memory(config, B, T, options).total());
    const double has = available_memory(options);
    if (needs <= has) return;
    if (options.device == Device::cuda)
        fail("this model needs ", format_bytes(needs), " of GPU memory; ", gpu().name, " has ",
             format_bytes(has), " of ", format_bytes(double(gpu().memory)), " free",
             what_would_fit(config, B, T, options, has));
    fail("training needs ", format_bytes(needs), " of memory; this machine has ", format_bytes(has),
         what_would_fit(config, B, T, options, has));
}

int batch_that_fits(const Config& config, int T, const ModelOptions& options) {
    check_memory(config, 1, T, options);
    const double has = available_memory(options);
    const int64_t most = options.device == Device::cuda ? 1 << 18 : 1 << 12;
    int B = 1;
    while (2 * int64_t(B) * T <= most &&
           double(plan_memory(config, 2 * B, T, options).total()) <= has)
        B *= 2;
    return B;
}

Peak device_peak(const ModelOptions& options, int threads) {
    Peak peak;
    if (options.device == Device::cpu) {
        peak.flops = peak.measured = measured_peak(options.dtype, threads);
        return peak;
    }
    const Gpu on = gpu();
    peak.flops = peak.measured = measured_gpu_flops(options.dtype);
    if (options.dtype == DType::bf16 && data_sheet_bf16_flops(on.name) > 0)
        peak.flops = data_sheet_bf16_flops(on.name);
    return peak;
}

Bandwidth device_bandwidth(const ModelOptions& options, int threads) {
    return options.device == Device::cuda ? measured_gpu_bandwidth() : measured_bandwidth(threads);
}

} // namespace lns
