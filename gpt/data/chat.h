// Conversations: their templates, and what a model learns of them.
//
// A template is Jinja (gpt/data/jinja.h), as in tokenizer_config.json, with the variables messages,
// add_generation_prompt, bos_token, eos_token, and add_bos_token: whether texts begin with it. A
// message has role and content; that of a record of instruction, input and output also has these
// two fields apart, instruction and input.
//
// Tokens are encoded apart at both ends of an answer, as in generation, where the prompt is encoded
// alone.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gpt/base/json.h"
#include "gpt/data/jinja.h"
#include "gpt/data/tokenizer.h"

namespace lns {

using Messages = nlohmann::ordered_json; // an array of {"role": ..., "content": ...}

struct ChatTemplate {
    std::string name, text;
    std::shared_ptr<const Jinja> jinja;

    ChatTemplate(std::string name, std::string text);
    // alpaca, chatml, llama-3, plain, a file of Jinja, or a tokenizer's folder. Throws for anything
    // else, and names what there is.
    static ChatTemplate load(const std::string& name);
    // Of chat_template.jinja or tokenizer_config.json in the folder, if one has it.
    static std::optional<ChatTemplate> in_folder(const std::string& folder);
    static std::vector<std::string> names();

    // The text that a model continues with its answer.
    std::string prompt(const Messages& messages, const Tokenizer& tokenizer) const;
    // With the places [begin, end) of the answers, and of what ends them. Throws if they cannot be
    // found.
    Jinja::Output conversation(const Messages& messages, const Tokenizer& tokenizer) const;
};

struct Example {
    std::vector<int> tokens;
    std::vector<unsigned char> learned; // 1: a token of an answer
};

// all: everything but the first token is learned.
Example encode_conversation(const Messages& messages, const ChatTemplate& format,
                            const Tokenizer& tokenizer, bool all);

// The tokens that end an answer: end-of-text, and what the template writes after it.
std::vector<int> answer_ends(const ChatTemplate& format, const Tokenizer& tokenizer);

// The tokens of a rendered template: names of special tokens are those tokens. continues: as
// Tokenizer::encode_continuation.
std::vector<int> encode_rendered(std::string_view text, const Tokenizer& tokenizer, bool continues);

// From a record with instruction, input (optional) and output; prompt and completion; or messages.
// Throws a sentence about what is missing.
Messages to_messages(const nlohmann::json& record);

} // namespace lns
