#include "gpt/run/program.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>
#include <unistd.h>

#include "gpt/base/build.h"
#include "gpt/base/clock.h"
#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/random.h"
#include "gpt/base/ranks.h"
#include "gpt/base/signals.h"
#include "gpt/base/terminal.h"
#include "gpt/run/bench.h"
#include "gpt/run/chat.h"
#include "gpt/run/checkpoint.h"
#include "gpt/run/device.h"
#include "gpt/run/export.h"
#include "gpt/run/facts.h"
#include "gpt/run/options.h"
#include "gpt/run/probe.h"
#include "gpt/run/recipe.h"
#include "gpt/run/rundir.h"
#include "gpt/run/sample.h"
#include "gpt/run/schemes.h"
#include "gpt/run/setup.h"
#include "gpt/run/task_results.h"
#include "gpt/run/training.h"
#include "gpt/run/verify.h"

namespace lns {

namespace {

// A checkpoint to sample from or to measure, and the flags of the run that made it, if one did.
struct Trained {
    std::string path;
    Config config;
    TrainerState state;

    explicit Trained(const std::string& name)
        : path(find_checkpoint(name)), config(checkpoint_config(path)) {
        if (std::filesystem::exists(path + "/trainer_state.json")) state = read_trainer_state(path);
    }
    std::string flag(const std::string& name) const {
        auto found = state.flags.find(name);
        return found == state.flags.end() ? "" : flag_text(found->second);
    }
    // The flag's number, or `otherwise` if no run says.
    int64_t count(const std::string& name, int64_t otherwise) const {
        std::string text = flag(name);
        return text.empty() ? otherwise : parse_count(text);
    }
    // The directory of its run; "" if it does not belong to one.
    std::string run() const {
        std::filesystem::path parent = path;
        if (!parent.has_filename()) parent = parent.parent_path(); // of "runs/x/step-000600/"
        parent = parent.parent_path();
        if (parent.empty()) parent = ".";
        return std::filesystem::exists(parent / "run.json") ? parent.string() : "";
    }
    // The run's validation shards, as a pattern relative to the working directory.
    std::string validation() const {
        const std::string val = flag("--val");
        return val.empty() ? validation_pattern(saved_pattern(flag("--train"), run()), "")
                           : saved_pattern(val, run());
    }
    // "float32" for weights that are not of a run.
    std::string dtype() const { return flag("--dtype") == "bf16" ? "bf16" : "float32"; }
    // The longest sequence that it was trained on.
    int length() const {
        return int(std::min<int64_t>(count("--seq-len", 1024), config.positions));
    }
};

// --tokenizer, or the one that lies with the weights.
std::unique_ptr<Tokenizer> tokenizer_of(const Options& o, const Trained& trained) {
    if (!o.tokenizer.empty()) return find_tokenizer(o.tokenizer, "", trained.state.tokenizer);
    std::unique_ptr<Tokenizer> tokenizer;
    try {
        tokenizer = load_tokenizer(trained.path);
    } catch (const Error& error) {
        fail("no tokenizer lies with the weights (", error.what(), "): name one with --tokenizer");
    }
    expect_tokenizer(*tokenizer, trained.path, trained.state.tokenizer);
    return tokenizer;
}

// For sequences of at most `context` tokens, one at a time.
std::unique_ptr<Model> generator(const Options& o, const Trained& trained, int context,
                                 const Ranks& ranks) {
    const ModelOptions options = model_options(o, Purpose::generate, trained.dtype());
    check_memory(trained.config, 1, context, options);
    std::unique_ptr<Model> model = make_model(trained.config, 1, context, options, ranks);
    load_weights(*model, trained.path);
    return model;
}

int sample(const Options& o, const Ranks& ranks) {
    use_threads(o);
    Trained trained(o.checkpoint);
    const std::unique_ptr<Tokenizer> tokenizer = tokenizer_of(o, trained);
    std::vector<int> tokens = tokenizer->encode_prompt(o.prompt);
    if (tokens.empty()) {
        if (tokenizer->eot() < 0)
            fail("this tokenizer has no end of text to start behind: give a --prompt");
        tokens = {tokenizer->eot()};
    }
    check_prompt(tokens, trained.config.vocab_size);

    const int context = trained.length();
    const std::unique_ptr<Model> model = generator(o, trained, context, ranks);
    TextStream stream;
    std::string text = o.prompt;
    stream.show(text, text.size());
    std::vector<int> made;
    generate(*model, tokens, int(o.sample_tokens), context,
             {o.temperature, int(o.top_k), o.top_p, uint64_t(o.seed), tokenizer->vocab_size()},
             [&](int token) {
                 if (token == tokenizer->eot() && !o.ignore_eot) return false;
                 made.push_back(token);
                 text = o.prompt + continuation(*tokenizer, tokens, made);
                 stream.show(text, whole_characters(text));
                 return true;
             });
    std::cout << std::endl;
    return 0;
}

int talk(const Options& o, const Ranks& ranks) {
    use_threads(o);
    Trained trained(o.checkpoint);
    const std::unique_ptr<Tokenizer> tokenizer = tokenizer_of(o, trained);
    std::optional<ChatTemplate> format;
    if (!o.chat_template.empty()) {
        format = ChatTemplate::load(o.chat_template);
    } else {
        format = ChatTemplate::in_folder(trained.path);
        if (!format)
            fail(trained.path, " has no chat template: it was not fine-tuned on conversations, or "
                               "by another program. Name one with --template: alpaca, chatml, "
                               "llama-3, plain, or a file of Jinja");
    }
    const int context = o.seq_len > 0 ? int(o.seq_len) : trained.length();
    check_length(1, context, trained.config);
    const std::unique_ptr<Model> model = generator(o, trained, context, ranks);
    chat(*model, *tokenizer, *format,
         {o.system,
          context,
          int(o.sample_tokens),
          {o.temperature, int(o.top_k), o.top_p, uint64_t(o.seed), 0}});
    return 0;
}

// The tokens to measure on: -j, or what the run was validated on.
std::shared_ptr<TokenSource> validation_tokens(const Options& o, const Trained& trained) {
    const bool run_on_stories = !trained.state.flags.empty() && trained.flag("--train").empty();
    if (o.val.empty() && trained.state.flags.empty())
        fail(trained.path, " does not say what it was validated on: name token shards with -j");
    const std::string pattern = !o.val.empty() || run_on_stories ? o.val : trained.validation();
    auto source = open_validation(pattern, trained.count("--seed", 0));
    expect_tokenizer_of_weights(trained.path, source->id());
    source->check_tokens(trained.config.vocab_size);
    return source;
}

// Reads the tasks for a model, or throws if their tokens are another model's.
TaskWork read_tasks(const std::string& tasks, const Options& o, const Trained& trained,
                    const Tokenizer& tokenizer, int64_t rows) {
    TaskSettings settings;
    settings.data = o.task_data, settings.fewshot = int(o.fewshot), settings.limit = o.limit;
    const int length = int(o.seq_len > 0 ? o.seq_len : trained.config.positions);
    check_length(1, length, trained.config);
    return prepare_tasks(parse_tasks(tasks), settings, tokenizer, trained.config.vocab_size, length,
                         rows);
}

int eval_tasks(const Options& o, const Ranks& ranks) {
    for (const char* flag : {"--val", "--val-tokens"})
        if (o.is_given(flag))
            fail(flag, " belongs to the validation loss: leave out --tasks or it");
    const double start = now();
    use_threads(o);
    Trained trained(o.checkpoint);
    const auto tokenizer = tokenizer_of(o, trained);
    const ModelOptions options = model_options(o, Purpose::score, trained.dtype());
    check_devices(options, ranks);
    int64_t rows = options.device == Device::cuda ? 8192 : 2048; // enough for full speed
    const int T = int(std::max<int64_t>(o.seq_len, 256));        // of --batch
    if (o.is_given("--batch")) rows = o.batch * T;
    const TaskWork work = read_tasks(o.tasks, o, trained, *tokenizer, rows);
    check_memory(trained.config, int((work.rows + T - 1) / T), T, options);
    const std::unique_ptr<Model> model =
        make_model(trained.config, 1, int(work.rows), options, ranks);
    load_weights(*model, trained.path);
    if (ranks.size > 1)
        ranks.compare({fingerprint_fact("weights", fingerprint(*model, Buffer::parameters))});

    if (ranks.first())
        for (const std::string& note : work.benchmark.notes)
            std::fprintf(o.json ? stderr : stdout, "note: %s\n", printable(note).c_str());
    Progress progress(o.json ? stderr : stdout);
    const double scoring = now();
    const std::vector<double> scores =
        score_requests(*model, work.batches, work.requests, ranks, [&](double done) {
            if (!ranks.first() || !progress.due() || now() - scoring < 1) return;
            progress.update(cat("answering: ", format_number("%.0f%%", 100 * done), " of ",
                                work.requests, " choices  ",
                                format_duration((now() - scoring) * (1 - done) / done), " left"));
            if (!progress.failure().empty()) fail(progress.failure());
        });
    const double seconds = now() - scoring;
    if (!ranks.first()) return 0;
    const TaskScores found = judge(work.benchmark, scores);
    nlohmann::ordered_json json = results_json(work.benchmark, found);
    json["config"] = {{"model", "lns.cpp"},
                      {"model_args", "pretrained=" + trained.path},
                      {"model_num_parameters", model->registry.size},
                      {"model_dtype", model->dtype()},
                      {"batch_size", work.rows},
                      {"device", model->device()},
                      {"limit", o.limit > 0 ? nlohmann::json(o.limit) : nlohmann::json()}};
    json["model_name"] = trained.path;
    json["lns_cpp_version"] = build_info().version;
    json["max_length"] = work.max_length;
    json["scoring_seconds"] = seconds;
    json["total_evaluation_time_seconds"] = cat(now() - start);
    progress.finish();
    if (!o.out.empty()) write_file_atomic(o.out, json.dump(2) + "\n");
    if (!o.log_samples.empty())
        write_file_atomic(o.log_samples, samples_jsonl(work.benchmark, scores));
    if (o.json)
        std::cout << json.dump(2) << std::endl;
    else
        std::cout << describe(work.benchmark, found) << work.requests << " choices in "
                  << format_duration(seconds) << ", " << model->dtype() << std::endl;
    return 0;
}

int eval(const Options& o, const Ranks& ranks) {
    if (!o.tasks.empty()) return eval_tasks(o, ranks);
    use_threads(o);
    Trained trained(o.checkpoint);
    auto source = validation_tokens(o, trained);
    const int T = o.seq_len > 0 ? int(o.seq_len) : trained.length();
    check_length(o.batch, T, trained.config);
    const int64_t wanted =
        o.val_tokens > 0 ? o.val_tokens : trained.count("--val-tokens", 10000000);

    Loader loader(source, T, 0, false);
    const ModelOptions options = model_options(o, Purpose::score, trained.dtype());
    check_devices(options, ranks);
    check_memory(trained.config, int(o.batch), T, options);
    std::unique_ptr<Model> model = make_model(trained.config, int(o.batch), T, options, ranks);
    load_weights(*model, trained.path);
    if (ranks.size > 1) {
        Facts facts = data_facts("validation", *source, loader);
        facts.push_back(fingerprint_fact("weights", fingerprint(*model, Buffer::parameters)));
        ranks.compare(facts);
    }
    Evaluation e = evaluate(*model, loader, ranks, int(o.batch), T, wanted);
    source->finish_checks();
    if (ranks.first())
        std::printf("loss %.6f  perplexity %.4f  tokens %lld\n", e.loss, std::exp(e.loss),
                    (long long)e.tokens);
    return 0;
}

// The tokens that layers are measured on, in batches.
struct ProbeData {
    std::shared_ptr<TokenSource> source;
    int T = 0, B = 0;
    std::vector<ProbeBatch> measured, fitted;
};

ProbeData read_probe_data(const Options& o, const Trained& trained, const ProbeSettings& settings) {
    const Config& config = trained.config;
    auto source = validation_tokens(o, trained);
    const int T = o.seq_len > 0 ? int(o.seq_len) : trained.length();
    check_length(o.batch, T, config);
    // The first windows to measure on, those behind them to fit on.
    Loader loader(source, T, 0, false);
    const uint64_t there = loader.windows_per_epoch();
    const uint64_t wanted = probe_windows(o.probe_tokens, T);
    const uint64_t to_fit =
        settings.probes.usefulness
            ? std::max(wanted, (10 * uint64_t(config.width) + T - 1) / uint64_t(T))
            : 0;
    uint64_t measured = wanted, fitted = to_fit;
    if (wanted + to_fit > there) {
        measured = to_fit == 0 ? there : std::max<uint64_t>(1, there * wanted / (wanted + to_fit));
        fitted = there - measured;
        if (to_fit > 0 && fitted == 0 && !settings.probes.all)
            fail("the validation data has one sequence of ", T,
                 " tokens, and usefulness needs "
                 "another to fit on: name more with -j, lower -t, or leave it out of --probes");
        std::string split;
        if (to_fit > 0) split = cat(", and ", fitted, " to fit usefulness on, of ", to_fit);
        std::printf("note: the validation data has only %llu sequences of %d tokens: %llu to "
                    "measure on, of %llu asked for%s\n",
                    (unsigned long long)there, T, (unsigned long long)measured,
                    (unsigned long long)wanted, split.c_str());
    }
    const int B =
        int(std::min(uint64_t(o.batch), std::max(measured, fitted))); // no more are needed

    return {source, T, B, read_batches(loader, T, B, 0, measured),
            read_batches(loader, T, B, measured, fitted)};
}

int probe(const Options& o, const Ranks& ranks) {
    use_threads(o);
    Trained trained(o.checkpoint);
    const Config& config = trained.config;
    const std::string run = trained.run(), out = !o.out.empty() ? o.out : run + "/probe.json";
    if (o.out.empty() && run.empty()) fail(trained.path, " does not belong to a run: pass -o FILE");
    ProbeSettings settings;
    settings.probes = parse_probes(o.probes);
    settings.jacobian_samples = o.jacobian_samples;
    settings.jacobian_layer =
        o.jacobian_layer > 0 ? int(o.jacobian_layer) : (3 * config.layers + 3) / 4;
    if (settings.jacobian_layer > config.layers)
        fail("--jacobian-layer ", o.jacobian_layer, ": the model has ", config.layers, " layers");
    settings.seed = uint64_t(o.seed);
    const bool tasks = !o.removal_tasks.empty();
    if (tasks && !settings.probes.removal)
        fail("--removal-tasks belongs to removal, which --probes leaves out");
    // A model that is not of a run may be measured on benchmarks alone.
    std::optional<ProbeData> data;
    if (!tasks || !o.val.empty() || !trained.state.flags.empty())
        data = read_probe_data(o, trained, settings);
    std::optional<TaskWork> work;
    int64_t rows = data ? int64_t(data->B) * data->T : 1;
    if (tasks) {
        work = read_tasks(o.removal_tasks, o, trained, *tokenizer_of(o, trained),
                          std::max<int64_t>(rows, 1024));
        rows = work->rows;
    }

    const Purpose purpose = data ? purpose_of(settings.probes) : Purpose::layers;
    const ModelOptions options = model_options(o, purpose, trained.dtype());
    const int B = work ? 1 : data->B, T = work ? int(rows) : data->T;
    check_memory(config, B, T, options);
    std::unique_ptr<Model> model = make_model(config, B, T, options, ranks);
    load_weights(*model, trained.path);
    Progress progress;
    settings.tell = [&](const std::string& line) {
        progress.update("probing: " + line);
        if (!progress.failure().empty()) fail(progress.failure());
    };
    LayerDiagnostics probes;
    probes.layers = config.layers, probes.width = config.width, probes.loss = NAN;
    if (data)
        probes = measure(*model, data->measured, data->fitted, settings);
    else
        probes.notes.push_back("no validation data is known, so that only benchmarks are measured; "
                               "-j names token shards");
    if (work) {
        probes.notes.insert(probes.notes.end(), work->benchmark.notes.begin(),
                            work->benchmark.notes.end());
        probes.task_removal = measure_task_removal(*model, *work, settings.tell);
    }
    progress.finish();
    if (data) data->source->finish_checks();
    for (const std::string& note : probes.notes) std::printf("note: %s\n", printable(note).c_str());

    nlohmann::ordered_json json = {
        {"version", 1},
        {"checkpoint", trained.path},
        {"step", nullptr},
        {"model", config.preset.empty() ? config.model_type : config.preset},
        {"scheme", config.scheme.name()},
        {"layers", probes.layers},
        {"width", probes.width},
        {"tokens", probes.tokens},
        {"loss", data ? nlohmann::json(probes.loss) : nlohmann::json()}};
    if (!trained.state.flags.empty()) json["step"] = trained.state.step;
    json.update(to_json(probes));
    std::string text; // a line a key
    for (const auto& [key, value] : json.items())
        text +=
            cat(text.empty() ? "{" : ",", "\n  ", nlohmann::json(key).dump(), ": ", value.dump());
    write_file_atomic(out, text + "\n}\n");
    const std::string loss =
        data ? cat(format_number(": loss %.4f", probes.loss), " on ", probes.tokens, " tokens")
             : "";
    std::printf("%s, %s%s\n\n%s\nwrote %s\n", printable(trained.path).c_str(),
                config.scheme.name().c_str(), loss.c_str(), describe(probes).c_str(),
                printable(out).c_str());
    return 0;
}

// Ranks must be the same program with the same command line.
void compare_starts(const Options& o, const Ranks& ranks) {
    if (ranks.size == 1) return;
    const BuildInfo& build = build_info();
    std::string parts;
    for (const auto& [name, value] : build.features)
        parts += cat(parts.empty() ? "" : ", ", name, " ", value);
    Facts facts = {{"train_gpt", build.version},
                   {"a build by", build.compiler},
                   {"a build with", build.flags},
                   {"a build of", parts}};
    // The version does not cover uncommitted changes, nor the processor of -march=native.
    if (std::filesystem::exists("/proc/self/exe"))
        facts.push_back(fingerprint_fact("a program", fnv1a(read_file("/proc/self/exe"))));
    const std::map<std::string, std::string> flags = settings(o);
    facts.push_back({"the command", flags.at("the command")});
    ranks.compare(facts); // first, since another program has other flags
    ranks.compare({flags.begin(), flags.end()});
}

// The flags of the run that -y continues, none if there is no such run yet. A run that will be
// written is locked before it is read.
SavedFlags flags_to_continue(const Options& o, const Ranks& ranks, Fd& lock) {
    if (!o.resume) return {};
    if (!o.dry_run && o.dump_state.empty()) {
        if (ranks.first() && std::filesystem::is_directory(o.out)) lock = RunDirectory::lock(o.out);
        ranks.barrier();
    }
    const std::string checkpoint = newest_checkpoint(o.out);
    ranks.compare(
        {{"the newest checkpoint", std::filesystem::path(checkpoint).filename().string()}});
    return checkpoint.empty() ? recorded_flags(o.out) : read_trainer_state(checkpoint).flags;
}

Options options_of(int argc, char** argv, const Ranks& ranks, Fd& lock) {
    Options o = parse_options(argc, argv);
    compare_starts(o, ranks);
    if (o.command != Options::Command::train) return o;
    const SavedFlags saved = flags_to_continue(o, ranks, lock);
    if (saved.empty()) {
        apply_recipe(o);
        return o;
    }
    continue_options(o, saved);
    const std::map<std::string, std::string> flags = settings(o);
    ranks.compare({flags.begin(), flags.end()});
    find_saved_paths(o, saved);
    return o;
}

int report(const Ranks* ranks, const std::string& sentence) {
    std::cout << std::flush;
    const bool alone = !ranks || ranks->size == 1;
    // An error of every rank is printed by the first alone, which ends the others as they wait.
    if (!alone && !ranks->first()) {
        remove_stop_handlers();
        sleep(2);
    }
    std::cerr << "train_gpt: " << (alone || ranks->first() ? "" : cat("rank ", ranks->rank, ": "))
              << one_line(sentence) << std::endl;
    if (!alone) ranks->abort(1);
    return 1;
}

} // namespace

CommandLine read_command_line(int argc, char** argv, const Ranks& ranks) {
    CommandLine line;
    line.options = options_of(argc, argv, ranks, line.lock);
    return line;
}

int run_command(const Options& o, const Ranks& ranks) {
    switch (o.command) {
    case Options::Command::sample:
        return ranks.first() ? sample(o, ranks) : 0;
    case Options::Command::chat:
        return ranks.first() ? talk(o, ranks) : 0;
    case Options::Command::eval:
        return eval(o, ranks);
    case Options::Command::probe:
        return ranks.first() ? probe(o, ranks) : 0;
    case Options::Command::bench:
        return bench(o, ranks);
    case Options::Command::export_model:
        return ranks.first() ? export_model(o) : 0;
    case Options::Command::verify:
        return ranks.first() ? verify(o.paths) : 0;
    case Options::Command::schemes:
        if (ranks.first()) std::cout << describe_schemes(o.format, o.layers ? int(o.layers) : 12);
        return 0;
    case Options::Command::train: // main's
    case Options::Command::stop:
        return 0;
    }
    return 0;
}

int run_program(const std::function<int(const Ranks&)>& program) {
    prepare_process();
    std::unique_ptr<Ranks> ranks;
    try {
        ranks = std::make_unique<Ranks>();
        // mpirun gives a pseudo-terminal even where its own output is a file: plain lines then.
        if (ranks->size > 1) setenv("TERM", "dumb", 1);
        const int status = program(*ranks);
        if (ranks->first()) check_output();
        return status;
    } catch (const std::bad_alloc&) {
        return report(ranks.get(), "not enough memory: lower --batch, --seq-len or the model's "
                                   "size; --dry-run says what is needed");
    } catch (const std::exception& error) {
        return report(ranks.get(), error.what());
    }
}

} // namespace lns
