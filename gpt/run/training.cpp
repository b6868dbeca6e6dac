#include "gpt/run/training.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>
#include <new>
#include <unistd.h>

#include "gpt/base/error.h"
#include "gpt/base/signals.h"
#include "gpt/run/admin.h"
#include "gpt/run/banner.h"
#include "gpt/run/facts.h"
#include "gpt/run/sample.h"

namespace lns {

namespace {

// Its sentence says what is saved.
struct FinalError : Error {
    using Error::Error;
};

// A step's tokens. A run that continues on another number of ranks keeps them, with a smaller
// micro-batch where --batch does not divide them.
int64_t checked_total_batch(Options& o, const Ranks& ranks) {
    const StepShape shape = step_shape(o, ranks.size);
    if (shape.batch != o.batch)
        o.changes.push_back(cat("a step keeps its ", shape.tokens, " tokens, so --batch is ",
                                shape.batch, " on ", ranks.size,
                                ranks.size == 1 ? " rank" : " ranks", ", not ", o.batch));
    o.batch = shape.batch;
    return shape.tokens;
}

[[noreturn]] void fail_nonfinite(Run& run, int64_t step, const char* what) {
    const std::string first = run.model->first_nonfinite();
    throw FinalError(cat("step ", step, ": ", what, " is not finite",
                         first.empty() ? "" : "; the first tensor that is not: " + first,
                         ". This step's weights were not saved; ",
                         run.last_checkpoint.empty()
                             ? "there is no checkpoint yet"
                             : "the last good checkpoint is " + run.last_checkpoint,
                         ". Lower --lr, or raise --warmup"));
}

// The tokens of a whole step: of each micro-batch, every rank takes its B windows.
void draw_batch(Run& run) {
    const size_t n = size_t(run.B) * run.T;
    for (int m = 0; m < run.micro_batches; m++) {
        run.loader->skip(uint64_t(run.ranks.rank) * run.B);
        run.loader->next(run.B, &run.inputs[m * n], &run.targets[m * n]);
        run.loader->skip(uint64_t(run.ranks.size - 1 - run.ranks.rank) * run.B);
    }
}

// An error belongs to the step that the tokens are for.
void draw_ahead(Run& run) {
    run.before_draw = run.loader->state();
    run.drawn = true;
    run.draw_error.run([&] { draw_batch(run); });
}

std::string sample_text(Run& run) {
    const Options& o = run.o;
    const Tokenizer* tokenizer = run.data.tokenizer.get();
    std::vector<int> prompt;
    if (tokenizer) prompt = tokenizer->encode_prompt(o.prompt);
    if (prompt.empty()) prompt = {std::max(run.data.id.eot, 0)};
    std::vector<int> tokens = generate(*run.model, prompt, int(o.sample_tokens), run.T,
                                       {o.temperature, int(o.top_k), o.top_p, uint64_t(o.seed),
                                        tokenizer ? tokenizer->vocab_size() : 0},
                                       [&](int) { return !should_stop(run); });
    if (tokenizer) {
        const std::string more = continuation(*tokenizer, prompt, tokens);
        return o.prompt + printable(more.substr(0, whole_characters(more)));
    }
    std::string text = "token ids";
    for (int token : tokens) text += " " + std::to_string(token);
    return text;
}

std::string command_to_continue(const Run& run) {
    const char* words[] = {run.o.argv.empty() ? "./train_gpt" : run.o.argv[0].c_str(), "-o",
                           run.o.out.c_str(), "-y"};
    return cat(run.ranks.size > 1 ? cat("mpirun -np ", run.ranks.size, " ") : "",
               shell_quoted(4, words));
}

// For any rank to print when another is lost.
void set_advice(const Run& run) {
    run.ranks.set_advice(cat(run.last_checkpoint.empty()
                                 ? "There is no checkpoint yet"
                                 : "The newest checkpoint is " + run.last_checkpoint,
                             "; continue with: ", command_to_continue(run)));
}

// The run's directory may disappear during training.
void restore_directory(Run& run) {
    const std::string lost = run.directory->recreate_if_lost();
    if (!lost.empty() && lost != run.lost_directory)
        run.print(cat("WARNING: ", lost, ". Training goes on"));
    run.lost_directory = lost;
}

// On rank 0. Older checkpoints are kept until the new one is complete.
void save(Run& run) {
    restore_directory(run);
    run.state.loader = run.drawn ? run.before_draw : run.loader->state();
    run.state.flags = run.o.flags;
    run.state.tokenizer = run.data.id;
    run.state.windows = run.loader->windows_per_epoch();
    std::string path = run.directory->checkpoint_path(run.state.step);
    save_checkpoint(path, *run.model, run.state, run.data.tokenizer.get());
    run.last_checkpoint = path;
    run.saved_step = run.state.step;
    set_advice(run);
    run.directory->keep_last(int(run.o.keep));
}

// Writes one forward and backward pass on the first batch, for comparison with other programs.
void dump_state(Run& run) {
    Model& model = *run.model;
    draw_batch(run);
    const int B = run.B, T = run.T, V = run.config.vocab_size;
    const size_t n = size_t(B) * T;
    double valid = 0;
    for (size_t i = 0; i < n; i++) valid += run.targets[i] >= 0;
    if (valid == 0) fail("none of the first batch's tokens has a target");
    model.zero_gradients();
    const float loss = float(
        model.loss_and_gradients(run.inputs.data(), run.targets.data(), B, T, 1 / valid) / valid);
    std::vector<float> logits(n * V);
    model.logits(run.inputs.data(), B, T, false, logits.data());

    std::vector<TensorOut> tensors;
    tensors.push_back(tensor_out({"inputs", "I32", {B, T}, run.inputs.data(), n * 4}));
    tensors.push_back(tensor_out({"targets", "I32", {B, T}, run.targets.data(), n * 4}));
    tensors.push_back(tensor_out({"loss", "F32", {}, &loss, 4}));
    tensors.push_back(tensor_out({"logits", "F32", {B, T, V}, logits.data(), n * V * 4}));
    for (const Param& p : model.registry.params)
        tensors.push_back(param_tensor(model, Buffer::parameters, p, p.name));
    for (const Param& p : model.registry.params)
        tensors.push_back(param_tensor(model, Buffer::gradients, p, "grad." + p.name));
    write_safetensors(run.o.dump_state, tensors, {{"config", config_to_json(run.config)}});
    std::printf("wrote %s: loss %.6f on %d x %d tokens\n", printable(run.o.dump_state).c_str(),
                loss, B, T);
}

std::optional<Lisa> lisa_of(const Options& o, const Config& config) {
    if (o.lisa == 0 && o.is_given("--lisa-interval"))
        fail("--lisa-interval ", o.lisa_interval,
             ": all layers train, so none are drawn: add --lisa N, or leave it out");
    if (o.lisa > config.layers)
        fail("--lisa ", o.lisa, ": the model has ", config.layers,
             " layers: train at most these, or leave it out to train all");
    if (o.lisa == 0) return std::nullopt;
    return Lisa(uint64_t(o.seed), config.layers, int(o.lisa), o.lisa_interval);
}

// Rounded up, so that every sequence is seen --epochs times.
int64_t steps_of_epochs(const Run& run) {
    const uint64_t windows = run.loader->windows_per_epoch();
    if (windows == TokenSource::endless)
        fail("--epochs ", run.o.epochs,
             ": the training data is endless; name shards with -i, or "
             "give --steps");
    const double steps =
        std::ceil(run.o.epochs * double(windows) * run.T / double(run.tokens_per_step));
    if (!(steps < 1e15)) fail("--epochs ", run.o.epochs, " is ", steps, " steps: too many");
    return int64_t(steps);
}

// Reads and checks what the options name, before anything is allocated or written.
// Whether the first batch sets weights before it is trained on.
bool profiles(const Run& run, const std::string& resume_from) {
    return run.config.scheme.row->profiled && run.o.init_from.empty() && resume_from.empty();
}

void prepare(Run& run, const std::string& resume_from) {
    Options& o = run.o;
    run.threads = use_threads(o);
    run.model_options = model_options(o, Purpose::training);
    check_devices(run.model_options, run.ranks);
    if (o.probe_every > 0 && run.model_options.recompute != Recompute::none)
        fail("--probe-every needs what --recompute ", o.recompute,
             " does not keep: leave one of the two out");
    o.flags["--dtype"] = run.model_options.dtype == DType::bf16 ? "bf16" : "float32";
    run.config = resume_from.empty() ? model_config(o) : checkpoint_config(resume_from);
    if (profiles(run, resume_from) && run.model_options.recompute != Recompute::none)
        fail("-n ", run.config.scheme.name(),
             " profiles the first batch layer by layer, which "
             "--recompute ",
             o.recompute, " does not keep: leave it out, or choose -n admin:const");
    if (!resume_from.empty()) o.vocab = run.config.vocab_size; // the data cannot change it now
    run.data = open_data(o);
    fit_vocabulary(o, run.data, run.config);
    // Documents and instructions have a length of their own.
    if (const int window = run.data.train->window();
        window > 0 && !o.is_given("--seq-len") && !o.continued) {
        o.seq_len = window;
        o.flags["--seq-len"] = o.seq_len;
    }
    check_length(o.batch, o.seq_len, run.config);
    run.tokens_per_step = checked_total_batch(o, run.ranks);
    o.flags["--total-batch"] = run.tokens_per_step;
    run.B = int(o.batch), run.T = int(o.seq_len);
    run.micro_batches = int(run.tokens_per_step / (o.batch * o.seq_len * run.ranks.size));
    run.loader.emplace(run.data.train, run.T, uint64_t(o.seed), true);
    run.val_loader.emplace(run.data.val, run.T, 0, false);
    if (o.epochs > 0 && !o.is_given("--steps")) {
        o.steps = steps_of_epochs(run);
        o.flags["--steps"] = o.steps;
    } else {
        o.epochs = 0;
        o.flags["--epochs"] = 0.0;
    }
    run.schedule = {o.lr_schedule, o.lr, o.steps, o.warmup_steps(), o.final_lr_frac};
    run.lisa = lisa_of(o, run.config);
    run.flops = flops_per_token(run.config, run.T, run.lisa ? run.config.layers - int(o.lisa) : 0);
    if (o.val_tasks.empty()) return;
    if (!run.data.tokenizer)
        fail("--val-tasks needs the tokenizer of the data, and there is none: ",
             run.data.why_no_tokenizer.empty() ? "name it with --tokenizer"
                                               : run.data.why_no_tokenizer);
    TaskSettings settings;
    settings.data = o.task_data, settings.limit = o.val_task_limit, settings.share_limit = true;
    const int64_t rows = int64_t(run.B) * run.T;
    run.tasks = prepare_tasks(parse_tasks(o.val_tasks), settings, *run.data.tokenizer,
                              run.config.vocab_size,
                              int(std::min<int64_t>(run.config.positions, rows)), rows);
}

// Ranks must agree on what the options led to on each machine, …
void compare_plans(const Run& run) {
    if (run.ranks.size == 1) return;
    Facts facts;
    for (const auto& [flag, value] : run.o.flags) facts.push_back({flag, flag_text(value)});
    for (const Facts& more :
         {config_facts(run.config), data_facts("training", *run.data.train, *run.loader),
          data_facts("validation", *run.data.val, *run.val_loader)})
        facts.insert(facts.end(), more.begin(), more.end());
    std::erase_if(facts, [](const auto& fact) { return fact.first == "--threads"; });
    run.ranks.compare(facts);
}

// … and on the state they start from.
void compare_states(const Run& run) {
    if (run.ranks.size == 1) return;
    const LoaderState at = run.loader->state();
    Facts facts = {{"a checkpoint of step", cat(run.state.step)},
                   {"read of the data", cat(at.epoch, " epochs and ", at.index, " sequences")},
                   fingerprint_fact("weights", fingerprint(*run.model, Buffer::parameters))};
    if (run.state.step > 0)
        for (int i = 0; const OptimizerState& state : run.model->optimizer->states)
            facts.push_back(
                fingerprint_fact(state.what, fingerprint(*run.model, {Buffer::state, i++})));
    run.ranks.compare(facts);
}

void print_banner(Run& run) {
    run.print(describe_machine(run.threads, run.ranks, run.peak, run.model_options) +
              describe_model(run.config, run.B, run.T, run.model_options) +
              describe_data(run.data, *run.loader, *run.val_loader,
                            double(run.o.steps) * double(run.tokens_per_step) / run.T) +
              describe_schedule(run.schedule, run.o, run.tokens_per_step, run.micro_batches) +
              (run.lisa ? describe_lisa(run.o, run.config, run.flops) : ""));
}

// Locks the run's directory. Throws if the disk has no room for a checkpoint.
void open_directory(Run& run) {
    Options& o = run.o;
    if (o.out.empty()) {
        const Config& c = run.config;
        std::string name = (c.preset.empty() ? c.model_type : c.preset) + "-" + c.scheme.name();
        std::replace(name.begin(), name.end(), ':', '-');
        if (const size_t star = name.find('*'); star != name.npos) name.replace(star, 1, "-star");
        o.out = default_run_path("runs/" + name);
    }
    const bool exists = o.resume && std::filesystem::is_directory(o.out);
    run.directory =
        exists ? RunDirectory::resume(o.out, std::move(run.lock)) : RunDirectory::create(o.out);
    check_writable(o.out, uint64_t(checkpoint_bytes(*run.model->optimizer, run.model->registry)));
    if (int64_t damaged = run.directory->truncate_log_after(run.state.step))
        run.print(cat("note: ", damaged, damaged == 1 ? " line" : " lines", " of ", o.out,
                      "/log.jsonl could not be read and ", damaged == 1 ? "is" : "are", " now in ",
                      run.directory->damaged_log()));
    std::vector<const char*> argv;
    for (const std::string& word : o.argv) argv.push_back(word.c_str());
    run.directory->record(int(argv.size()), argv.data(),
                          {{"ranks", std::to_string(run.ranks.size)},
                           {"threads", std::to_string(run.threads)},
                           {"from_step", std::to_string(run.state.step)}},
                          o.flags);
    set_advice(run);
}

// Weights, moments and the position in the data, of a new or a continued run.
void start(Run& run, const std::string& resume_from) {
    check_memory(run.config, run.B, run.T, run.model_options);
    run.inputs.resize(size_t(run.micro_batches) * run.B * run.T);
    run.targets.resize(run.inputs.size());
    run.model = make_model(run.config, run.B, run.T, run.model_options, run.ranks);
    run.model->initialize(uint64_t(run.o.seed));
    if (!run.o.init_from.empty() && resume_from.empty()) load_weights(*run.model, run.o.init_from);
    if (run.o.overfit_batch) draw_batch(run);
    for (const std::string& change : run.o.changes) run.print("note: " + change);
    if (resume_from.empty()) {
        if (profiles(run, resume_from)) {
            draw_tokens(run);
            const double last =
                profile_omegas(*run.model, run.inputs.data(), run.B, run.T, run.ranks);
            run.print(cat("note: the first batch sets Admin's ω, from 1 to ",
                          format_number("%.3g", last)));
        }
        return;
    }

    run.state = load_checkpoint(*run.model, resume_from);
    if (run.state.windows != run.loader->windows_per_epoch() ||
        (run.state.tokenizer.vocab_size && run.state.tokenizer != run.data.id))
        fail("the training data is not what this run began with (",
             run.state.windows == run.loader->windows_per_epoch()
                 ? "another tokenizer made it"
                 : cat(run.loader->windows_per_epoch(), " sequences, it had ", run.state.windows),
             "): to continue with other data, start another run with --init-from ", run.o.out);
    run.loader->restore(run.state.loader);
    if (run.config.scheme.prores && run.config.scheme.step < INT64_MAX)
        run.config.scheme.step -= run.state.step; // the checkpoint's are counted from it
    run.last_checkpoint = resume_from;
    run.saved_step = run.state.step;
    run.print(cat("continuing from ", resume_from, " (step ", run.state.step, ")"));
}

std::string log_line(const Run& run, const Step& step, double val_loss,
                     const std::optional<LayerDiagnostics>& probes) {
    auto finite = [](double x) { return std::isfinite(x) ? nlohmann::json(x) : nlohmann::json(); };
    double tokens_per_s = double(run.tokens_per_step) / step.seconds;
    nlohmann::ordered_json line = {{"step", run.state.step}, {"loss", step.loss}};
    if (std::isfinite(val_loss))
        line["val_loss"] = val_loss, line["residual_variance"] = run.variance;
    if (std::isfinite(val_loss) && run.task_scores)
        line["tasks"] = brief_json(run.tasks->benchmark, *run.task_scores);
    if (run.lisa)
        for (int layer : run.lisa->drawn) line["lisa"].push_back(layer + 1);
    line["lr"] = step.lr;
    line["grad_norm"] = step.grad_norm;
    line["tokens"] = run.state.tokens;
    line["tokens_per_s"] = tokens_per_s;
    line["mfu"] = finite(run.flops * tokens_per_s / run.peak.flops);
    line["seconds"] = run.state.seconds;
    if (probes) line["probe"] = to_json(*probes, true);
    return line.dump();
}

// "step 120/500  loss 2.104  12.3K tok/s  MFU 34%  1m20s left  lr 9.8e-04  |g| 0.52", in order of
// importance: a narrow terminal shows less of it.
std::string progress_line(const Run& run, const Step& step) {
    const double seconds_a_step = run.recent_seconds / run.recent_steps;
    double tokens_per_s = double(run.tokens_per_step) / seconds_a_step;
    return cat("step ", run.state.step, "/", run.o.steps, format_number("  loss %.3f", step.loss),
               "  ", format_count(tokens_per_s), " tok/s",
               format_number("  MFU %.0f%%", 100 * run.flops * tokens_per_s / run.peak.flops), "  ",
               format_duration(seconds_a_step * double(run.o.steps - run.state.step)), " left",
               format_number("  lr %.1e", step.lr), format_number("  |g| %.3g", step.grad_norm));
}

// The end of a stopped or finished run.
std::string how_to_continue(const Run& run, bool finished) {
    const std::string command = command_to_continue(run);
    if (!finished) return "continue with: " + command;
    const char* words[] = {run.o.argv.empty() ? "./train_gpt" : run.o.argv[0].c_str(), "sample",
                           run.o.out.c_str()};
    return cat(format_count(double(run.state.tokens)), " tokens in ",
               format_duration(run.state.seconds), " of training\nrun directory: ", run.o.out,
               "\nsample it:     ", shell_quoted(3, words),
               " --prompt TEXT\ntrain longer:  ", command, " -x ",
               2 * std::max({run.o.steps, run.state.step, int64_t(1)}));
}

std::string saved_where(const Run& run) {
    return run.last_checkpoint.empty() ? "there is no checkpoint"
                                       : "-y continues from " + run.last_checkpoint;
}

// Saves what was trained before an error ends the run. Returns the end of the error's sentence.
std::string save_before_error(Run& run) {
    if (run.state.step == 0 && run.last_checkpoint.empty()) return ""; // nothing was trained
    if (run.updating) return cat(". This step is lost; ", saved_where(run));
    try {
        save_step(run, true);
    } catch (const Error& error) {
        return cat(". ", error.what());
    }
    return cat(". Step ", run.state.step, " is saved as ", run.last_checkpoint, "; continue with ",
               command_to_continue(run));
}

} // namespace

bool set_up(Run& run) {
    install_stop_handlers();
    const Options& o = run.o;
    const std::string resume_from = o.resume ? newest_checkpoint(o.out) : "";
    prepare(run, resume_from);
    compare_plans(run);
    run.ranks.barrier(); // the peak is that of all at once
    if (!o.dry_run) {
        run.peak = device_peak(run.model_options, run.threads);
        run.peak.flops = run.ranks.sum(run.peak.flops);
        run.peak.measured = run.ranks.sum(run.peak.measured);
    }
    print_banner(run);
    if (!run.progress.failure().empty()) fail(run.progress.failure());
    if (o.dry_run) {
        const double step = run.flops * double(run.tokens_per_step);
        run.print(cat("compute    ", format_count(run.flops), " FLOPs a token, ",
                      format_count(step), " FLOPs a step, ",
                      format_number("%.3g", step * double(o.steps)), " FLOPs in all"));
        return false;
    }

    start(run, resume_from);
    compare_states(run);
    if (!o.dump_state.empty()) {
        if (run.ranks.first()) dump_state(run);
        return false;
    }
    if (o.resume && resume_from.empty())
        run.print(cat("there is no checkpoint in ", o.out, " yet: starting from the beginning"));
    if (run.state.step > 0 && run.state.step >= o.steps) {
        run.print(cat("all ", o.steps, " steps are done\n", how_to_continue(run, true)));
        return false;
    }
    if (run.ranks.first()) open_directory(run);
    run.print("");
    set_stage(Stage::training);
    return true;
}

void draw_tokens(Run& run) {
    if (!run.o.overfit_batch && !run.drawn) draw_ahead(run);
    run.draw_error.share(run.ranks);
}

double count_targets(const Run& run) {
    double n = 0;
    for (int target : run.targets) n += target >= 0;
    n = run.ranks.sum(n);
    if (n == 0)
        throw SharedError(
            cat("step ", run.state.step + 1,
                ": none of its tokens has a target, so there is no loss to lower: check the data"));
    return n;
}

// Counts the updates by which branches fade in; run.config has those before this run.
void fade_in(Run& run, int64_t steps) {
    if (run.config.scheme.prores && run.config.scheme.step < INT64_MAX)
        run.model->config.scheme.step = run.config.scheme.step + steps;
}

void begin_step(Run& run, StepInput& step) {
    // The first step of a process also allocates memory and chooses kernels.
    run.model->profile = run.o.profile && run.steps_made > 0 ? &run.profile : nullptr;
    run.given_up = false;
    // Ranks ask each other about four times a second, all after the same micro-batch.
    const double each = run.step_seconds / run.micro_batches; // 0 in the first step
    const int every = each > 0 ? std::max(1, int(0.25 / each)) : 1;
    if (run.micro_batches > 1)
        step.stop = [&run, every, asked = 0]() mutable {
            run.given_up = run.ranks.size == 1 ? should_stop(run)
                                               : ++asked % every == 0 && any_should_stop(run);
            return run.given_up;
        };
    fade_in(run, run.state.step);
    run.updating = true;
    Ranks::TimedSection section(run.ranks, "a step");
    run.model->begin_step(step);
    run.drawn = false;
}

void draw_next_tokens(Run& run) {
    if (run.o.overfit_batch || run.given_up || run.state.step + 1 >= run.o.steps) return;
    const bool cpu = run.model_options.device == Device::cpu; // a GPU computes meanwhile
    const Timed timer(cpu ? run.model->profile : nullptr, {"", "data"});
    draw_ahead(run);
}

StepResult end_step(Run& run) {
    Ranks::TimedSection section(run.ranks, "the end of a step");
    const StepResult result = run.model->end_step();
    run.updating = false;
    if (result.stopped) {
        if (!run.o.overfit_batch) run.loader->restore(run.before_draw);
        return result;
    }
    fade_in(run, run.state.step + 1);
    check_finite(run, run.state.step + 1, "the loss", result.loss);
    check_finite(run, run.state.step + 1, "the gradient", result.grad_norm);
    return result;
}

void record_time(Run& run, double seconds) {
    run.state.seconds += seconds;
    if (run.model->profile) run.profiled += seconds, run.profiled_steps++;
    run.model->profile = nullptr;
    run.steps_made++;
    const double fade = std::exp(-seconds / 10);
    run.recent_seconds = run.recent_seconds * fade + seconds;
    run.recent_steps = run.recent_steps * fade + 1;
    run.step_seconds = seconds;
    run.ranks.broadcast(&run.step_seconds, sizeof run.step_seconds);
}

bool should_stop(const Run& run) { return stop_requested() || !run.progress.failure().empty(); }
bool any_should_stop(const Run& run) { return run.ranks.any(should_stop(run)); }

void check_finite(Run& run, int64_t step, const char* what, double value) {
    if (!std::isfinite(value)) fail_nonfinite(run, step, what);
}

void score_tasks(Run& run) {
    run.task_scores.reset();
    if (!run.tasks) return;
    const TaskWork& work = *run.tasks;
    const std::vector<double> scores = score_requests(
        *run.model, work.batches, work.requests, run.ranks, {}, [&] { return should_stop(run); });
    if (!scores.empty()) run.task_scores = judge(work.benchmark, scores);
}

LayerDiagnostics probe_layers(Run& run) {
    if (run.probe_batch.empty()) {
        const uint64_t n = std::min({probe_windows(run.o.probe_tokens, run.T), uint64_t(run.B),
                                     run.val_loader->windows_per_epoch()});
        run.probe_batch = read_batches(*run.val_loader, run.T, run.B, 0, n);
    }
    ProbeSettings settings;
    settings.probes.variance = settings.probes.gradients = settings.probes.angular = true;
    settings.reach = 1;
    return measure(*run.model, run.probe_batch, {}, settings);
}

void log_step(Run& run, const Step& step, double val_loss,
              const std::optional<LayerDiagnostics>& probes) {
    restore_directory(run);
    try {
        run.directory->append(log_line(run, step, val_loss, probes));
    } catch (const Error& error) {
        if (!run.log_broken) run.print(cat("WARNING: ", error.what(), ". Training goes on"));
        run.log_broken = true;
    }
}

void print_step(Run& run, const Step& step, double val_loss, bool now) {
    run.progress.update(progress_line(run, step), now);
    if (std::isfinite(val_loss))
        run.print(cat("step ", run.state.step, format_number("  validation loss %.4f", val_loss),
                      format_number("  perplexity %.2f", std::exp(val_loss))));
    if (!std::isfinite(val_loss) || !run.task_scores) return;
    std::string accuracies;
    const nlohmann::ordered_json scores = brief_json(run.tasks->benchmark, *run.task_scores);
    for (const auto& [task, score] : scores.items())
        accuracies += cat("  ", task, format_number(" %.3f", score["acc"].get<double>()));
    run.print(cat("step ", run.state.step, "  accuracy", accuracies));
}

void print_sample(Run& run) {
    run.print(cat("step ", run.state.step, "  sample:\n", sample_text(run), "\n"));
}

void save_step(Run& run, bool ends) {
    const int64_t n = run.state.step;
    if (run.saved_step == n && std::filesystem::exists(run.last_checkpoint)) return;
    if (!run.model->first_nonfinite().empty()) fail_nonfinite(run, n, "the model that it left");
    try {
        save(run);
    } catch (const Error& error) { // a full disk may have room next time
        if (ends)
            throw FinalError(cat(error.what(), ". Step ", n, " is not saved; ", saved_where(run)));
        run.print(cat("WARNING: no checkpoint at step ", n, ": ", error.what(),
                      "; training goes on, ",
                      run.last_checkpoint.empty() ? "nothing is saved yet"
                                                  : "saved is " + run.last_checkpoint));
    }
}

bool save_on_error(Run& run, bool (*loop)(Run&)) {
    std::string sentence;
    bool shared = false;
    try {
        return loop(run);
    } catch (const FinalError&) {
        throw;
    } catch (const std::bad_alloc&) {
        if (run.ranks.first()) run.print("stopped" + save_before_error(run));
        throw;
    } catch (const SharedError& error) {
        sentence = error.what(), shared = true;
    } catch (const Error& error) {
        sentence = error.what();
    }
    if (!sentence.empty() && sentence.back() == '.') sentence.pop_back();
    if (run.ranks.first()) sentence += save_before_error(run);
    if (shared)
        run.ranks.barrier(); // the first rank to exit ends the others: rank 0 must have saved
    fail(sentence);
}

int finish(Run& run, bool finished) {
    const Options& o = run.o;
    const Ranks& ranks = run.ranks;
    if (finished)
        for (const auto& source : {run.data.train, run.data.val}) source->finish_checks();
    if (o.profile && run.profiled_steps > 0)
        run.print("\n" + profile_table(run.profile, run.profiled_steps, run.profiled,
                                       {run.peak.measured / ranks.size,
                                        device_bandwidth(run.model_options, run.threads).update}));
    if (o.steps == 0 && ranks.first()) save(run); // the initial weights
    ranks.barrier();
    set_stage(Stage::saved);
    run.progress.finish();
    if (finished) {
        if (!run.variance.empty()) run.print("\n" + describe_variance(run.variance));
        run.print("\n" + how_to_continue(run, true));
    } else if (stop_requested() || run.progress.failure().empty()) {
        run.print(cat("stopped by a signal after step ", run.state.step, ", saved as ",
                      run.last_checkpoint, "\n", how_to_continue(run, false)));
    }
    if (const std::string lost = run.progress.failure(); !lost.empty())
        fail(lost, save_before_error(run));
    return finished ? 0 : 130;
}

} // namespace lns
