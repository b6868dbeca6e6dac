#include "gpt/run/train.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <filesystem>
#include <functional>
#include <new>
#include <optional>
#include <unistd.h>

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/signals.h"
#include "gpt/base/terminal.h"
#include "gpt/model/schedule.h"
#include "gpt/run/banner.h"
#include "gpt/run/checkpoint.h"
#include "gpt/run/device.h"
#include "gpt/run/facts.h"
#include "gpt/run/probe.h"
#include "gpt/run/rundir.h"
#include "gpt/run/sample.h"
#include "gpt/run/setup.h"

namespace lns {

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// One that says itself what is saved.
struct FinalError : Error {
    using Error::Error;
};

// Thrown by all ranks at the same place.
struct SharedError : Error {
    using Error::Error;
};

// Throws on every rank if one has an error.
void share(const Ranks& ranks, const std::exception_ptr& mine) {
    if (ranks.size == 1 && mine) std::rethrow_exception(mine);
    if (!ranks.any(bool(mine))) return;
    std::vector<double> failed(size_t(ranks.size), 0.0);
    failed[size_t(ranks.rank)] = bool(mine);
    ranks.sum(failed.data(), int(failed.size()));
    const int first = int(std::find(failed.begin(), failed.end(), 1.0) - failed.begin());
    // The first one's sentence, a character a number.
    std::vector<double> characters(1000, 0.0);
    if (first == ranks.rank) try {
            std::rethrow_exception(mine);
        } catch (const std::exception& error) {
            const std::string text = cat("rank ", first, ": ", error.what());
            for (size_t i = 0; i < std::min(text.size(), characters.size()); i++)
                characters[i] = static_cast<unsigned char>(text[i]);
        }
    ranks.sum(characters.data(), int(characters.size()));
    std::string text;
    for (double c : characters)
        if (c > 0) text += char(c);
    throw SharedError(text);
}

// Everything that a run holds.
struct Run {
    Options o;
    const Ranks& ranks;
    Run(Options options, const Ranks& ranks) : o(std::move(options)), ranks(ranks) {}

    Config config;
    Data data;
    std::optional<Loader> loader, val_loader;
    Schedule schedule;
    int B = 0, T = 0, micro_batches = 0; // of this rank, a step
    int64_t tokens_per_step = 0;         // over all micro-batches and ranks
    int threads = 1;                     // of this rank
    ModelOptions numbers;
    Peak peak;        // of all ranks
    double flops = 0; // to train on one token
    std::unique_ptr<Model> model;

    TrainerState state;
    std::vector<int> inputs, targets;      // (micro_batches, B, T), of this rank
    bool drawn = false;                    // they are the next step's
    LoaderState before_draw;               // where the loader stood before them
    std::exception_ptr draw_error;         // what came of drawing them
    std::vector<double> variance;          // of the residual stream, at the last validation
    std::vector<ProbeBatch> probe_batch;   // with --probe-every: the first validation sequences
    std::optional<RunDirectory> directory; // of rank 0
    std::string last_checkpoint;           // "": none yet
    int64_t saved_step = -1;               // what it is of
    bool updating = false;                 // the weights may be half of one step, half of the next
    std::string gone;                      // what was last told of a directory that disappeared
    double step_seconds = 0;               // of the last step, on rank 0
    Progress progress;
    Profile profile;                            // of the steps after the first
    double profiled = 0;                        // seconds
    int64_t profiled_steps = 0, steps_made = 0; // of this process

    void print(const std::string& text) {
        if (ranks.first()) progress.message(text);
    }
};

struct Step {
    double loss = 0, lr = 0, grad_norm = 0, seconds = 0;
};

// A step's tokens. A run that goes on with other ranks keeps them, in micro-batches of fewer
// sequences where those of --batch do not add up to it.
int64_t checked_total_batch(Options& o, const Ranks& ranks) {
    const StepShape shape = step_shape(o, ranks.size);
    if (shape.batch != o.batch)
        o.changes.push_back(cat("a step keeps its ", shape.tokens, " tokens, so --batch is ",
                                shape.batch, " on ", ranks.size,
                                ranks.size == 1 ? " rank" : " ranks", ", not ", o.batch));
    o.batch = shape.batch;
    return shape.tokens;
}

[[noreturn]] void fail_nonfinite(Run& run, int64_t step, const std::string& what) {
    std::string first = run.model->first_nonfinite();
    throw FinalError(cat("step ", step, ": ", what, " is not finite",
                         first.empty() ? "" : "; the first tensor that is not: " + first,
                         ". This step's weights were not saved; ",
                         run.last_checkpoint.empty()
                             ? "there is no checkpoint yet"
                             : "the last good checkpoint is " + run.last_checkpoint,
                         ". Lower --lr, or raise --warmup"));
}

// Of one rank: whether it is to stop.
bool is_to_stop(const Run& run) { return stop_requested() || !run.progress.failure().empty(); }

// The tokens of a whole step: every rank takes its B windows of each micro-batch.
void draw_batch(Run& run) {
    const size_t n = size_t(run.B) * run.T;
    for (int m = 0; m < run.micro_batches; m++) {
        run.loader->skip(uint64_t(run.ranks.rank) * run.B);
        run.loader->next(run.B, &run.inputs[m * n], &run.targets[m * n]);
        run.loader->skip(uint64_t(run.ranks.size - 1 - run.ranks.rank) * run.B);
    }
}

// Draws a step's tokens while the step before is still computed. What goes wrong in it belongs to
// the step that they are for.
void draw_ahead(Run& run) {
    run.before_draw = run.loader->state();
    run.drawn = true;
    try {
        draw_batch(run);
    } catch (...) {
        run.draw_error = std::current_exception();
    }
}

// Nothing if a stop was asked for between its micro-batches: all is then as it was before.
std::optional<Step> train_step(Run& run) {
    const Options& o = run.o;
    const double start = now();
    Model& model = *run.model;
    const int64_t number = run.state.step + 1;

    // The first step of a process also finds its memory and its kernels.
    Profile* profile = o.profile && run.steps_made > 0 ? &run.profile : nullptr;
    Profile* cpu_profile = run.numbers.device == Device::cpu ? profile : nullptr;
    model.profile = profile;

    // 1. The tokens, and how many of them count.
    if (!o.overfit_batch && !run.drawn) draw_ahead(run);
    share(run.ranks, run.draw_error);
    double valid = 0;
    for (int target : run.targets) valid += target >= 0;
    valid = run.ranks.sum(valid);
    if (valid == 0)
        throw SharedError(
            cat("step ", number,
                ": none of its tokens has a target, so there is no loss to lower: check the data"));

    // 2. The gradient of the mean loss over all micro-batches and ranks, its norm, and the step
    // down it; meanwhile the next step's tokens, which a GPU leaves the CPU time for.
    StepInput input = {run.inputs.data(), run.targets.data(), run.micro_batches, run.B, run.T};
    input.loss_scale = 1 / valid;
    input.grad_clip = o.grad_clip;
    AdamW& adam = input.optimizer;
    adam.lr = learning_rate(run.schedule, number);
    adam.beta1 = o.beta1, adam.beta2 = o.beta2, adam.eps = o.eps;
    adam.weight_decay = o.weight_decay;
    adam.step = number;
    // Ranks ask each other some four times a second, all after the same micro-batch.
    const double each = run.step_seconds / run.micro_batches; // 0 in the first step
    const int every = each > 0 ? std::max(1, int(0.25 / each)) : 1;
    int asked = 0;
    bool given_up = false;
    if (run.micro_batches > 1)
        input.stop = [&] {
            given_up = run.ranks.size == 1 ? is_to_stop(run)
                                           : ++asked % every == 0 && run.ranks.any(is_to_stop(run));
            return given_up;
        };
    run.updating = true;
    const LoaderState loaded = o.overfit_batch ? run.loader->state() : run.before_draw;
    {
        Ranks::Steady steady(run.ranks, "a step");
        model.begin_step(input);
    }
    run.drawn = false;
    if (!o.overfit_batch && number < o.steps && !given_up) {
        Timed t(cpu_profile, "", "data", 0, 0);
        draw_ahead(run);
    }
    Ranks::Steady steady(run.ranks, "the end of a step");
    const StepResult result = model.end_step();
    run.updating = false;
    if (result.stopped) {
        run.drawn = false;
        run.loader->restore(loaded);
        return std::nullopt;
    }
    if (!std::isfinite(result.loss)) fail_nonfinite(run, number, "the loss");
    if (!std::isfinite(result.grad_norm)) fail_nonfinite(run, number, "the gradient");
    run.state.step = number;
    run.state.tokens += run.tokens_per_step;

    const Step step = {result.loss, adam.lr, result.grad_norm, now() - start};
    model.profile = nullptr;
    if (profile) run.profiled += step.seconds, run.profiled_steps++;
    run.steps_made++;
    run.state.seconds += step.seconds;
    return step;
}

// NAN if a stop was asked for before its end.
double validate(Run& run) {
    const Evaluation e = evaluate(*run.model, *run.val_loader, run.ranks, run.B, run.T,
                                  run.o.val_tokens, [&] { return is_to_stop(run); });
    if (e.stopped) return NAN;
    const double loss = e.loss;
    if (!std::isfinite(loss)) fail_nonfinite(run, run.state.step, "the validation loss");
    run.state.val_loss = loss;
    run.variance = run.model->residual_variance(); // on the last of the validation batches
    if (!(run.state.best_val_loss <= loss)) run.state.best_val_loss = loss;
    return loss;
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
                                       [&](int) { return !is_to_stop(run); });
    if (tokenizer) {
        const std::string more = continuation(*tokenizer, prompt, tokens);
        return o.prompt + printable(more.substr(0, whole_characters(more)));
    }
    std::string text = "token ids";
    for (int token : tokens) text += " " + std::to_string(token);
    return text;
}

std::string command_to_go_on(const Run& run) {
    const char* words[] = {run.o.argv.empty() ? "./train_gpt" : run.o.argv[0].c_str(), "-o",
                           run.o.out.c_str(), "-y"};
    return cat(run.ranks.size > 1 ? cat("mpirun -np ", run.ranks.size, " ") : "",
               shell_quoted(4, words));
}

// What any rank is to say when another is lost.
void advise(const Run& run) {
    run.ranks.advise(cat(run.last_checkpoint.empty()
                             ? "There is no checkpoint yet"
                             : "The newest checkpoint is " + run.last_checkpoint,
                         "; go on with: ", command_to_go_on(run)));
}

// The run's directory may disappear while it trains.
void look_after_directory(Run& run) {
    const std::string gone = run.directory->mend();
    if (!gone.empty() && gone != run.gone) run.print(cat("WARNING: ", gone, ". Training goes on"));
    run.gone = gone;
}

// On rank 0. Until the new checkpoint stands whole under its name, no older one is touched.
void save(Run& run) {
    look_after_directory(run);
    run.state.loader = run.drawn ? run.before_draw : run.loader->state();
    run.state.flags = run.o.flags;
    run.state.tokenizer = run.data.id;
    run.state.windows = run.loader->windows_per_epoch();
    std::string path = run.directory->checkpoint_path(run.state.step);
    save_checkpoint(path, *run.model, run.state, run.data.tokenizer.get());
    run.last_checkpoint = path;
    run.saved_step = run.state.step;
    advise(run);
    run.directory->keep_last(int(run.o.keep));
}

// One forward and backward pass on the first batch, for other implementations to compare with.
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

// What the options name, read and checked, before anything is allocated or written.
void prepare(Run& run, const std::string& resume_from) {
    Options& o = run.o;
    run.threads = use_threads(o);
    run.numbers = model_options(o, true);
    check_devices(run.numbers, run.ranks);
    if (o.probe_every > 0 && run.numbers.recompute != Recompute::none)
        fail("--probe-every needs what --recompute ", o.recompute,
             " does not keep: leave one of the two out");
    o.flags["--dtype"] = run.numbers.dtype == DType::bf16 ? "bf16" : "float32";
    run.config = resume_from.empty() ? model_config(o) : checkpoint_config(resume_from);
    if (!resume_from.empty()) o.vocab = run.config.vocab_size; // the data cannot change it now
    run.data = open_data(o);
    fit_vocabulary(o, run.data, run.config);
    check_length(o.batch, o.seq_len, run.config);
    run.tokens_per_step = checked_total_batch(o, run.ranks);
    o.flags["--total-batch"] = run.tokens_per_step;
    run.B = int(o.batch), run.T = int(o.seq_len);
    run.micro_batches = int(run.tokens_per_step / (o.batch * o.seq_len * run.ranks.size));
    run.loader.emplace(run.data.train, run.T, uint64_t(o.seed), true);
    run.val_loader.emplace(run.data.val, run.T, 0, false);
    run.schedule = {o.lr_schedule, o.lr, o.steps, o.warmup_steps(), o.final_lr_frac};
    run.flops = flops_per_token(run.config, run.T);
}

// What ranks must have alike: what the options led to on each one's machine, …
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

// … and what they start from.
void compare_states(const Run& run) {
    if (run.ranks.size == 1) return;
    const LoaderState at = run.loader->state();
    Facts facts = {{"a checkpoint of step", cat(run.state.step)},
                   {"read of the data", cat(at.epoch, " epochs and ", at.index, " sequences")},
                   fingerprint_fact("weights", fingerprint(*run.model, Buffer::parameters))};
    if (run.state.step > 0) {
        facts.push_back(
            fingerprint_fact("first moments", fingerprint(*run.model, Buffer::moment1)));
        facts.push_back(
            fingerprint_fact("second moments", fingerprint(*run.model, Buffer::moment2)));
    }
    run.ranks.compare(facts);
}

// The banner.
void describe(Run& run) {
    run.print(describe_machine(run.threads, run.ranks, run.peak, run.numbers) +
              describe_model(run.config, run.B, run.T, run.numbers) +
              describe_data(run.data, *run.loader, *run.val_loader,
                            double(run.o.steps) * double(run.tokens_per_step / run.T)) +
              describe_schedule(run.schedule, run.o, run.tokens_per_step, run.micro_batches));
}

// The run's directory, locked; the disk must have room for a checkpoint.
void open_directory(Run& run, bool goes_on, Fd lock) {
    Options& o = run.o;
    if (o.out.empty()) {
        const Config& c = run.config;
        std::string name = (c.preset.empty() ? c.model_type : c.preset) + "-" + c.scheme.name();
        std::replace(name.begin(), name.end(), ':', '-');
        o.out = default_run_path("runs/" + name);
    }
    bool exists = goes_on && std::filesystem::is_directory(o.out);
    run.directory =
        exists ? RunDirectory::resume(o.out, std::move(lock)) : RunDirectory::create(o.out);
    check_writable(o.out, uint64_t(checkpoint_bytes(run.model->registry)));
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
    advise(run);
}

// Weights, moments and the place in the data, of a new run or of one that goes on.
void start(Run& run, const std::string& resume_from) {
    check_memory(run.config, run.B, run.T, run.numbers);
    run.inputs.resize(size_t(run.micro_batches) * run.B * run.T);
    run.targets.resize(run.inputs.size());
    run.model = make_model(run.config, run.B, run.T, run.numbers, run.ranks);
    run.model->initialize(uint64_t(run.o.seed));
    if (!run.o.init_from.empty() && resume_from.empty()) load_weights(*run.model, run.o.init_from);
    if (run.o.overfit_batch) draw_batch(run);
    for (const std::string& change : run.o.changes) run.print("note: " + change);
    if (resume_from.empty()) return;

    run.state = load_checkpoint(*run.model, resume_from);
    if (run.state.windows != run.loader->windows_per_epoch() ||
        (run.state.tokenizer.vocab_size && run.state.tokenizer != run.data.id))
        fail("the training data is not what this run began with (",
             run.state.windows == run.loader->windows_per_epoch()
                 ? "another tokenizer made it"
                 : cat(run.loader->windows_per_epoch(), " sequences, it had ", run.state.windows),
             "): to go on with other data, start another run with --init-from ", run.o.out);
    run.loader->restore(run.state.loader);
    run.last_checkpoint = resume_from;
    run.saved_step = run.state.step;
    run.print(cat("going on from ", resume_from, " (step ", run.state.step, ")"));
}

// What the layers do now, on the same tokens each time. It moves nothing that training goes on
// from.
Probes probe(Run& run) {
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

std::string log_line(const Run& run, const Step& step, double val_loss,
                     const std::optional<Probes>& probes) {
    auto finite = [](double x) { return std::isfinite(x) ? nlohmann::json(x) : nlohmann::json(); };
    double tokens_per_s = double(run.tokens_per_step) / step.seconds;
    nlohmann::ordered_json line = {{"step", run.state.step}, {"loss", step.loss}};
    if (std::isfinite(val_loss))
        line["val_loss"] = val_loss, line["residual_variance"] = run.variance;
    line["lr"] = step.lr;
    line["grad_norm"] = step.grad_norm;
    line["tokens"] = run.state.tokens;
    line["tokens_per_s"] = tokens_per_s;
    line["mfu"] = finite(run.flops * tokens_per_s / run.peak.flops);
    line["seconds"] = run.state.seconds;
    if (probes) line["probe"] = to_json(*probes, true);
    return line.dump();
}

// "step 120/500  loss 2.104  12.3K tok/s  MFU 34%  1m20s left  lr 9.8e-04  |g| 0.52": a narrow
// terminal cuts the end off.
std::string progress_line(const Run& run, const Step& step, double seconds_a_step) {
    double tokens_per_s = double(run.tokens_per_step) / seconds_a_step;
    return cat("step ", run.state.step, "/", run.o.steps, format_number("  loss %.3f", step.loss),
               "  ", format_count(tokens_per_s), " tok/s",
               format_number("  MFU %.0f%%", 100 * run.flops * tokens_per_s / run.peak.flops), "  ",
               format_duration(seconds_a_step * double(run.o.steps - run.state.step)), " left",
               format_number("  lr %.1e", step.lr), format_number("  |g| %.3g", step.grad_norm));
}

// What a stopped or finished run tells at its end.
std::string how_to_go_on(const Run& run, bool finished) {
    const std::string again = command_to_go_on(run);
    if (!finished) return "go on with:    " + again;
    const char* words[] = {run.o.argv.empty() ? "./train_gpt" : run.o.argv[0].c_str(), "sample",
                           run.o.out.c_str()};
    return cat(format_count(double(run.state.tokens)), " tokens in ",
               format_duration(run.state.seconds), " of training\nrun directory: ", run.o.out,
               "\nsample it:     ", shell_quoted(3, words),
               " --prompt TEXT\ntrain longer:  ", again, " -x ",
               2 * std::max({run.o.steps, run.state.step, int64_t(1)}));
}

std::string where_it_is_saved(const Run& run) {
    return run.last_checkpoint.empty() ? "there is no checkpoint"
                                       : "-y goes on from " + run.last_checkpoint;
}

// Saves what the last step left. If it cannot be, a run that ends here fails, others go on.
void save_step(Run& run, bool ends) {
    const int64_t n = run.state.step;
    if (run.saved_step == n && std::filesystem::exists(run.last_checkpoint)) return;
    if (!run.model->first_nonfinite().empty()) fail_nonfinite(run, n, "the model that it left");
    try {
        save(run);
    } catch (const Error& error) { // a full disk may have room again next time
        if (ends)
            throw FinalError(
                cat(error.what(), ". Step ", n, " is not saved; ", where_it_is_saved(run)));
        run.print(cat("WARNING: no checkpoint at step ", n, ": ", error.what(),
                      "; training goes on, ",
                      run.last_checkpoint.empty() ? "nothing is saved yet"
                                                  : "saved is " + run.last_checkpoint));
    }
}

// Steps until the last, or until a stop is asked for. False if stopped.
bool loop(Run& run) {
    const Options& o = run.o;
    double seconds = 0, steps = 0; // averages over about the last ten seconds
    bool stop = false, log_broken = false;
    while (!stop && run.state.step < o.steps) {
        const std::optional<Step> made = train_step(run);
        if (!made) {
            if (run.ranks.first()) save_step(run, true);
            return false;
        }
        const Step& step = *made;
        const int64_t n = run.state.step;
        auto due = [&](int64_t every) { return every > 0 && n % every == 0; };
        const bool last = n == o.steps;
        run.step_seconds = step.seconds;
        run.ranks.broadcast(&run.step_seconds, sizeof run.step_seconds);
        stop = run.ranks.any(is_to_stop(run)) && !last;
        const double fade = std::exp(-step.seconds / 10);
        seconds = seconds * fade + step.seconds;
        steps = steps * fade + 1;
        double val_loss = NAN;
        if (last || (due(o.val_every) && !stop)) {
            val_loss = validate(run);
            stop = stop || (std::isnan(val_loss) && !last);
        }

        if (!run.ranks.first()) continue; // the rest is telling and saving
        std::optional<Probes> probes;
        if (o.probe_every > 0 && (last || (due(o.probe_every) && !stop))) probes = probe(run);
        look_after_directory(run);
        try {
            run.directory->append(log_line(run, step, val_loss, probes));
        } catch (const Error& error) {
            if (!log_broken) run.print(cat("WARNING: ", error.what(), ". Training goes on"));
            log_broken = true;
        }
        run.progress.update(progress_line(run, step, seconds / steps), last || stop);
        if (std::isfinite(val_loss))
            run.print(cat("step ", n, format_number("  validation loss %.4f", val_loss),
                          format_number("  perplexity %.2f", std::exp(val_loss))));
        if (o.sample_tokens > 0 && (last || (due(o.sample_every) && !stop)))
            run.print(cat("step ", n, "  sample:\n", sample_text(run), "\n"));
        if (last || stop || due(o.save_every)) save_step(run, last || stop);
    }
    return !stop;
}

// Before an error ends the run: what was trained is saved. The end of the error's sentence.
std::string keep(Run& run) {
    if (run.state.step == 0 && run.last_checkpoint.empty()) return ""; // nothing was trained
    if (run.updating) return cat(". This step is lost; ", where_it_is_saved(run));
    try {
        save_step(run, true);
    } catch (const Error& error) {
        return cat(". ", error.what());
    }
    return cat(". Step ", run.state.step, " is saved as ", run.last_checkpoint, "; go on with ",
               command_to_go_on(run));
}

// The loop; what its last whole step left is saved also where it fails.
bool train_steps(Run& run) {
    std::string sentence;
    bool shared = false;
    try {
        return loop(run);
    } catch (const FinalError&) {
        throw;
    } catch (const std::bad_alloc&) {
        if (run.ranks.first()) run.print("stopped" + keep(run));
        throw;
    } catch (const SharedError& error) {
        sentence = error.what(), shared = true;
    } catch (const Error& error) {
        sentence = error.what();
    }
    if (!sentence.empty() && sentence.back() == '.') sentence.pop_back();
    if (run.ranks.first()) sentence += keep(run);
    if (shared) run.ranks.barrier(); // the first to fail ends all, and this one is to save before
    fail(sentence);
}

} // namespace

Evaluation evaluate(Model& model, Loader& loader, const Ranks& ranks, int B, int T, int64_t tokens,
                    const std::function<bool()>& stop) {
    const uint64_t wanted = uint64_t(tokens + T - 1) / T;
    const uint64_t windows = std::min(std::max<uint64_t>(wanted, 1), loader.windows_per_epoch());
    std::vector<int> inputs(size_t(B) * T), targets(inputs.size());
    double sums[2] = {0, 0}; // loss, targets
    std::exception_ptr error;
    for (uint64_t round = 0; round < windows; round += uint64_t(ranks.size) * B) {
        if (stop && round > 0 && ranks.any(stop())) return {NAN, 0, true};
        const uint64_t w = round + uint64_t(ranks.rank) * B;
        if (w >= windows || error) continue;
        const int b = int(std::min<uint64_t>(B, windows - w));
        try {
            loader.restore({0, w});
            loader.next(b, inputs.data(), targets.data());
            Ranks::Steady steady(ranks, "a batch of validation");
            sums[0] += model.loss(inputs.data(), targets.data(), b, T);
        } catch (...) {
            error = std::current_exception();
        }
        for (size_t i = 0; i < size_t(b) * T; i++) sums[1] += targets[i] >= 0;
    }
    share(ranks, error);
    ranks.sum(sums, 2);
    if (sums[1] == 0) fail("no token of the validation data has a target");
    return {sums[0] / sums[1], int64_t(sums[1])};
}

int train(Options options, const Ranks& ranks, Fd lock) {
    install_stop_handlers();
    Run run(std::move(options), ranks);
    const Options& o = run.o;
    std::string resume_from;
    if (o.resume) resume_from = newest_checkpoint(o.out);
    prepare(run, resume_from);
    compare_plans(run);
    ranks.barrier(); // the peak is that of all at once
    if (!o.dry_run) {
        run.peak = device_peak(run.numbers, run.threads);
        run.peak.flops = ranks.sum(run.peak.flops);
        run.peak.measured = ranks.sum(run.peak.measured);
    }
    describe(run);
    if (!run.progress.failure().empty()) fail(run.progress.failure());
    if (o.dry_run) {
        double step = run.flops * double(run.tokens_per_step);
        run.print(cat("compute    ", format_count(run.flops), " FLOPs a token, ",
                      format_count(step), " FLOPs a step, ",
                      format_number("%.3g", step * double(o.steps)), " FLOPs in all"));
        return 0;
    }

    start(run, resume_from);
    compare_states(run);
    if (!o.dump_state.empty()) {
        if (ranks.first()) dump_state(run);
        return 0;
    }
    if (o.resume && resume_from.empty())
        run.print(cat("there is no checkpoint in ", o.out, " yet: starting from the beginning"));
    if (run.state.step > 0 && run.state.step >= o.steps) {
        run.print(cat("all ", o.steps, " steps are done\n", how_to_go_on(run, true)));
        return 0;
    }
    if (ranks.first()) open_directory(run, o.resume, std::move(lock));
    run.print("");
    enter(Stage::training);
    const bool finished = train_steps(run);
    if (finished)
        for (const auto& source : {run.data.train, run.data.val}) source->finish_checks();
    if (o.profile && run.profiled_steps > 0)
        run.print("\n" + profile_table(run.profile, run.profiled_steps, run.profiled,
                                       {run.peak.measured / ranks.size,
                                        device_bandwidth(run.numbers, run.threads).update}));
    if (o.steps == 0 && ranks.first()) save(run); // the weights that a run would start from
    ranks.barrier();
    enter(Stage::saved);
    run.progress.finish();
    if (finished) {
        if (!run.variance.empty()) run.print("\n" + describe_variance(run.variance));
        run.print("\n" + how_to_go_on(run, true));
    } else if (stop_requested() || run.progress.failure().empty()) {
        run.print(cat("stopped by a signal after step ", run.state.step, ", saved as ",
                      run.last_checkpoint, "\n", how_to_go_on(run, false)));
    }
    if (const std::string lost = run.progress.failure(); !lost.empty()) fail(lost, keep(run));
    return finished ? 0 : 130;
}

} // namespace lns
