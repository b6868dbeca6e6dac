#include "gpt/run/options.h"

#include <CLI/CLI.hpp>

#include <cmath>
#include <filesystem>
#include <iostream>
#include <limits>

#include "gpt/base/build.h"
#include "gpt/base/error.h"
#include "gpt/base/suggest.h"
#include "gpt/base/terminal.h"
#include "gpt/data/paths.h"
#include "gpt/model/config.h"
#include "gpt/model/optimizer.h"
#include "gpt/model/schedule.h"
#include "gpt/run/config_file.h"
#include "gpt/run/probe.h"
#include "gpt/run/tasks.h"

namespace lns {

using Command = Options::Command;
using nlohmann::json;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr int64_t most = std::numeric_limits<int32_t>::max();
constexpr int64_t most_seed = std::numeric_limits<int64_t>::max();

void add_model(FlagList& f, Options& o) {
    f.path("-m,--model", "NAME", o.model,
           "a preset (" + join(preset_names()) + "), or a Hugging Face config.json or its folder");
    f.text("-n,--norm", "SCHEME", o.norm,
           "the norm scheme: " + join(scheme_names()) +
               "; any with additions like +gpas; `train_gpt schemes` describes them. "
               "Default: the model's own, pre for most");
}

void add_architecture(FlagList& f, Options& o) {
    f.group = "Model";
    f.change = Change::fixed;
    add_model(f, o);
    f.number("--lns-power", o.lns_power, 0, 10, "p of the factor layer^-p of -n lns");
    f.text("--lns-sites", "SITES", o.lns_sites,
           "the sublayers that -n lns scales: attn, mlp or attn,mlp");
    f.text("--completep-base", "LxC", o.completep_base,
           "layers and width of the model that -n completep's hyperparameters were tuned on; "
           "default: 2x256");
    f.text("--arch", "NAME", o.arch,
           "architecture: " + join(architecture_names()) + "; default: the model's");
    f.count("--layers", o.layers, 1, 100000, "layers; default: the model's, as for the next six");
    f.count("--width", o.width, 1, 1000000, "channels of the residual stream");
    f.count("--heads", o.heads, 1, 100000, "attention heads");
    f.count("--kv-heads", o.kv_heads, 1, 100000, "heads of keys and values");
    f.count("--mlp-width", o.mlp_width, 1, 10000000, "hidden channels of the MLP");
    f.count("--vocab", o.vocab, 1, 100000000, "vocabulary size");
    f.count("--positions", o.positions, 1, 100000000, "longest sequence");
    f.choice("--norm-type", o.norm_type, {"stock", "dyt"},
             "dyt: a learned tanh in place of every norm but those of q and k (arXiv 2503.10622); "
             "default: the model's, stock (LayerNorm or RMSNorm, as its architecture has it)");
    f.number("--init-std", o.init_std, 0, 100, "standard deviation of the initial weights", true);
    f.number("--embed-std", o.embed_std, 0, 100, "the same of the token embedding", true);
    f.path("--init-from", "PATH", o.init_from,
           "initial weights: a run, a checkpoint, a Hugging Face folder, a --dump-state");
}

void add_tokenizer(FlagList& f, Options& o) {
    f.path("--tokenizer", "SPEC", o.tokenizer,
           "bytes, gpt2:DIR, FILE.model, tokenizer.json or a tokenizer's folder; default: the one "
           "beside the data")
        .expand = expand_home_in_tokenizer;
}

void add_data(FlagList& f, Options& o) {
    f.group = "Data";
    f.change = Change::noted;
    f.text("-i,--train", "GLOB", o.train, "token shards; default: endless synthetic stories");
    f.text("-j,--val", "GLOB", o.val, "validation shards; default: *_val_* beside *_train_*");
    f.change = Change::fixed;
    add_tokenizer(f, o);
    f.change = Change::noted;
    f.count("-b,--batch", o.batch, 1, 1000000, "sequences of a micro-batch on each rank");
    f.change = Change::fixed;
    f.count("-t,--seq-len", o.seq_len, 1, 100000000, "tokens of a sequence; tiny's default is 128");
    f.count("-d,--total-batch", o.total_batch, 0, most,
            "tokens of a step over all ranks; 0: one micro-batch on each");
    f.count("--seed", o.seed, 0, most_seed,
            "seed of the weights, the data's order and the samples");
    f.on_off("--overfit-batch", o.overfit_batch, "train on the first batch only");
}

void check_warmup(const json& text) {
    Options o;
    o.warmup = text;
    o.warmup_steps();
}

void add_optimizer_name(FlagList& f, Options& o) {
    f.choice("--optimizer", o.optimizer, optimizer_names(),
             "adamw; muon: matrices of layers move by their orthogonalized momentum, the rest by "
             "AdamW; normuon: muon --normuon");
    f.add("--normuon", "", &o.normuon,
          "with --optimizer muon, rows of matrices are divided by their second moment's root "
          "(arXiv 2510.05491)")
        .change = Change::once; // --optimizer is saved
}

void add_optimizer(FlagList& f, Options& o) {
    f.group = "Optimizer";
    f.choice("--recipe", o.recipe, {"paper", "paper-sft"},
             "paper: batch, length, Adam, schedule, embeddings and pure bf16 of arXiv 2502.05795; "
             "paper-sft: its fine-tuning, with LISA");
    add_optimizer_name(f, o);
    f.count(
        "--lisa", o.lisa, 0, 100000,
        "layers that train at a time (LISA, arXiv 2403.17919), beside embeddings, final norm and "
        "head; 0: all");
    f.count("--lisa-interval", o.lisa_interval, 1, most, "steps until other layers are drawn");
    f.change = Change::noted;
    f.count("-x,--steps", o.steps, 0, most_seed, "steps of the whole run");
    f.number("--epochs", o.epochs, 0, 1e6, "or passes over the training data; 0: as --steps says");
    f.number("-l,--lr", o.lr, 0, infinity, "peak learning rate; tiny's default is 0.003");
    f.choice("--lr-schedule", o.lr_schedule, schedule_kinds,
             "cosine, linear, wsd (constant, then decay over the last fifth) or constant");
    f.text("-u,--warmup", "N|P%", o.warmup, "warmup in steps, or in percent of all").check =
        check_warmup;
    f.number("-q,--final-lr-frac", o.final_lr_frac, 0, 1, "last learning rate / peak");
    f.number("-c,--weight-decay", o.weight_decay, 0, 100, "decoupled weight decay of matrices");
    f.number("--grad-clip", o.grad_clip, 0, infinity, "largest gradient norm; 0: no clipping");
    f.number("--clip-gates", o.clip_gates, 0, infinity,
             "then the largest norm of the gradient of +gpas's gates; 0: no clipping");
    f.number("--beta1", o.beta1, 0, 0.999999, "Adam's decay of the first moment");
    f.number("--beta2", o.beta2, 0, 0.999999999, "Adam's and NorMuon's of the second moment");
    f.number("--eps", o.eps, 0, 1, "Adam's epsilon, added to the second moment's root");
    f.on_off("--cautious-decay", o.cautious_decay,
             "weights decay only where the update does not make them larger (arXiv 2510.12402)");
    f.number("--muon-lr", o.muon_lr, 0, infinity,
             "Muon's peak learning rate, of matrices of layers; 0: --lr");
    f.choice("--muon-scale", o.muon_scale, {"moonlight", "jordan"},
             "Muon's factor of the learning rate: moonlight, 0.2 sqrt(max(rows, columns)), takes "
             "AdamW's rates; jordan, sqrt(max(1, rows / columns)), about 0.02");
    f.number("--momentum", o.momentum, 0, 0.999999, "Muon's decay of the first moment");
    f.choice("--orthogonalize", o.orthogonalize, {"newton-schulz", "polar-express"},
             "how Muon orthogonalizes: newton-schulz or polar-express (arXiv 2505.16932)");
}

void add_dtype(FlagList& f, Options& o, const char* help) {
    f.choice("--dtype", o.dtype, {"auto", "float32", "bf16"}, help);
}

void add_precision(FlagList& f, Options& o) {
    add_dtype(f, o,
              "weights, activations and their gradients: float32, bf16, or auto: bf16 on a GPU and "
              "on a CPU that multiplies it");
    f.choice("--master-weights", o.master_weights, {"yes", "no"},
             "yes or no: with bf16, keep float32 weights for the optimizer");
    f.choice("--moments", o.moments, {"float32", "bf16"},
             "float32 or bf16: the optimizer's states, Adam's moments");
    f.choice("--gradients", o.gradients, {"auto", "float32", "bf16"},
             "parameter gradients: float32, bf16 (GPU only), or auto: bf16 on a GPU if the weights "
             "are bf16 without master weights");
    f.choice("--rounding", o.rounding, {"nearest", "stochastic"},
             "nearest or stochastic: rounding of the optimizer's bf16 results");
    f.change = Change::free;
    f.choice("--recompute", o.recompute, {"none", "activations", "layers"},
             "none, activations (and norm outputs) or layers: recompute them in the backward pass "
             "instead of storing them");
}

void add_sampling(FlagList& f, Options& o) {
    f.number("--temperature", o.temperature, 0, 1000, "0: always the most likely token");
    f.count("--top-k", o.top_k, 0, most, "sample from the k most likely tokens; 0: from all");
    f.number("--top-p", o.top_p, 0, 1, "sample from the most likely tokens of total probability p",
             true);
}

void add_prompt(FlagList& f, Options& o) {
    f.add("--prompt", "TEXT", &o.prompt, "beginning of a sample; default: the start of a text");
}

void add_tasks(FlagList& f, const char* names, std::string& tasks, const char* help) {
    f.text(names, "NAMES", tasks, help).check = [](const json& text) {
        if (text != "") parse_tasks(text);
    };
}

void add_task_data(FlagList& f, Options& o) {
    f.path("--task-data", "DIR", o.task_data, "their data: NAME.jsonl or NAME.jsonl.xz");
}

void add_validation(FlagList& f, Options& o) {
    f.group = "Validation and samples";
    f.change = Change::free;
    f.count("-v,--val-every", o.val_every, 0, most, "steps; 0: only at the end");
    f.count("--val-tokens", o.val_tokens, 1, 1000000000000, "tokens of a validation");
    add_tasks(f, "--val-tasks", o.val_tasks,
              "benchmarks to score with each validation, as in eval --tasks");
    f.count("--val-task-limit", o.val_task_limit, 0, most,
            "questions of each, which mmlu's subjects share; 0: all");
    add_task_data(f, o);
    f.count("--probe-every", o.probe_every, 0, most,
            "steps between layer diagnostics (variance, gradients, angles); 0: never");
    f.count("--probe-tokens", o.probe_tokens, 1, 1000000000,
            "their validation tokens, in at most --batch sequences");
    f.count("-s,--sample-every", o.sample_every, 0, most, "steps; 0: only at the end");
    f.count("-g,--sample-tokens", o.sample_tokens, 0, 1000000, "tokens of a sample; 0: none");
    add_prompt(f, o);
    add_sampling(f, o);
}

void add_machine(FlagList& f, Options& o) {
    f.choice("--device", o.device, {"auto", "cpu", "cuda"},
             "auto, cpu or cuda; auto: a GPU if there is one");
    f.count("--threads", o.threads, 0, 4096,
            "0: one per core, within a container's quota and OMP_NUM_THREADS");
}

const char* profile_help = "at the end, print a table of where the time went";

void add_run(FlagList& f, Options& o) {
    f.group = "Run";
    f.change = Change::once;
    f.path("-o,--out", "DIR", o.out, "the run's directory; default: runs/MODEL-SCHEME, -2, -3 …");
    f.change = Change::free;
    f.count("--save-every", o.save_every, 0, most, "steps; 0: only at the end");
    f.count("--keep", o.keep, 0, most, "number of newest checkpoints to keep; 0: all");
    f.change = Change::once;
    f.on_off("--dry-run", o.dry_run, "print parameters, memory and FLOPs, then stop");
    f.path("--dump-state", "FILE", o.dump_state,
           "write one forward and backward pass as safetensors, then stop");
    f.on_off("--profile", o.profile, profile_help);
    f.change = Change::free;
    add_machine(f, o);
    f.change = Change::once;
    f.add("-y,--resume", "[0|1]", &o.resume, "continue the run in -o with its flags; -y 0: do not");
}

void add_training(FlagList& f, Options& o) {
    add_architecture(f, o);
    add_data(f, o);
    add_optimizer(f, o);
    f.group = "Precision and memory";
    add_precision(f, o);
    add_validation(f, o);
    add_run(f, o);
}

void add_checkpoint(FlagList& f, Options& o) {
    f.path("CHECKPOINT", "PATH", o.checkpoint, "a run's directory, or one of its checkpoints");
}

void add_inference_machine(FlagList& f, Options& o) {
    add_dtype(f, o, "float32, bf16, or auto: as the run was trained, float32 for other weights");
    add_machine(f, o);
}

void add_sequences(FlagList& f, Options& o) {
    f.count("-b,--batch", o.batch, 1, 1000000, "sequences at once");
    f.count("-t,--seq-len", o.seq_len, 0, 100000000, "default: the run's");
}

void add_sample(FlagList& f, Options& o) {
    add_checkpoint(f, o);
    add_tokenizer(f, o);
    add_prompt(f, o);
    add_sampling(f, o);
    f.count("-g,--sample-tokens", o.sample_tokens, 0, 1000000, "tokens of the sample");
    f.count("--seed", o.seed, 0, most_seed, "seed of the sample");
    f.on_off("--ignore-eot", o.ignore_eot, "continue after an end of text");
    add_inference_machine(f, o);
}

void add_chat(FlagList& f, Options& o) {
    add_checkpoint(f, o);
    f.text("--system", "TEXT", o.system, "instructions for the whole conversation");
    f.path("--template", "NAME", o.chat_template,
           "alpaca, chatml, llama-3, plain, a file of Jinja, or a folder with a "
           "tokenizer_config.json; default: the checkpoint's");
    add_tokenizer(f, o);
    add_sampling(f, o);
    f.count("-g,--sample-tokens", o.sample_tokens, 1, 1000000, "longest answer, in tokens");
    f.count("-t,--seq-len", o.seq_len, 0, 100000000,
            "tokens of the conversation, of which the oldest turns are forgotten; default: the "
            "run's");
    f.count("--seed", o.seed, 0, most_seed, "seed of the answers");
    add_inference_machine(f, o);
}

void add_eval(FlagList& f, Options& o) {
    f.group = "Flags";
    add_checkpoint(f, o);
    add_tokenizer(f, o);
    add_inference_machine(f, o);
    f.group = "Validation loss";
    f.text("-j,--val", "GLOB", o.val, "token shards; default: the run's");
    f.count("--val-tokens", o.val_tokens, 1, 1000000000000, "tokens to measure on");
    add_sequences(f, o);
    f.group = "Benchmarks, instead of the loss";
    add_tasks(f, "--tasks", o.tasks,
              "some of hellaswag,piqa,arc_easy,arc_challenge,boolq,openbookqa,winogrande,mmlu; "
              "-t is then the longest sequence (default: the model's)");
    add_task_data(f, o);
    f.count("--fewshot", o.fewshot, 0, 1000, "solved examples before each question");
    f.count("--limit", o.limit, 0, most,
            "the first N questions of each task and of each subject of mmlu; 0: all");
    f.on_off("--json", o.json, "print JSON in lm-evaluation-harness's layout, not a table");
    f.path("-o,--out", "FILE", o.out, "write that JSON to a file, too");
    f.path("--log-samples", "FILE", o.log_samples, "write every question's answers as JSON lines");
}

void add_probe(FlagList& f, Options& o) {
    add_checkpoint(f, o);
    f.text("-j,--val", "GLOB", o.val, "token shards; default: the run's");
    f.text("--probes", "NAMES", o.probes,
           "all, or some of variance,gradients,angular,removal,jacobian,usefulness,permutation")
        .check = [](const json& text) { parse_probes(text); };
    add_tasks(f, "--removal-tasks", o.removal_tasks,
              "benchmarks whose accuracy removal measures without each layer, as in eval --tasks");
    add_task_data(f, o);
    f.count("--limit", o.limit, 0, most,
            "the first N questions of each task and of each subject of mmlu; 0: all");
    add_tokenizer(f, o);
    f.count("--probe-tokens", o.probe_tokens, 1, 1000000000, "tokens to measure on");
    f.count("--jacobian-samples", o.jacobian_samples, 2, most, "tokens to sample the Jacobian at");
    f.count("--jacobian-layer", o.jacobian_layer, 0, most,
            "the layer whose whole Jacobian to write, up to width 256; 0: three quarters down");
    add_sequences(f, o);
    f.count("--seed", o.seed, 0, most_seed, "seed of what is sampled");
    f.path("-o,--out", "FILE", o.out, "output; default: probe.json in the run");
    add_inference_machine(f, o);
}

void add_bench(FlagList& f, Options& o) {
    add_model(f, o);
    f.count("-b,--batch", o.batch, 0, 1000000,
            "sequences of a step; 0: the largest power of two that fits in memory");
    f.count("-t,--seq-len", o.seq_len, 1, 100000000, "tokens of each; tiny's default is 128");
    f.count("-x,--steps", o.timed_steps, 1, most, "timed steps, after an untimed one");
    f.on_off("--json", o.json, "one JSON object on one line, instead of a table");
    f.on_off("--profile", o.profile, profile_help);
    add_optimizer_name(f, o);
    add_precision(f, o);
    add_machine(f, o);
}

void add_export(FlagList& f, Options& o) {
    add_checkpoint(f, o);
    f.path("DIR", "PATH", o.export_dir, "the directory to write, new or empty");
    f.choice("--dtype", o.export_dtype, {"float32", "float16", "bfloat16", "bf16"},
             "float32, float16 or bfloat16 (bf16), rounded to nearest");
    f.count("--shard-size", o.shard_size, 1, 1000000000000000,
            "largest file in bytes, 500M or 5G; beyond it the model is split");
    f.text("--drop-layers", "LIST", o.drop_layers,
           "leave out these layers, as in 5,6; the first is 1, as in the output of probe")
        .check = [](const json& text) {
        if (text != "") parse_layers(text);
    };
}

void add_verify(FlagList& f, Options& o) {
    f.add("PATH", "PATH", &o.paths,
          "runs, checkpoints, Hugging Face folders, shards (a pattern or their folder), "
          "safetensors files");
}

void add_schemes(FlagList& f, Options& o) {
    f.choice("--format", o.format, {"table", "names", "markdown", "json"},
             "table, names, markdown (the README's table) or json (for programs)");
    f.count("--layers", o.layers, 1, 100000, "layers of the model that json describes; 0: 12");
}

struct CommandRow {
    Command command;
    const char *name, *usage, *what;
    void (*add_flags)(FlagList&, Options&);
};
const CommandRow command_rows[] = {
    {Command::train, "", "[flags]", "train", add_training},
    {Command::sample, "sample", "CHECKPOINT [flags]", "write text with a trained model",
     add_sample},
    {Command::chat, "chat", "CHECKPOINT [flags]", "talk with it", add_chat},
    {Command::eval, "eval", "CHECKPOINT [flags]", "measure its loss", add_eval},
    {Command::probe, "probe", "CHECKPOINT [flags]", "measure what each layer does", add_probe},
    {Command::export_model, "export", "CHECKPOINT DIR", "write it for Hugging Face's tools",
     add_export},
    {Command::bench, "bench", "[-m MODEL] [flags]", "measure training speed", add_bench},
    {Command::verify, "verify", "PATH...", "check runs, checkpoints and shards for damage",
     add_verify},
    {Command::schemes, "schemes", "[--format FORMAT]", "list the norm schemes", add_schemes},
};

std::vector<Flag> flags_of(Command command, Options& o) {
    Options standard;
    FlagList list, defaults;
    for (const CommandRow& row : command_rows)
        if (row.command == command) row.add_flags(list, o), row.add_flags(defaults, standard);
    for (size_t i = 0; i < list.flags.size(); i++)
        list.flags[i].standard = defaults.flags[i].value();
    return list.flags;
}

std::vector<std::string> command_names() {
    std::vector<std::string> names;
    for (const CommandRow& row : command_rows)
        if (*row.name) names.push_back(row.name);
    return names;
}

// Training's for a section that only groups lines.
Command command_named(const std::string& name) {
    for (const CommandRow& row : command_rows)
        if (name == row.name) return row.command;
    return Command::train;
}

std::string name_of(Command command) {
    for (const CommandRow& row : command_rows)
        if (row.command == command) return row.name;
    return "";
}

// What CLI11 knows of the commands: it splits the command line into flags and their words.
struct CommandLine {
    CLI::App app;
    std::string config;
    std::map<Command, CLI::App*> apps;
    std::map<Command, std::vector<Flag>> flags;

    explicit CommandLine(Options& o) {
        for (const CommandRow& row : command_rows) {
            CLI::App* command = *row.name ? app.add_subcommand(row.name) : &app;
            apps[row.command] = command;
            flags[row.command] = flags_of(row.command, o);
            command->option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
            command->allow_extras(); // our sentence for unknown flags is better
            declare(*command, config_flag());
            for (const Flag& flag : flags[row.command]) declare(*command, flag);
        }
        app.add_flag("--version");
        app.require_subcommand(0, 1);
    }
    static void declare(CLI::App& app, const Flag& flag) {
        CLI::Option* option =
            flag.is_switch() ? app.add_flag(flag.names) : app.add_option(flag.names);
        if (flag.is_argument()) option->required();
        if (std::holds_alternative<bool*>(flag.variable) && !flag.is_switch())
            option->expected(0, 1);
        if (std::holds_alternative<std::vector<std::string>*>(flag.variable))
            option->take_all()->expected(-1);
    }
    Flag config_flag() { return FlagList().path("--config", "FILE", config, ""); }
    Command used() const {
        for (const auto& [command, sub] : apps)
            if (sub != &app && sub->parsed()) return command;
        return Command::train;
    }
    std::string help() const;
};

const char* shared_help = R"(
Other:
  -h, --help                  print this help and exit
      --config FILE           flags from a file, in lines `long-name = value`; those given here win
)";
const char* training_help =
    R"(      --version               print the version and what was built in, and exit
)";
const char* footer = R"(
Exit status: 0 done, 1 an error, 130 stopped by a signal and saved (Ctrl-C, HUP, TERM, USR1, USR2 or
XCPU; continue with -y). A second signal, a second or more later, exits at once without saving: 1.
)";

std::string CommandLine::help() const {
    std::string text = "Trains a GPT or LLaMA language model.\n\n";
    for (const CommandRow& row : command_rows) {
        std::string usage = cat("  train_gpt ", row.name, *row.name ? " " : "", row.usage);
        if (used() != Command::train && used() != row.command) continue;
        usage.resize(std::max<size_t>(usage.size() + 1, 42), ' ');
        text += usage + row.what + "\n";
    }
    if (used() == Command::train)
        text += "\nCounts may be written as 10M, 64k or 1e6.\n";
    else
        text = text.substr(text.find("\n\n") + 2);
    return text + flags_help(flags.at(used())) + shared_help +
           (used() == Command::train ? training_help : "") + footer;
}

std::vector<std::string> flag_names(const std::vector<Flag>& flags) {
    std::vector<std::string> names = {"-h", "--help", "--config"};
    for (const Flag& flag : flags)
        if (!flag.is_argument())
            for (const std::string& name : flag.all_names()) names.push_back(name);
    return names;
}

// A sentence for what CLI11 found wrong.
[[noreturn]] void fail_parse(const CLI::ParseError& error) {
    std::string what = error.what();
    if (dynamic_cast<const CLI::ArgumentMismatch*>(&error))
        fail("the flag ", what.substr(0, what.find(':')), " needs a value; see --help");
    if (dynamic_cast<const CLI::RequiredError*>(&error)) fail(what, "; see --help");
    fail(what);
}

// "d/a_*.bin" of "d/a_1.bin", "d/a_2.bin", …: what these names have in common.
std::string common_pattern(const std::vector<std::string>& names) {
    size_t begin = 0, end = 0, shortest = names[0].size();
    for (const std::string& name : names) shortest = std::min(shortest, name.size());
    auto same = [&](auto character) {
        return std::all_of(names.begin(), names.end(), [&](const std::string& name) {
            return character(name) == character(names[0]);
        });
    };
    while (begin < shortest && same([&](const std::string& name) { return name[begin]; })) begin++;
    while (begin + end < shortest &&
           same([&](const std::string& name) { return name[name.size() - 1 - end]; }))
        end++;
    return names[0].substr(0, begin) + "*" + names[0].substr(names[0].size() - end);
}

// -i d/*.bin without quotes arrives as -i and the name of every file.
void fail_if_unquoted(const std::string& extra, const std::vector<std::string>& argv) {
    const auto at = std::find(argv.begin(), argv.end(), extra);
    auto is_flag = [](const std::string& word) { return word.size() > 1 && word[0] == '-'; };
    const auto flag = std::find_if(std::make_reverse_iterator(at), argv.rend(), is_flag);
    const std::vector<std::string> takes_pattern = {"-i", "--train", "-j", "--val"};
    if (flag == argv.rend() ||
        std::find(takes_pattern.begin(), takes_pattern.end(), *flag) == takes_pattern.end())
        return;
    std::vector<std::string> files;
    for (auto word = flag.base(); word != argv.end() && std::filesystem::is_regular_file(*word);)
        files.push_back(*word++);
    if (files.size() < 2) return;
    fail(*flag, " takes one pattern, and here are ", files.size(), " files, from '", files.front(),
         "' to '", files.back(), "': quote the pattern, so that the shell leaves it alone, as in ",
         *flag, " '", common_pattern(files), "'");
}

[[noreturn]] void fail_unknown(const std::vector<Flag>& flags, std::string name,
                               const std::vector<std::string>& argv) {
    if (name[0] == '-') {
        name = name.substr(0, name.find('='));
        fail("there is no flag ", name, ".",
             name.size() > 2 ? did_you_mean(name, flag_names(flags)) : "", " All flags: --help");
    }
    fail_if_unquoted(name, argv);
    const std::vector<std::string> commands = command_names();
    if (std::find(commands.begin(), commands.end(), name) != commands.end())
        fail("`", name, "` follows another command");
    fail("did not expect '", name, "'.", did_you_mean(name, commands), " The commands are ",
         join(commands), ", and none to train; see --help");
}

void fail_if_misplaced(const CommandLine& line) {
    if (line.used() == Command::train) return;
    for (const CLI::Option* option : line.app.get_options()) {
        const std::string name = option->get_single_name();
        if (option->count() > 0 && name != "config")
            fail("--", name, " stands before `", name_of(line.used()),
                 "`, where the flags of training belong: put it after `", name_of(line.used()),
                 "`");
    }
}

// A value for a flag.
struct Setting {
    const Flag* flag;
    json value;
};

template <class Read> json read_value(const std::string& where, const Read& read) {
    try {
        return read();
    } catch (const Error& error) {
        fail(where, ": ", error.what());
    }
}

std::vector<Setting> settings_of_line(const CommandLine& line) {
    std::vector<Setting> settings;
    const CLI::App& app = *line.apps.at(line.used());
    for (const Flag& flag : line.flags.at(line.used())) {
        const CLI::Option* option = app.get_option(flag.name());
        const std::vector<std::string> words = option->results();
        if (option->count() == 0) continue;
        settings.push_back(
            {&flag, read_value(flag.name(), [&]() -> json {
                 if (std::holds_alternative<std::vector<std::string>*>(flag.variable)) return words;
                 if (flag.type != "[0|1]") return flag.parse(words.back());
                 if (words.back() != "" && words.back() != "0" && words.back() != "1")
                     fail("found ", words.back(), ", expected nothing, 1 or 0");
                 return words.back() != "0";
             })});
    }
    return settings;
}

[[noreturn]] void fail_unknown_line(const std::string& where, const CommandLine& line,
                                    const ConfigLine& found, Command command) {
    const std::string name = "--" + found.name;
    if (name == "--config" || name == "--help" || name == "--version")
        fail(where, name, " cannot stand in a file: give it on the command line");
    std::string belongs; // to a command, but stands outside its section
    if (command == Command::train)
        for (const std::string& other : command_names())
            if (find_flag(line.flags.at(command_named(other)), name))
                belongs += cat(belongs.empty() ? " It belongs to a command: put it under [" : ", [",
                               other, "]");
    fail(where, "there is no flag '", found.name, "'",
         command == Command::train ? "" : " of `" + name_of(command) + "`", ".",
         belongs.empty() ? did_you_mean(name, flag_names(line.flags.at(command))) : belongs);
}

// What a --config file sets, a command's own lines last. All lines are checked; those of other
// commands are then ignored, as are those of training that belong to one call if there is a
// command.
std::vector<Setting> settings_of_file(const CommandLine& line) {
    std::vector<Setting> shared, own;
    std::map<const Flag*, int> lines;
    for (const ConfigLine& found : read_config_file(line.config)) {
        const Command command = command_named(found.section);
        const std::string where = cat(line.config, ", line ", found.number, ": ");
        const std::vector<Flag>& flags = line.flags.at(command);
        const Flag* flag = find_flag(flags, "--" + found.name);
        if (!flag && found.name.size() == 1) flag = find_flag(flags, "-" + found.name);
        if (!flag) fail_unknown_line(where, line, found, command);
        if (auto [before, first] = lines.emplace(flag, found.number); !first)
            fail(where, flag->name(), " is set in line ", before->second, " already");
        const Setting setting = {
            flag, read_value(where + flag->name(), [&] { return flag->parse(found.value); })};
        if (command == line.used())
            own.push_back(setting);
        else if (command == Command::train && flag->change != Change::once)
            shared.push_back(setting);
    }
    shared.insert(shared.end(), own.begin(), own.end());
    return shared;
}

void print_version() {
    std::cout << "train_gpt " << build_info().version << " (" << build_info().compiler << ")\n";
    for (const auto& [name, value] : build_info().features)
        std::cout << "  " << name << ": " << value << "\n";
}

// Defaults that depend on the command.
void set_command_defaults(Options& o) {
    const bool of_the_run =
        o.command == Command::eval || o.command == Command::probe || o.command == Command::chat;
    if (of_the_run && !o.is_given("--seq-len")) o.seq_len = 0;
    if (o.command == Command::eval && !o.is_given("--val-tokens")) o.val_tokens = 0;
    if (o.command == Command::bench && o.model == "tiny" && !o.is_given("--seq-len"))
        o.seq_len = 128;
}

} // namespace

int64_t Options::warmup_steps() const {
    if (warmup.empty() || warmup.back() != '%') return parse_count(warmup);
    char* end;
    double percent = std::strtod(warmup.c_str(), &end);
    if (end == warmup.c_str() || end != &warmup.back() || !(percent >= 0 && percent <= 100))
        fail("'", warmup, "' is neither a number of steps nor a percentage from 0% to 100%");
    return int64_t(std::llround(percent / 100 * double(steps)));
}

Options parse_options(int argc, const char* const* argv) {
    Options o;
    o.argv.assign(argv, argv + argc);
    o.command = Command::stop;
    CommandLine line(o);
    try {
        line.app.parse(argc, argv);
    } catch (const CLI::CallForHelp&) {
        std::cout << line.help();
        return o;
    } catch (const CLI::ParseError& error) {
        fail_parse(error);
    }
    const Command used = line.used();
    if (std::vector<std::string> extras = line.app.remaining(true); !extras.empty())
        fail_unknown(line.flags.at(used), extras[0], o.argv);
    if (line.app.count("--version") > 0) {
        print_version();
        return o;
    }
    fail_if_misplaced(line);
    for (const CLI::App* app : {line.apps.at(Command::train), line.apps.at(used)})
        for (const std::string& file : app->get_option("--config")->results())
            line.config = read_value("--config", [&] { return line.config_flag().parse(file); });
    std::vector<Setting> all;
    if (!line.config.empty()) all = settings_of_file(line);
    for (const Setting& setting : settings_of_line(line)) all.push_back(setting);
    for (const auto& [flag, value] : all) {
        flag->set(value);
        if (find_flag(line.flags.at(used), flag->name()) == flag) o.given.insert(flag->name());
    }
    o.command = used;
    if (o.is_given("--steps") && o.is_given("--epochs") && o.epochs > 0)
        fail("--steps ", o.steps, " and --epochs ", flag_text(o.epochs),
             " both say how long to train: give one");
    if (o.resume && o.out.empty()) fail("--resume: name the run to continue, with -o DIR");
    if (o.normuon) {
        if (o.optimizer == "adamw")
            fail("--normuon: the optimizer is AdamW: add --optimizer muon, or leave it out");
        o.optimizer = "normuon";
        o.given.insert("--optimizer");
    }
    set_command_defaults(o);
    return o;
}

void continue_options(Options& o, const SavedFlags& saved) {
    o.continued = true;
    for (const Flag& flag : flags_of(Command::train, o)) {
        const auto found = saved.find(flag.name()); // an older version may lack it
        if (found == saved.end() || flag.change == Change::once) continue;
        const std::string name = flag.name();
        const json was = read_value(cat("the run's flag ", name),
                                    [&] { return flag.from_saved(found->second); });
        if (!o.is_given(name.c_str())) {
            flag.set(was);
            continue;
        }
        const json now = flag.value();
        if (now == was || flag.change == Change::free) continue;
        const std::string before = was == "" || was == 0 ? "not given" : flag_text(was);
        if (flag.change == Change::fixed)
            fail(name, " was ", before, " when this run began and is now ", flag_text(now),
                 ": leave it out to continue, or start another run with another -o");
        o.changes.push_back(
            cat(name, " was ", before, " until now and is ", flag_text(now), " from here on"));
    }
    o.flags = training_flags(o);
}

SavedFlags training_flags(Options o) {
    SavedFlags flags;
    for (const Flag& flag : flags_of(Command::train, o)) {
        if (flag.change == Change::once) continue;
        const json value = flags[flag.name()] = flag.value();
        if (const std::string text = flag_text(value); !is_utf8(text)) // checkpoints are JSON
            fail(flag.name(), " '", printable(text),
                 "' is not UTF-8, so a checkpoint cannot hold it");
    }
    return flags;
}

std::map<std::string, std::string> settings(Options o) {
    std::map<std::string, std::string> all = {
        {"the command", o.command == Command::train ? "to train" : name_of(o.command)}};
    for (const Flag& flag : flags_of(o.command, o))
        if (flag.name() != "--threads") all[flag.name()] = flag_text(flag.value());
    return all;
}

} // namespace lns
