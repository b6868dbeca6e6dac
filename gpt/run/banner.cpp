#include "gpt/run/banner.h"

#include <cmath>
#include <cstdio>

#include "gpt/base/build.h"
#include "gpt/base/error.h"
#include "gpt/base/terminal.h"
#include "gpt/cpu/peak.h"
#include "gpt/cuda/gpu.h"

namespace lns {

namespace {

// "model.layers.3.mlp.up_proj.weight" becomes "model.layers.*.mlp.up_proj.weight".
std::string kind_of(const std::string& name) {
    for (const char* layers : {"model.layers.", "transformer.h."})
        if (size_t n = std::string(layers).size(); name.rfind(layers, 0) == 0)
            return name.substr(0, n) + "*" + name.substr(name.find('.', n));
    return name;
}

std::string plural(int64_t n, const char* what) { return cat(n, " ", what, n == 1 ? "" : "s"); }

// "NVIDIA H100 80GB HBM3, 79.1 of 79.6 GiB free, …"
std::string describe_gpu() {
    const Gpu g = gpu();
    auto version = [](int v) { return cat(v / 1000, ".", v % 1000 / 10); };
    return cat(g.name, g.count > 1 ? cat(" (", g.index, " of 0 to ", g.count - 1, ")") : "", ", ",
               format_bytes(double(g.free)), " of ", format_bytes(double(g.memory)),
               " free, compute capability ", g.major, ".", g.minor, ", ",
               plural(g.multiprocessors, "multiprocessor"), "; driver for CUDA ", version(g.driver),
               ", built with ", version(g.runtime));
}

} // namespace

std::string describe_machine(int threads, const Ranks& ranks, const Peak& peak,
                             const ModelOptions& options) {
    const BuildInfo& build = build_info();
    std::string with;
    for (const auto& [name, value] : build.features)
        with += (with.empty() ? "" : ", ") + name + " " + value;
    std::string text = cat("train_gpt  ", build.version, ", ", with, "\n");
    text += cat("machine    ", cpu_features(), "\n");
    text += cat("           ", plural(threads, "thread"),
                ranks.size > 1 ? cat(" on each of ", ranks.size, " ranks") : "");
    if (options.device == Device::cuda) text += "\nGPU        " + describe_gpu();
    if (peak.flops > 0)
        text += cat(
            options.device == Device::cuda ? "\n           " : "; ", "measured peak ",
            format_flops(peak.measured), " in ", options.dtype == DType::bf16 ? "bf16" : "float32",
            peak.flops == peak.measured ? "" : "; data sheet: " + format_flops(peak.flops),
            was_disturbed(peak.measured, peak.flops) ? "; is another program using the GPU?" : "");
    if (options.device == Device::cpu && built_with_cuda() && !why_no_gpu().empty())
        text += "\n           not on a GPU: " + why_no_gpu();
    return text + "\nprecision  " + describe_precision(options) + "\n";
}

std::string describe_model(const Config& c, int B, int T, const ModelOptions& options) {
    Registry registry = make_registry(c);
    Table table;
    table.headers = {"parameter", "shape", "tensors", "count"};
    std::vector<int64_t> tensors, counts;
    for (const Param& p : registry.params) {
        std::string kind = kind_of(p.name), shape;
        for (int64_t d : p.shape) shape += (shape.empty() ? "" : " x ") + std::to_string(d);
        size_t row = 0;
        while (row < table.rows.size() &&
               (table.rows[row][0] != kind || table.rows[row][1] != shape))
            row++;
        if (row == table.rows.size()) {
            table.rows.push_back({kind, shape});
            tensors.push_back(0), counts.push_back(0);
        }
        tensors[row]++, counts[row] += p.size();
    }
    for (size_t row = 0; row < table.rows.size(); row++) {
        table.rows[row].push_back(std::to_string(tensors[row]));
        table.rows[row].push_back(format_count(double(counts[row])));
    }

    const Scheme& s = c.scheme;
    std::string scheme = s.name();
    if (s.row->depth != DepthScale::none)
        scheme += cat(" (power ", s.lns_power, ", sites ", s.sites(), ")");
    std::string text =
        cat("model      ", c.preset.empty() ? c.model_type : c.preset + ", " + c.model_type, ", ",
            plural(c.layers, "layer"), ", width ", c.width, ", ", plural(c.heads, "head"),
            c.kv_heads != c.heads ? cat(" (", c.kv_heads, " KV heads)") : "", ", MLP ", c.mlp_width,
            ", vocabulary ", c.vocab_size, ", norm scheme ", scheme, "\n");
    if (!c.scheme.warning().empty()) text += "WARNING: " + c.scheme.warning() + "\n";
    text += "\n";
    for (const std::string& note : c.notes) text += "note: " + note + "\n";
    text += table.text();
    MemoryPlan m = plan_memory(c, B, T, options);
    double flops = flops_per_token(c, T);
    text += cat("\nparameters ", format_count(double(registry.count())), "; ", format_count(flops),
                " training FLOPs a token, in sequences of ", T, " tokens\n");
    const bool cuda = options.device == Device::cuda;
    const double program = cuda ? 0 : double(resident_bytes().now);
    text += cat(
        "memory     ", format_bytes(double(m.total()) + program),
        cuda ? " of the GPU's: parameters " : ": parameters ", format_bytes(double(m.parameters)),
        ", gradients ", format_bytes(double(m.gradients)), ", optimizer ",
        format_bytes(double(m.optimizer)), ", activations ", format_bytes(double(m.activations)),
        " for ", B, " x ", T, cuda ? " tokens, matmul workspace " : " tokens, the program ",
        format_bytes(program + double(m.scratch)), "\n");
    return text;
}

std::string describe_data(const Data& data, const Loader& train, const Loader& val,
                          double windows) {
    auto line = [](const Loader& loader) {
        std::string text = loader.source->describe();
        if (loader.source->size() != TokenSource::endless)
            text += cat(", ", format_count(double(loader.windows_per_epoch())), " sequences");
        return text;
    };
    std::string text = cat("data       ", line(train), "\n");
    if (train.source->size() != TokenSource::endless)
        text +=
            cat("           ", format_number("%.3g", windows / double(train.windows_per_epoch())),
                " epochs\n");
    text += cat("validation ", line(val), "\n");
    text +=
        cat("tokenizer  ",
            data.id.vocab_size ? cat(data.id.kind, ", ", data.id.vocab_size, " tokens") : "unknown",
            data.tokenizer                  ? ""
            : data.why_no_tokenizer.empty() ? "; samples are token ids (name it with "
                                              "--tokenizer)"
                                            : "; samples are token ids: " + data.why_no_tokenizer,
            "\n");
    return text;
}

std::string describe_schedule(const Schedule& s, const Options& o, int64_t tokens_per_step,
                              int64_t micro_batches) {
    std::string text =
        cat("run        ", plural(s.steps, "step"), " of ", tokens_per_step, " tokens",
            micro_batches > 1 ? cat(" (", micro_batches, " micro-batches per rank)") : "", ", ",
            format_count(double(s.steps) * double(tokens_per_step)), " tokens in total\n");
    const Optimizer& optimizer = optimizer_row(o.optimizer);
    if (optimizer.matrices != UpdateRule::adamw)
        text += cat("matrices   ", optimizer.title, " by ", o.orthogonalize, ", ", o.muon_scale,
                    "'s scale, peak ", o.muon_peak(), ", momentum ", o.momentum, "\n");
    text +=
        cat("optimizer  ", optimizer_row("adamw").title,
            optimizer.matrices != UpdateRule::adamw ? " for the rest" : "",
            o.weight_decay > 0
                ? cat(o.cautious_decay ? ", cautious decay " : ", decay ", o.weight_decay)
                : ", no decay",
            ", betas ", o.beta1, " ", o.beta2, ", eps ", o.eps,
            o.grad_clip > 0 ? cat(", gradient clipped to ", o.grad_clip) : ", no clipping", "\n");
    text += cat("schedule   ", s.kind, ", peak ", s.peak, " after ", plural(s.warmup, "step"),
                " of warmup");
    if (s.kind != "constant") text += cat(", ", s.peak * s.final_fraction, " at the end");
    text += "\n";
    if (s.warmup >= s.steps && s.steps > 0)
        text += "note: the warmup is as long as the run, so the learning rate never falls\n";
    return text;
}

std::string describe_lisa(const Options& o, const Config& c, double flops) {
    const Registry registry = make_registry(c);
    double all = 0, of_layers = 0;
    for (const Param& p : registry.params)
        all += double(p.size()), of_layers += p.layer >= 0 ? double(p.size()) : 0;
    return cat("LISA       ", o.lisa, " of ", plural(c.layers, "layer"), " at a time, drawn anew ",
               o.lisa_interval == 1 ? "each step" : cat("every ", o.lisa_interval, " steps"), ": ",
               format_count(all - of_layers + of_layers * double(o.lisa) / c.layers), " of ",
               format_count(all), " parameters train, ", format_count(flops), " FLOPs a token\n");
}

std::string describe_variance(const std::vector<double>& variance) {
    double max = 0;
    for (double v : variance) max = std::max(max, v);
    Table table;
    table.headers = {"layer", "output variance", ""};
    for (size_t l = 0; l < variance.size(); l++)
        table.rows.push_back({l == 0 ? "embed" : std::to_string(l),
                              format_number("%.4g", variance[l]), bar(variance[l], max, 40)});
    return table.text();
}

} // namespace lns
