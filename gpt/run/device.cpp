#include "gpt/run/device.h"

#include <algorithm>
#include <cmath>
#include <unistd.h>
#include <vector>

#include "gpt/base/cgroup.h"
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

double available_memory(Device device) {
    // CUDA's own memory is already in use; the reserve is for kernels that cuBLASLt loads later.
    if (device == Device::cuda) return std::max(double(gpu().free) - 256e6, 0.0);
    const double limit = cgroup_memory();
#ifdef _SC_PHYS_PAGES
    const double bytes = double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGE_SIZE));
    if (bytes > 0) return std::min(bytes, limit);
#endif
    return limit;
}

double needed_memory(const Config& config, int64_t B, int T, const ModelOptions& options) {
    return double(plan_memory(config, int(B), T, options).total());
}

// The largest batch of T-token sequences that fits; 0 if not even one does.
int64_t largest_batch(const Config& config, int most, int T, const ModelOptions& options) {
    const double memory = available_memory(options.device);
    int64_t fits = 0, too_many = int64_t(most) + 1;
    while (too_many - fits > 1) {
        const int64_t B = (fits + too_many) / 2;
        (needed_memory(config, B, T, options) <= memory ? fits : too_many) = B;
    }
    return fits;
}

// Options that need less memory: with single changes, then with all of them but the device.
std::vector<ModelOptions> savings(const ModelOptions& o) {
    std::vector<ModelOptions> each;
    ModelOptions all = o;
    auto add = [&](bool possible, const auto& change) {
        if (!possible) return;
        change(each.emplace_back(o));
        change(all);
    };
    const bool training = o.purpose == Purpose::training;
    for (Recompute more : {Recompute::activations, Recompute::layers})
        add(training && o.recompute < more, [&](ModelOptions& x) { x.recompute = more; });
    add(o.purpose == Purpose::jacobians || o.purpose == Purpose::gradients,
        [](ModelOptions& x) { x.purpose = Purpose::layers; });
    add(o.dtype == DType::float32, [](ModelOptions& x) { x.dtype = DType::bf16; });
    if (training) {
        all.master_weights = false, all.moments = DType::bf16;
        if (o.device == Device::cuda) all.gradients = DType::bf16;
    }
    each.push_back(all);
    return each;
}

// The flags that turn one into the other.
std::string flags_between(const ModelOptions& from, const ModelOptions& to) {
    std::string flags;
    auto add = [&](bool changed, const char* flag) {
        if (changed) flags += cat(flags.empty() ? "" : " ", flag);
    };
    add(from.device != to.device, to.device == Device::cpu ? "--device cpu" : "--device cuda");
    add(from.purpose != to.purpose, "--probes variance,angular,removal");
    add(from.dtype != to.dtype, "--dtype bf16");
    add(from.master_weights != to.master_weights, "--master-weights no");
    add(from.moments != to.moments, "--moments bf16");
    add(from.recompute != to.recompute,
        to.recompute == Recompute::activations ? "--recompute activations" : "--recompute layers");
    return flags;
}

// ": try --batch 12, or --batch 16 with --recompute layers"; each allows a larger batch than those
// before.
std::string what_would_fit(const Config& config, int B, int T, const ModelOptions& options) {
    std::vector<ModelOptions> changes = savings(options);
    const ModelOptions least = changes.back();
    changes.insert(changes.begin(), options);
    if (why_no_gpu().empty())
        for (ModelOptions other : {options, least}) {
            other.device = options.device == Device::cpu ? Device::cuda : Device::cpu;
            other.gradients = DType::float32;
            changes.push_back(other);
        }
    std::string advice;
    auto suggest = [&](const std::string& size, const std::string& flags) {
        advice += cat(advice.empty() ? ": try " : ", or ", size,
                      size.empty() || flags.empty() ? "" : " with ", flags);
    };
    int64_t most = 0;
    for (const ModelOptions& o : changes) {
        const int64_t batch = largest_batch(config, B, T, o);
        if (batch <= most) continue;
        most = batch;
        suggest(batch == B ? "" : cat("--batch ", batch), flags_between(options, o));
    }
    if (most > 0) return advice;

    const std::string flags = flags_between(options, least);
    int shorter = T;
    if (options.purpose == Purpose::training)
        while (shorter > 1 && largest_batch(config, 1, shorter, least) == 0) shorter /= 2;
    if (largest_batch(config, 1, shorter, least) > 0) {
        suggest(cat("--batch 1 --seq-len ", shorter), flags);
        return advice;
    }
    const std::string all =
        cat(B > 1 ? "--batch 1" : "", B > 1 && !flags.empty() ? " " : "", flags);
    if (!all.empty())
        advice = cat("; even with ", all, " it needs ",
                     format_bytes(needed_memory(config, 1, T, least)));
    return advice + ": use a smaller model, or a machine with more memory";
}

const char* name_of(Purpose purpose) {
    switch (purpose) {
    case Purpose::score:
        return "evaluating this model";
    case Purpose::generate:
        return "generating text with this model";
    case Purpose::layers:
    case Purpose::jacobians:
    case Purpose::gradients:
        return "measuring this model's layers";
    case Purpose::training:
        return "training this model";
    }
    return "";
}

} // namespace

void check_memory(const Config& config, int B, int T, const ModelOptions& options) {
    const double needs = needed_memory(config, B, T, options);
    const double has = available_memory(options.device);
    if (needs <= has) return;
    const std::string needed = cat(name_of(options.purpose), " needs ", format_bytes(needs));
    const std::string advice = what_would_fit(config, B, T, options);
    if (options.device == Device::cuda)
        fail(needed, " of GPU memory; ", gpu().name, " has ", format_bytes(has), " of ",
             format_bytes(double(gpu().memory)), " free", advice);
    fail(needed, " of memory; this machine ", has < cgroup_memory() ? "has " : "allows ",
         format_bytes(has), advice);
}

int batch_that_fits(const Config& config, int T, const ModelOptions& options) {
    check_memory(config, 1, T, options);
    const double has = available_memory(options.device);
    const int64_t most = options.device == Device::cuda ? 1 << 18 : 1 << 12;
    int B = 1;
    while (2 * int64_t(B) * T <= most && needed_memory(config, 2 * B, T, options) <= has) B *= 2;
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
