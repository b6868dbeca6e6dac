#include "gpt/run/export_files.h"

#include <cmath>

#include "gpt/base/build.h"
#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/json.h"
#include "gpt/base/terminal.h"
#include "gpt/data/tokenizer.h"
#include "gpt/run/checkpoint.h"

namespace lns {

using nlohmann::json;

namespace {

// Beside a tokenizer.model.
void add_tokenizer_json(const Tokenizer& tokenizer, const std::string& to) {
    const std::string text = tokenizer.as_tokenizer_json();
    if (text.empty()) return;
    write_file_atomic(to + "/tokenizer.json", text);
    const std::string path = to + "/tokenizer_config.json";
    json config = path_exists(path) ? parse_json(read_file(path), path) : json::object();
    config["tokenizer_class"] = "PreTrainedTokenizerFast"; // others ignore tokenizer.json
    config["kind"] = tokenizer.id().kind;
    config["add_bos_token"] = tokenizer.bos >= 0;
    config["add_eos_token"] = config.value("add_eos_token", json(false));
    write_file_atomic(path, config.dump(2) + "\n");
}

} // namespace

std::string export_tokenizer(const std::string& from, const std::string& to) {
    const auto names = {"tokenizer.json",    "tokenizer.model",       "vocab.json",
                        "merges.txt",        "tokenizer_config.json", "special_tokens_map.json",
                        "added_tokens.json", "chat_template.jinja"};
    bool any = false;
    for (const char* name : names)
        if (is_regular_file_at(from + "/" + name)) {
            write_file_atomic(to + "/" + name, read_file(from + "/" + name));
            any = true;
        }
    const bool whole =
        path_exists(to + "/tokenizer.model") ||
        (path_exists(to + "/tokenizer.json") && path_exists(to + "/tokenizer_config.json"));
    if (any && !whole) load_tokenizer(from)->save(to);
    if (!path_exists(to + "/tokenizer.json") && path_exists(to + "/tokenizer.model"))
        add_tokenizer_json(*load_tokenizer(from), to);
    std::string copied;
    for (const char* name : names)
        if (path_exists(to + "/" + name))
            copied += (copied.empty() ? "" : ", ") + std::string(name);
    return copied;
}

std::string generation_config(const std::string& from, const std::string& config_json) {
    if (const std::string own = from + "/generation_config.json"; is_regular_file_at(own))
        return read_file(own);
    const json config = parse_json(config_json, "config.json");
    json out = json::object();
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
        if (!config.value(key, json()).is_null()) out[key] = config[key];
    return out.dump(2) + "\n";
}

namespace {

// A cell of a Markdown table.
std::string cell(const std::string& text) {
    std::string out;
    for (char c : printable(text)) out += c == '|' ? "\\|" : std::string(1, c);
    return out;
}

} // namespace

std::string model_card(const std::string& from, const std::string& name, const Config& config,
                       const ExportPlan& plan, int64_t parameters, const std::string& dtype) {
    TrainerState state;
    const bool ours = path_exists(from + "/trainer_state.json");
    if (ours) state = read_trainer_state(from);
    std::string card = cat("---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
                           "tags:\n- lns.cpp\n# license: the one you choose\n---\n\n# ",
                           name, "\n\n");
    card += cat("A language model of ", format_number("%.4g", double(parameters) / 1e6),
                " million parameters, exported by lns.cpp ", build_info().version, ".\n\n");
    auto row = [&](const std::string& what, const std::string& value) {
        card += cat("| ", what, " | ", cell(value), " |\n");
    };
    card += "| | |\n| --- | --- |\n";
    row("architecture", cat(config.model_type, ", ", config.layers, " layers, width ", config.width,
                            ", ", config.heads, " heads, vocabulary ", config.vocab_size,
                            ", sequences of up to ", config.positions));
    row("norm scheme",
        cat(config.scheme.name(), plan.beyond.empty()
                                      ? plan.folds.empty() ? "" : ", folded into the weights"
                                      : ", not folded"));
    row("weights", dtype);
    if (ours) {
        auto flag = [&](const char* key) {
            const auto found = state.flags.find(key);
            return found == state.flags.end() ? std::string() : flag_text(found->second);
        };
        const std::string data = flag("--train"), init = flag("--init-from");
        row("data", data.empty() ? "the built-in stories" : data);
        if (!init.empty()) row("started from", init);
        row("tokenizer", cat(state.tokenizer.kind, ", ", state.tokenizer.vocab_size, " tokens"));
        row("training", cat(state.step, " steps, ", state.tokens, " tokens"));
        if (std::isfinite(state.val_loss))
            row("validation loss", cat(format_number("%.4f", state.val_loss), ", perplexity ",
                                       format_number("%.2f", std::exp(state.val_loss))));
        std::string flags;
        for (const auto& [key, value] : state.flags)
            if (const std::string text = flag_text(value); !text.empty())
                flags += cat(flags.empty() ? "" : " ", key, "=", text);
        if (!flags.empty()) row("flags", flags);
    }
    if (plan.beyond.empty())
        card += "\n    from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
                "    model = AutoModelForCausalLM.from_pretrained(\".\")\n"
                "    tokenizer = AutoTokenizer.from_pretrained(\".\")\n";
    else
        card += cat("\n`transformers` cannot run this model: it has ", plan.beyond,
                    ". `train_gpt` can.\n");
    card += "\nThe license of the data and of the weights is not recorded here: add it before "
            "publishing.\n";
    return card;
}

} // namespace lns
