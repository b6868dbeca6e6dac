#include "gpt/run/bench.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <iostream>

#include "gpt/base/build.h"
#include "gpt/base/clock.h"
#include "gpt/base/error.h"
#include "gpt/base/random.h"
#include "gpt/base/terminal.h"
#include "gpt/cpu/bf16.h"
#include "gpt/cuda/gpu.h"
#include "gpt/model/model.h"
#include "gpt/run/banner.h"
#include "gpt/run/device.h"
#include "gpt/run/setup.h"

namespace lns {

namespace {

void measure_peaks(Bench& b) {
    const bool cuda = b.options.device == Device::cuda;
    b.float32_peak = std::max(b.float32_peak, cuda ? measured_gpu_flops(DType::float32)
                                                   : measured_peak_flops(b.threads));
    b.bf16_peak = std::max(b.bf16_peak,
                           cuda ? measured_gpu_flops(DType::bf16) : measured_bf16_flops(b.threads));
}

// Takes one step and returns its loss per token.
double step(Model& model, const Options& o, const std::vector<int>& tokens, int B, int T,
            int64_t number) {
    const int64_t n = int64_t(B) * T;
    StepInput input = {tokens.data(), tokens.data() + n, 1, B, T};
    input.loss_scale = 1 / double(n);
    input.grad_clip = o.grad_clip, input.gate_clip = o.clip_gates;
    input.hyperparameters = hyperparameters(o, o.lr, o.muon_peak(), number);
    model.begin_step(input);
    const StepResult result = model.end_step();
    const double loss = result.loss, norm = result.grad_norm;
    if (!std::isfinite(loss) || !std::isfinite(norm))
        fail("step ", number, ": the loss is ", loss, " and the gradient norm ", norm,
             "; timings of non-finite values are not representative");
    return loss;
}

} // namespace

double Bench::median_seconds() const {
    std::vector<double> sorted = seconds;
    std::sort(sorted.begin(), sorted.end());
    const size_t n = sorted.size();
    return n == 0 ? NAN : (sorted[(n - 1) / 2] + sorted[n / 2]) / 2;
}
double Bench::tokens_per_s() const { return double(B) * T / median_seconds(); }
double Bench::peak() const { return dtype == "bf16" ? bf16_peak : float32_peak; }
double Bench::mfu_measured() const {
    if (dtype == "bf16" && was_disturbed(bf16_peak, data_sheet_peak)) return NAN;
    return flops * tokens_per_s() / peak();
}
double Bench::mfu() const {
    const bool known = data_sheet_peak > 0 && dtype == "bf16";
    return known ? flops * tokens_per_s() / data_sheet_peak : mfu_measured();
}

Bench measure_training(const Options& o, const Ranks& ranks) {
    Bench b;
    b.config = model_config(o);
    check_length(std::max<int64_t>(o.batch, 1), o.seq_len, b.config);
    b.T = int(o.seq_len);
    const ModelOptions& options = b.options = model_options(o, Purpose::training);
    const bool cuda = options.device == Device::cuda;
    check_devices(options, ranks);
    b.B = o.batch > 0 ? int(o.batch) : batch_that_fits(b.config, b.T, options);
    check_memory(b.config, b.B, b.T, options);
    b.threads = use_threads(o);
    b.planned_memory = plan_memory(b.config, b.B, b.T, options).total();
    if (!cuda) b.planned_memory += resident_bytes().now;
    if (cuda) b.gpu = gpu().name, b.data_sheet_peak = data_sheet_bf16_flops(b.gpu);
    b.flops = flops_per_token(b.config, b.T);
    measure_peaks(b);

    {
        const int64_t free = cuda ? gpu().free : 0;
        std::unique_ptr<Model> model = make_model(b.config, b.B, b.T, options, ranks);
        b.device = model->device(), b.dtype = model->dtype();
        b.parameters = model->registry.count();
        model->initialize(uint64_t(o.seed));
        std::vector<int> tokens(size_t(b.B) * b.T * 2); // inputs, then targets
        for (size_t i = 0; i < tokens.size(); i++)
            tokens[i] = int(random_below(uint32_t(b.config.vocab_size), uint64_t(o.seed), 0, i));
        step(*model, o, tokens, b.B, b.T, 1);
        if (o.profile) model->profile = &b.profile;
        for (int64_t i = 0; i < o.timed_steps; i++) {
            const double start = now();
            b.losses.push_back(step(*model, o, tokens, b.B, b.T, i + 2));
            b.seconds.push_back(now() - start);
        }
        b.model_memory = model->bytes();
        b.peak_memory = cuda ? free - gpu().free : resident_bytes().peak;
    } // frees the model: measuring bandwidth needs memory
    measure_peaks(b);
    b.bandwidth = device_bandwidth(options, b.threads);
    return b;
}

std::string describe(const Bench& b) {
    auto flops = format_flops;
    auto bytes = [](double x) { return format_number("%.1f GB/s ", x / 1e9); };
    const bool cuda = b.options.device == Device::cuda;
    const auto [fastest, slowest] = std::minmax_element(b.seconds.begin(), b.seconds.end());
    const Bandwidth& m = b.bandwidth;
    std::string text =
        cat("model      ", b.config.preset.empty() ? b.config.model_type : b.config.preset, ", ",
            b.config.scheme.name(), ", ", format_count(double(b.parameters)), " parameters, in ",
            b.dtype, "\n");
    text += cat("step       ", b.B, " x ", b.T, " tokens in ",
                format_number("%.4g s (median of ", b.median_seconds()), b.seconds.size(),
                format_number(", %.4g", *fastest), format_number(" to %.4g s)\n", *slowest));
    text += cat("speed      ", format_number("%.4g", b.tokens_per_s()), " tokens/s at ",
                format_count(b.flops), " FLOPs per token: ", format_number("%.1f%%", 100 * b.mfu()),
                b.mfu() == b.mfu_measured() ? " of the peak in " : " of the data sheet's peak in ",
                b.dtype, " (MFU)",
                b.mfu() == b.mfu_measured() ? ""
                : std::isfinite(b.mfu_measured())
                    ? format_number(", %.1f%% of the measured", 100 * b.mfu_measured())
                    : "",
                "\n");
    if (std::isnan(b.mfu_measured()))
        text += "           the measured peak is less than half of the data sheet's: another "
                "program was using the GPU\n";
    text += cat("memory     ",
                b.peak_memory ? format_bytes(double(b.peak_memory)) +
                                    (cuda ? " of GPU memory" : " at its peak")
                              : "unknown on this system",
                "; --dry-run predicts ", format_bytes(double(b.planned_memory)), "\n");
    const std::string unit =
        cuda ? "cuBLASLt; data sheet: " +
                   (b.data_sheet_peak > 0 ? flops(b.data_sheet_peak) : std::string("unknown"))
        : bf16_unit() == Bf16Unit::none ? "computed in float32: this CPU has no bf16 unit"
                                        : name_of(bf16_unit());
    text += cat("peaks      ", flops(b.float32_peak), " in float32, ", flops(b.bf16_peak),
                " in bf16 (", unit, ")\n");
    if (m.read > 0)
        text += cat("           memory: ", bytes(m.read), "read, ", bytes(m.write), "written, ",
                    bytes(m.update), "updated in place\n");
    return text;
}

std::string to_json(const Bench& b) {
    nlohmann::ordered_json j = {
        {"model", b.config.preset.empty() ? b.config.model_type : b.config.preset},
        {"scheme", b.config.scheme.name()},
        {"device", b.device},
        {"dtype", b.dtype},
        {"optimizer", b.options.optimizer->name},
        {"batch", b.B},
        {"seq_len", b.T},
        {"threads", b.threads},
        {"parameters", b.parameters},
        {"flops_per_token", b.flops},
        {"seconds", b.seconds},
        {"median_seconds", b.median_seconds()},
        {"tokens_per_s", b.tokens_per_s()},
        {"mfu", b.mfu()},
        {"mfu_measured", b.mfu_measured()},
        {"losses", b.losses},
        {"peak_memory", b.peak_memory},
        {"planned_memory", b.planned_memory},
        {"model_memory", b.model_memory},
        {"peak_flops", {{"float32", b.float32_peak}, {"bf16", b.bf16_peak}}},
        {"data_sheet_flops", b.data_sheet_peak},
        {"bf16_unit", name_of(bf16_unit())},
        {"bandwidth",
         {{"read", b.bandwidth.read},
          {"write", b.bandwidth.write},
          {"update", b.bandwidth.update}}},
        {"cpu", cpu_features()},
        {"gpu", b.gpu},
        {"version", build_info().version},
        {"config", nlohmann::json::parse(config_to_json(b.config))},
    };
    for (const Profile::Part& p : b.profile.parts)
        j["profile"].push_back({{"part", p.name},
                                {"group", p.group},
                                {"calls", p.calls},
                                {"seconds", p.seconds},
                                {"flops", p.flops},
                                {"bytes", p.bytes}});
    return j.dump();
}

int bench(const Options& o, const Ranks& ranks) {
    if (ranks.size > 1)
        fail("bench measures one process, but mpirun started ", ranks.size,
             ": run it without mpirun, with --threads");
    const Bench b = measure_training(o, ranks);
    if (o.json) {
        std::cout << to_json(b) << std::endl;
        return 0;
    }
    std::cout << describe_machine(b.threads, ranks, {}, b.options) << describe(b);
    if (o.profile) {
        double seconds = 0;
        for (double s : b.seconds) seconds += s;
        std::cout << "\n"
                  << profile_table(b.profile, int64_t(b.seconds.size()), seconds,
                                   {b.peak(), b.bandwidth.update});
    }
    std::cout << std::flush;
    return 0;
}

} // namespace lns
