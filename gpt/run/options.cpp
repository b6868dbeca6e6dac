#include "gpt/run/options.h"

#include <CLI/CLI.hpp>

#include <charconv>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <limits>

#include "gpt/base/build.h"
#include "gpt/base/error.h"
#include "gpt/base/suggest.h"
#include "gpt/base/terminal.h"
#include "gpt/data/paths.h"
#include "gpt/model/params.h"
#include "gpt/model/schedule.h"
#include "gpt/run/config_file.h"
#include "gpt/run/probe.h"
#include "gpt/run/setup.h"

namespace lns {

namespace {

// What a resumed run does with a flag that it is given and that the run did not begin with.
enum class Change {
    once,  // belongs to one call of the program: not saved
    free,  // takes the new value
    noted, // takes it, and says so: the rest of the run differs from one never stopped
    fixed  // refuses: it would be another run
};

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr int64_t most = std::numeric_limits<int32_t>::max();

// Declares flags of one app, group by group.
struct Flags {
    CLI::App& app;
    std::map<const CLI::Option*, Change>& changes;
    const char* group = "";
    Change change = Change::once;

    CLI::Option* add(CLI::Option* option, const char* type) {
        changes[option] = change;
        return option->group(group)->type_name(type)->capture_default_str();
    }
    // A prompt may be empty. Elsewhere that is a shell's variable that is not set, as in -i
    // "$DATA".
    CLI::Option* text(const char* names, std::string& value, const char* type, const char* help,
                      bool may_be_empty = false) {
        auto check = [](const std::string& text) {
            return text.empty() ? "there is no value: name one, or leave the flag out" : "";
        };
        CLI::Option* option = add(app.add_option(names, value, help), type);
        return may_be_empty ? option : option->check(CLI::Validator(check, ""));
    }
    // ~ is the home folder. `expand`: of what may be more than a path.
    CLI::Option* path(const char* names, std::string& value, const char* type, const char* help,
                      std::string (*expand)(const std::string&) = expand_home) {
        auto transform = [expand](std::string& text) -> std::string {
            try {
                text = expand(text);
                return "";
            } catch (const Error& error) {
                return error.what();
            }
        };
        return text(names, value, type, help)->transform(CLI::Validator(transform, ""));
    }
    // Shards, whose ~ is expanded where they are looked for.
    CLI::Option* pattern(const char* names, std::string& value, const char* help) {
        return text(names, value, "GLOB", help);
    }
    void flag(const char* names, bool& value, const char* help) {
        add(app.add_flag(names, value, help), "");
    }
    void choice(const char* names, std::string& value, const std::vector<std::string>& known,
                const char* help) {
        auto check = [known](std::string& text) {
            if (std::find(known.begin(), known.end(), text) != known.end()) return std::string();
            return cat("'", text, "' is not one of ", join(known), ".", did_you_mean(text, known));
        };
        text(names, value, "NAME", help)->check(CLI::Validator(check, ""));
    }
    // A whole number from low to high, that may be written as 10M, 64k or 1e6.
    void count(const char* names, int64_t& value, int64_t low, int64_t high, const char* help) {
        auto check = [low, high](std::string& text) -> std::string {
            try {
                int64_t n = parse_count(text);
                if (n < low || n > high)
                    return cat(text, " is out of range, expected ", low, " to ", high);
                text = std::to_string(n);
                return "";
            } catch (const Error& error) {
                return error.what();
            }
        };
        add(app.add_option(names, value, help), "N")->transform(CLI::Validator(check, ""));
    }
    // low ≤ number ≤ high, or low < number where `above`.
    void number(const char* names, double& value, double low, double high, const char* help,
                bool above = false) {
        auto check = [=](std::string& text) -> std::string {
            char* end;
            double x = std::strtod(text.c_str(), &end);
            if (text.empty() || *end || std::isnan(x)) return "'" + text + "' is not a number";
            if (x >= low && x <= high && !(above && x == low) && std::isfinite(x)) {
                char shortest[32]; // so that 1e-3 and 0.001 are the same to a resumed run
                text.assign(shortest, std::to_chars(shortest, shortest + 32, x).ptr);
                return "";
            }
            return cat(text, " is out of range, expected ", above ? "above " : "at least ", low,
                       high < infinity ? cat(" and at most ", high) : "");
        };
        add(app.add_option(names, value, help), "X")->transform(CLI::Validator(check, ""));
    }
};

void add_sampling(Flags& f, Options& o) {
    f.text("--prompt", o.prompt, "TEXT", "what a sample continues; none: the start of a text",
           true);
    f.number("--temperature", o.temperature, 0, 1000, "0: always the likeliest token");
    f.count("--top-k", o.top_k, 0, most, "draw from the k likeliest tokens; 0: from all");
    f.number("--top-p", o.top_p, 0, 1, "draw from the likeliest tokens of probability p together",
             true);
}

void add_machine(Flags& f, Options& o) {
    f.choice("--device", o.device, {"auto", "cpu", "cuda"},
             "auto, cpu or cuda: where to compute; auto: on a GPU if there is one");
    f.count("--threads", o.threads, 0, 4096,
            "0: a core each, as far as a container's quota and OMP_NUM_THREADS allow");
}

void add_dtype(Flags& f, Options& o, const char* help) {
    f.choice("--dtype", o.dtype, {"auto", "float32", "bf16"}, help);
}

void add_numbers(Flags& f, Options& o) {
    add_dtype(f, o,
              "of weights, activations and their gradients: float32, bf16, or auto: bf16 on a GPU "
              "and where the CPU multiplies it");
    f.choice("--master-weights", o.master_weights, {"yes", "no"},
             "yes or no: with bf16, keep float32 weights beside, for the optimizer");
    f.choice("--moments", o.moments, {"float32", "bf16"}, "float32 or bf16: Adam's two averages");
    f.choice("--gradients", o.gradients, {"auto", "float32", "bf16"},
             "of parameters: float32, bf16 (on a GPU only), or auto: bf16 there if the weights "
             "are, without a master copy");
    f.choice("--rounding", o.rounding, {"nearest", "stochastic"},
             "nearest or stochastic: of what the optimizer writes in bf16");
    f.change = Change::free;
    f.choice("--recompute", o.recompute, {"none", "activations", "layers"},
             "none, activations (norms' outputs too) or layers: compute them again in the backward "
             "pass, and do not keep them");
}

const char* profile_help = "at the end, a table of where the steps' time went";

void add_tokenizer(Flags& f, Options& o) {
    f.path("--tokenizer", o.tokenizer, "SPEC",
           "bytes, gpt2:DIR, FILE.model or a saved directory; default: what lies beside the data",
           expand_home_in_tokenizer);
}

void add_model(Flags& f, Options& o) {
    std::vector<std::string> names_of_schemes;
    for (const SchemeRow& row : scheme_table()) names_of_schemes.push_back(row.name);
    f.path("-m,--model", o.model, "NAME",
           ("a preset: " + join(preset_names()) + "; or a Hugging Face config.json or its folder")
               .c_str());
    f.text("-n,--norm", o.norm, "SCHEME",
           ("the norm scheme: " + join(names_of_schemes) +
            "; mix:K; any with +gpas, +scaled-init. Default: the model's own, pre for most")
               .c_str());
}

void add_training(CLI::App& app, Options& o, std::map<const CLI::Option*, Change>& changes) {
    Flags f{app, changes, "Model", Change::fixed};
    add_model(f, o);
    f.number("--lns-power", o.lns_power, 0, 10, "p of the factor layer^-p of -n lns");
    f.text("--lns-sites", o.lns_sites, "SITES", "where -n lns scales: attn, mlp or attn,mlp");
    f.text("--arch", o.arch, "NAME", "gpt2, llama, qwen2, olmo or olmo2, instead of the model's");
    f.count("--layers", o.layers, 1, 100000, "instead of the model's, as are the next six");
    f.count("--width", o.width, 1, 1000000, "channels of the residual stream");
    f.count("--heads", o.heads, 1, 100000, "attention heads");
    f.count("--kv-heads", o.kv_heads, 1, 100000, "heads of keys and values");
    f.count("--mlp-width", o.mlp_width, 1, 10000000, "channels inside the MLP");
    f.count("--vocab", o.vocab, 1, 100000000, "tokens the model knows");
    f.count("--positions", o.positions, 1, 100000000, "the longest sequence it can take");
    f.number("--init-std", o.init_std, 0, 100, "of the weights at the start", true);
    f.number("--embed-std", o.embed_std, 0, 100, "of the token embedding at the start", true);
    f.path("--init-from", o.init_from, "PATH",
           "start from these weights: a run, a checkpoint, a Hugging Face folder, a --dump-state");

    f.group = "Data";
    f.change = Change::noted;
    f.pattern("-i,--train", o.train, "token shards; none: endless synthetic stories");
    f.pattern("-j,--val", o.val, "shards to validate on; default: *_val_* beside *_train_*");
    f.change = Change::fixed;
    add_tokenizer(f, o);
    f.change = Change::noted;
    f.count("-b,--batch", o.batch, 1, 1000000, "sequences of a micro-batch, on each rank");
    f.change = Change::fixed;
    f.count("-t,--seq-len", o.seq_len, 1, 100000000, "tokens of a sequence; tiny's default is 128");
    f.count("-d,--total-batch", o.total_batch, 0, most,
            "tokens of a step, over all ranks; 0: one micro-batch on each");
    f.count("--seed", o.seed, 0, std::numeric_limits<int64_t>::max(),
            "of the weights, the order of the data and the samples");
    f.flag("--overfit-batch", o.overfit_batch, "train on the first batch again and again");

    f.group = "Optimizer";
    f.choice("--recipe", o.recipe, {"paper"},
             "paper: batch, length, Adam, schedule, embeddings and pure bf16 of arXiv 2502.05795");
    f.change = Change::noted;
    f.count("-x,--steps", o.steps, 0, std::numeric_limits<int64_t>::max(), "of the whole run");
    f.number("-l,--lr", o.lr, 0, infinity, "learning rate at its peak; tiny's default is 0.003");
    f.choice("--lr-schedule", o.lr_schedule, schedule_kinds,
             "cosine, linear, wsd (constant, then down over the last fifth) or constant");
    auto warmup = [](std::string& text) -> std::string {
        try {
            Options o;
            o.warmup = text;
            o.warmup_steps();
            return "";
        } catch (const Error& error) {
            return error.what();
        }
    };
    f.text("-u,--warmup", o.warmup, "N|P%", "steps, or a part of them, until the peak")
        ->check(CLI::Validator(warmup, ""));
    f.number("-q,--final-lr-frac", o.final_lr_frac, 0, 1, "the last learning rate, of the peak");
    f.number("-c,--weight-decay", o.weight_decay, 0, 100, "of matrices, decoupled");
    f.number("--grad-clip", o.grad_clip, 0, infinity, "largest norm of the gradient; 0: any");
    f.number("--beta1", o.beta1, 0, 0.999999, "Adam's average of gradients");
    f.number("--beta2", o.beta2, 0, 0.999999999, "Adam's average of their squares");
    f.number("--eps", o.eps, 0, 1, "added to the square root of the latter");

    f.group = "Numbers and memory";
    add_numbers(f, o);

    f.group = "Validation and samples";
    f.change = Change::free;
    f.count("-v,--val-every", o.val_every, 0, most, "steps; 0: only at the end");
    f.count("--val-tokens", o.val_tokens, 1, 1000000000000, "validate on so many");
    f.count("--probe-every", o.probe_every, 0, most,
            "steps between looks at every layer's variance, gradients and angles; 0: never");
    f.count("--probe-tokens", o.probe_tokens, 1, 1000000000,
            "validation tokens to look at, at most and no more than --batch sequences");
    f.count("-s,--sample-every", o.sample_every, 0, most, "steps; 0: only at the end");
    f.count("-g,--sample-tokens", o.sample_tokens, 0, 1000000, "length of a sample; 0: none");
    add_sampling(f, o);

    f.group = "Run";
    f.change = Change::once;
    f.path("-o,--out", o.out, "DIR", "the run's directory; default: runs/MODEL-SCHEME, -2, -3 …");
    f.change = Change::free;
    f.count("--save-every", o.save_every, 0, most, "steps; 0: only at the end");
    f.count("--keep", o.keep, 0, most, "so many of the newest checkpoints; 0: all");
    f.change = Change::once;
    f.flag("--dry-run", o.dry_run, "print parameters, memory and FLOPs, and stop");
    f.path("--dump-state", o.dump_state, "FILE",
           "write one forward and backward pass as safetensors, and stop");
    f.flag("--profile", o.profile, profile_help);
    f.change = Change::free;
    add_machine(f, o);
}

// "-x,--steps" as CLI11 has it: the long name.
std::string long_name(const CLI::Option* option) {
    return option->get_lnames().empty() ? option->get_name() : "--" + option->get_lnames()[0];
}

// A group's heading, then a line for each flag, its help broken into lines of 100 columns.
std::string help_text(const CLI::App& app) {
    const size_t column = 30, width = 100;
    std::string out = app.get_description() + "\n";
    std::vector<std::string> groups = app.get_groups(); // --help and --config come last
    std::rotate(groups.begin(), groups.begin() + 1, groups.end());
    for (const std::string& group : groups) {
        out += "\n" + (group == groups.back() ? "Other" : group) + ":\n";
        for (const CLI::Option* o :
             app.get_options([&](const CLI::Option* o) { return o->get_group() == group; })) {
            std::string name = o->get_positional() ? o->get_name(true) : o->get_name(false, true);
            size_t comma = name.find(',');
            if (comma != std::string::npos) name.insert(comma + 1, " ");
            std::string type = o->get_type_name(), standard = o->get_default_str();
            std::string line = std::string("  ") + (name[1] == '-' ? "    " : "") + name;
            if (!type.empty() && !o->get_positional()) line += " " + type;
            if (line.size() > column - 2) out += line + "\n", line.clear();
            line.resize(column, ' ');
            if (!type.empty() && !standard.empty() && standard != "0")
                standard = "[" + standard + "]";
            else
                standard.clear();
            std::istringstream words(o->get_description() + " " + standard);
            std::string word;
            while (words >> word) {
                if (line.size() + word.size() + 1 > width) {
                    out += line + "\n";
                    line.assign(column, ' ');
                }
                line += (line.size() > column ? " " : "") + word;
            }
            out += line + "\n";
        }
    }
    return out + app.get_footer();
}

// The paper's recipe as flags (arXiv 2502.05795, section 4.1 and its released code), by the model's
// parameters. The paper has no runs below 130m: the 10,000 steps there are ours. Embeddings start
// at √(2/5) as in the code of the published results (until its commit eb1a0a5 of 2026-01-02).
std::vector<std::pair<std::string, std::string>> paper_recipe(const Options& o) {
    struct Row {
        double parameters;
        const char *steps, *lr, *warmup;
    };
    const Row rows[] = {{120e6, "10000", "0.001", "10%"},
                        {200e6, "20000", "0.001", "10%"},
                        {300e6, "40000", "0.001", "10%"},
                        {600e6, "60000", "0.0005", "10%"},
                        {infinity, "100000", "0.0005", "1000"}};
    const Row* row = rows;
    double parameters = double(make_registry(model_config(o)).count());
    while (parameters > row->parameters) row++;
    return {{"--seq-len", "256"},       {"--total-batch", "131072"},
            {"--beta1", "0.9"},         {"--beta2", "0.999"},
            {"--eps", "1e-08"},         {"--weight-decay", "0"},
            {"--grad-clip", "0"},       {"--lr-schedule", "cosine"},
            {"--final-lr-frac", "0.1"}, {"--lr", row->lr},
            {"--steps", row->steps},    {"--warmup", row->warmup},
            {"--val-tokens", "10M"},    {"--embed-std", "0.632455532034"},
            {"--dtype", "bf16"},        {"--master-weights", "no"},
            {"--moments", "bf16"}};
}

// A sentence for what CLI11 found wrong.
[[noreturn]] void fail_parse(const CLI::ParseError& error) {
    std::string what = error.what();
    if (dynamic_cast<const CLI::ArgumentMismatch*>(&error))
        fail("the flag ", what.substr(0, what.find(':')), " needs a value; see --help");
    if (dynamic_cast<const CLI::RequiredError*>(&error)) fail(what, "; see --help");
    fail(what);
}

const std::vector<std::string> command_names = {"sample", "eval",   "probe",
                                                "bench",  "export", "verify"};

std::vector<std::string> flag_names(const CLI::App& app) {
    std::vector<std::string> names;
    for (const CLI::Option* option : app.get_options()) {
        for (const std::string& s : option->get_snames()) names.push_back("-" + s);
        for (const std::string& l : option->get_lnames()) names.push_back("--" + l);
    }
    return names;
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

[[noreturn]] void fail_unknown(const CLI::App& app, std::string name,
                               const std::vector<std::string>& argv) {
    if (name[0] == '-') {
        name = name.substr(0, name.find('='));
        fail("there is no flag ", name, ".",
             name.size() > 2 ? did_you_mean(name, flag_names(app)) : "", " All flags: --help");
    }
    fail_if_unquoted(name, argv);
    if (std::find(command_names.begin(), command_names.end(), name) != command_names.end())
        fail("`", name, "` stands behind another command");
    fail("did not expect '", name, "'.", did_you_mean(name, command_names),
         " The commands are `sample`, `eval`, `probe` and `export`, each with a checkpoint, "
         "`bench`, `verify`, and none to train; see --help");
}

void add_config(CLI::App& app, std::string& path) {
    std::map<const CLI::Option*, Change> not_saved;
    Flags{app, not_saved, "Options"}.path(
        "--config", path, "FILE",
        "flags from a file, as lines `long-name = value`; those given here win");
}

// The option that a line of the --config file sets, of this app.
CLI::Option* find_option(CLI::App& app, const std::string& name) {
    CLI::Option* option = app.get_option_no_throw("--" + name);
    return option || name.size() != 1 ? option : app.get_option_no_throw("-" + name);
}

[[noreturn]] void fail_unknown_line(const std::string& where, const CLI::App& app,
                                    const ConfigLine& line, const std::string& command) {
    std::string belongs; // to a command, whose section it does not stand in
    if (command.empty())
        for (const std::string& other : command_names)
            if (app.get_subcommand(other)->get_option_no_throw("--" + line.name))
                belongs += cat(belongs.empty() ? " It belongs to a command: put it under [" : ", [",
                               other, "]");
    const CLI::App& of = command.empty() ? app : *app.get_subcommand(command);
    fail(where, "there is no flag '", line.name, "'",
         command.empty() ? "" : " of `" + command + "`", ".",
         belongs.empty() ? did_you_mean("--" + line.name, flag_names(of)) : belongs);
}

// What CLI11 takes for such an option, where a flag is true or false. "" if it is neither.
std::string from_file(const CLI::Option& option, const std::string& value) {
    const bool flag = option.get_type_name().empty(), optional = option.get_expected_min() == 0;
    if (!flag && !optional) return value;
    for (const char* yes : {"true", "yes", "on", "1"})
        if (value == yes) return flag ? "true" : "1";
    for (const char* no : {"false", "no", "off", "0"})
        if (value == no) return flag ? "false" : "0";
    fail("'", value, "' is neither true nor false");
}

// Gives options what the file says of them, unless the command line says it. All lines are checked;
// those of other commands are then forgotten, and so are training's that belong to one call, if
// there is a command.
void apply_config_file(const std::string& path, CLI::App& app, CLI::App& used, Options& o,
                       const std::map<const CLI::Option*, Change>& changes) {
    std::map<const CLI::Option*, int> lines;
    auto apply = [&](const ConfigLine& line, bool of_used) {
        const bool of_command = std::find(command_names.begin(), command_names.end(),
                                          line.section) != command_names.end();
        CLI::App& app_of_line = of_command ? *app.get_subcommand(line.section) : app;
        if (of_used != (&app_of_line == &used)) return;
        const std::string where = cat(path, ", line ", line.number, ": ");
        CLI::Option* option = find_option(app_of_line, line.name);
        if (!option) fail_unknown_line(where, app, line, of_command ? line.section : "");
        const std::string name = long_name(option);
        if (!changes.count(option) && name != "--resume")
            fail(where, name, " cannot stand in a file: give it on the command line");
        if (auto [before, first] = lines.emplace(option, line.number); !first)
            fail(where, name, " stands in line ", before->second, " already");
        const std::vector<std::string> given = option->results();
        const Options kept = o;
        try {
            option->clear();
            option->add_result(from_file(*option, line.value));
            option->run_callback();
        } catch (const CLI::ParseError& error) {
            fail(where, error.what());
        } catch (const Error& error) {
            fail(where, name, ": ", error.what());
        }
        const bool one_call = !changes.count(option) || changes.at(option) == Change::once;
        const bool forgotten = &app_of_line != &used && (&app_of_line != &app || one_call);
        if (given.empty() && !forgotten) return;
        option->clear();
        for (const std::string& word : given) option->add_result(word);
        o = kept;
        if (!given.empty()) option->run_callback();
    };
    const std::vector<ConfigLine> all = read_config_file(path);
    // A command shares variables with training: its own lines and flags come last.
    for (const ConfigLine& line : all) apply(line, false);
    for (const ConfigLine& line : all) apply(line, true);
    for (CLI::Option* option : used.get_options())
        if (option->count() > 0) option->run_callback();
}

} // namespace

int64_t Options::warmup_steps() const {
    if (warmup.empty() || warmup.back() != '%') return parse_count(warmup);
    char* end;
    double percent = std::strtod(warmup.c_str(), &end);
    if (end == warmup.c_str() || end != &warmup.back() || !(percent >= 0 && percent <= 100))
        fail("'", warmup, "' is not a number of steps, nor a part of them from 0% to 100%");
    return int64_t(std::llround(percent / 100 * double(steps)));
}

Options parse_options(int argc, const char* const* argv, const SavedFlags& saved) {
    Options o;
    o.argv.assign(argv, argv + argc);
    bool version = false;
    std::map<const CLI::Option*, Change> changes;
    CLI::App app("Trains a GPT or LLaMA language model.\n\n"
                 "  train_gpt [flags]                       train\n"
                 "  train_gpt sample CHECKPOINT [flags]     write text with a trained model\n"
                 "  train_gpt eval CHECKPOINT [flags]       measure its loss\n"
                 "  train_gpt probe CHECKPOINT [flags]      measure what each layer does\n"
                 "  train_gpt export CHECKPOINT DIR         write it for Hugging Face's tools\n"
                 "  train_gpt bench [-m MODEL] [flags]      measure how fast it would train\n"
                 "  train_gpt verify PATH...                check runs, checkpoints and shards\n\n"
                 "Counts may be written as 10M, 64k or 1e6.");
    app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
    app.footer("\nExit status: 0 done, 1 an error, 130 stopped by a signal and saved (Ctrl-C, HUP, "
               "TERM, USR1,\nUSR2 or XCPU; -y goes on). A second signal, a second or more later, "
               "ends at once without saving: 1.\n");
    add_training(app, o, changes);
    std::string resume;
    CLI::Option* y = app.add_option("-y,--resume", resume,
                                    "go on with the run in -o, whose flags need not be repeated; "
                                    "-y 0: do not")
                         ->expected(0, 1)
                         ->type_name("[0|1]")
                         ->group("Run");
    app.add_flag("--version", version, "the version, what was built in, and stop");
    std::string config;
    add_config(app, config);

    CLI::App* sample = app.add_subcommand("sample", "Writes text with a trained model.");
    CLI::App* eval = app.add_subcommand("eval", "Measures the loss of a trained model.");
    for (CLI::App* sub : {sample, eval}) {
        sub->option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
        Flags f{*sub, changes, "Flags"};
        f.path("CHECKPOINT", o.checkpoint, "PATH", "a run's directory, or one of its checkpoints")
            ->required();
        add_tokenizer(f, o);
        if (sub == sample) {
            add_sampling(f, o);
            f.count("-g,--sample-tokens", o.sample_tokens, 0, 1000000, "length of the sample");
            f.count("--seed", o.seed, 0, std::numeric_limits<int64_t>::max(), "of the sample");
            f.flag("--ignore-eot", o.ignore_eot, "go on behind an end of text");
        } else {
            f.pattern("-j,--val", o.val, "token shards; default: those of the run");
            f.count("--val-tokens", o.val_tokens, 1, 1000000000000, "measure on so many");
            f.count("-b,--batch", o.batch, 1, 1000000, "sequences at once");
            f.count("-t,--seq-len", o.seq_len, 0, 100000000, "default: the run's");
        }
        add_dtype(f, o, "float32, bf16, or auto: as the run was trained");
        add_machine(f, o);
    }
    CLI::App* probe = app.add_subcommand("probe", "Measures what each layer of a model does.");
    {
        probe->option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
        Flags f{*probe, changes, "Flags"};
        f.path("CHECKPOINT", o.checkpoint, "PATH", "a run's directory, or one of its checkpoints")
            ->required();
        f.pattern("-j,--val", o.val, "token shards; default: those of the run");
        auto check = [](const std::string& text) -> std::string {
            try {
                parse_probes(text);
                return "";
            } catch (const Error& error) {
                return error.what();
            }
        };
        f.text("--probes", o.probes, "NAMES",
               "all, or some of variance,gradients,angular,removal,jacobian,usefulness,permutation")
            ->check(CLI::Validator(check, ""));
        f.count("--probe-tokens", o.probe_tokens, 1, 1000000000, "measure on so many");
        f.count("--jacobian-samples", o.jacobian_samples, 2, most, "tokens to sample it at");
        f.count("--jacobian-layer", o.jacobian_layer, 0, most,
                "whose whole matrix to write, for a width of at most 256; 0: three quarters down");
        f.count("-b,--batch", o.batch, 1, 1000000, "sequences at once");
        f.count("-t,--seq-len", o.seq_len, 0, 100000000, "default: the run's");
        f.count("--seed", o.seed, 0, std::numeric_limits<int64_t>::max(), "of what is sampled");
        f.path("-o,--out", o.out, "FILE", "where to write; default: probe.json in the run");
        add_dtype(f, o, "float32, bf16, or auto: as the run was trained");
        add_machine(f, o);
    }
    CLI::App* bench = app.add_subcommand("bench", "Measures how fast a model trains here.");
    {
        bench->option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
        Flags f{*bench, changes, "Flags"};
        add_model(f, o);
        f.count("-b,--batch", o.batch, 0, 1000000,
                "sequences of a step; 0: the largest power of two that the memory has room for");
        f.count("-t,--seq-len", o.seq_len, 1, 100000000, "tokens of each; tiny's default is 128");
        f.count("-x,--steps", o.timed_steps, 1, most, "so many, after one that is not measured");
        f.flag("--json", o.json, "one JSON object on one line, instead of a table");
        f.flag("--profile", o.profile, profile_help);
        add_numbers(f, o);
        add_machine(f, o);
    }
    CLI::App* exporting = app.add_subcommand("export", "Writes a model for Hugging Face's tools.");
    {
        exporting->option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
        Flags f{*exporting, changes, "Flags"};
        f.path("CHECKPOINT", o.checkpoint, "PATH", "a run's directory, or one of its checkpoints")
            ->required();
        f.path("DIR", o.export_dir, "PATH", "the directory to write, new or empty")->required();
        f.choice("--dtype", o.export_dtype, {"float32", "float16", "bfloat16", "bf16"},
                 "float32, float16 or bfloat16 (bf16), to nearest");
        f.count("--shard-size", o.shard_size, 1, 1000000000000000,
                "bytes of a file at most, 500M or 5G; beyond them a second is begun");
    }
    CLI::App* verify = app.add_subcommand("verify", "Checks that files are as they were written.");
    {
        Flags f{*verify, changes, "Flags"};
        f.add(verify->add_option("PATH", o.paths,
                                 "runs, checkpoints, Hugging Face folders, shards (a pattern or "
                                 "their folder), safetensors files"),
              "PATH")
            ->required();
    }
    // Unknown flags are collected, for a better sentence than CLI11's.
    app.require_subcommand(0, 1);
    app.allow_extras();
    for (CLI::App* command : {sample, eval, probe, bench, exporting, verify}) {
        command->allow_extras();
        add_config(*command, config);
    }

    auto parsed = [&]() -> CLI::App& {
        for (CLI::App* sub : {sample, eval, probe, bench, exporting, verify})
            if (sub->parsed()) return *sub;
        return app;
    };
    o.command = Options::Command::stop;
    try {
        app.parse(argc, argv);
    } catch (const CLI::CallForHelp&) {
        std::cout << help_text(parsed());
        return o;
    } catch (const CLI::ParseError& error) {
        fail_parse(error);
    }
    CLI::App& used = parsed();
    if (std::vector<std::string> extras = app.remaining(true); !extras.empty())
        fail_unknown(used, extras[0], o.argv);
    if (version) {
        std::cout << "train_gpt " << build_info().version << " (" << build_info().compiler << ")\n";
        for (const auto& [name, value] : build_info().features)
            std::cout << "  " << name << ": " << value << "\n";
        return o;
    }
    if (&used != &app)
        for (const CLI::Option* option : app.get_options())
            if (option->count() > 0 && long_name(option) != "--config")
                fail(long_name(option), " stands before `", used.get_name(),
                     "`, where the flags of training are: put those of `", used.get_name(),
                     "` behind it");
    if (!config.empty()) apply_config_file(config, app, used, o, changes);
    if (resume != "" && resume != "0" && resume != "1")
        fail("--resume is ", resume, ", expected nothing, 1 or 0");
    o.resume = y->count() > 0 && resume != "0";
    if (o.resume && o.out.empty()) fail("--resume: say which run to go on with, by -o DIR");
    o.command = sample->parsed()      ? Options::Command::sample
                : eval->parsed()      ? Options::Command::eval
                : probe->parsed()     ? Options::Command::probe
                : bench->parsed()     ? Options::Command::bench
                : exporting->parsed() ? Options::Command::export_model
                : verify->parsed()    ? Options::Command::verify
                                      : Options::Command::train;
    // Threads are each machine's own matter.
    auto note_settings = [&] {
        o.settings["--resume"] = o.resume ? "yes" : "no";
        o.settings["the command"] = &used == &app ? "to train" : used.get_name();
        for (const CLI::Option* option : used.get_options())
            if (changes.count(option) && option != used.get_option_no_throw("--threads"))
                o.settings[long_name(option)] =
                    option->count() > 0 ? option->as<std::string>() : option->get_default_str();
    };
    if (o.command != Options::Command::train) {
        note_settings();
        if (bench->parsed() && o.model == "tiny" && bench->count("--seq-len") == 0) o.seq_len = 128;
        if (probe->parsed() && probe->count("--seq-len") == 0) o.seq_len = 0;
        if (!eval->parsed()) return o;
        if (eval->count("--seq-len") == 0) o.seq_len = 0;
        if (eval->count("--val-tokens") == 0) o.val_tokens = 0;
        return o;
    }

    o.goes_on = !saved.empty();
    o.batch_given = app.count("--batch") > 0;
    auto set_default = [&](const std::string& name, const std::string& value) {
        CLI::Option* option = app.get_option_no_throw(name);
        if (!option || option->count() > 0) return; // a flag of another version, or given
        option->add_result(value);
        option->run_callback();
    };
    for (const auto& [name, value] : saved) {
        CLI::Option* option = app.get_option_no_throw(name);
        if (option && option->count() > 0 && option->as<std::string>() != value) {
            std::string now = option->as<std::string>();
            std::string was = value.empty() || value == "0" ? "not given" : value;
            if (changes[option] == Change::fixed)
                fail(name, " was ", was, " when this run began and is now ", now,
                     ": leave it out to go on, or start another run with another -o");
            if (changes[option] == Change::noted)
                o.changes.push_back(
                    cat(name, " was ", was, " until now and is ", now, " from here on"));
        }
        if (option && value != option->get_default_str()) set_default(name, value);
    }
    o.model_given = app.count("--model") > 0;
    if (saved.empty()) {
        if (o.recipe == "paper")
            for (const auto& [name, value] : paper_recipe(o)) set_default(name, value);
        else if (o.model == "tiny") {
            set_default("--seq-len", "128");
            set_default("--lr", "0.003");
            set_default("--val-tokens", "32768");
        }
    }
    for (const CLI::Option* option : app.get_options())
        if (changes.count(option) && changes[option] != Change::once)
            o.flags[long_name(option)] =
                option->count() > 0 ? option->as<std::string>() : option->get_default_str();
    note_settings();
    for (const auto& [name, value] : o.flags) // checkpoints hold them as JSON
        if (!is_utf8(value))
            fail(name, " '", printable(value), "' is not UTF-8, and a checkpoint cannot name it");
    return o;
}

} // namespace lns
