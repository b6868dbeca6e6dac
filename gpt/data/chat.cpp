#include "gpt/data/chat.h"

#include <algorithm>

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/data/tokenizer_files.h"

namespace lns {

using Json = nlohmann::ordered_json;

namespace {

struct NamedTemplate {
    const char *name, *text;
};

// alpaca: the prompt of Alpaca-LoRA (github.com/tloen/alpaca-lora, templates/alpaca.json), of which
// LLM-Adapters, the source of Commonsense170K, is a descendant. chatml, llama-3: as in
// tokenizer_config.json of SmolLM2 and of Llama 3, without their system prompts.
constexpr NamedTemplate named_templates[] = {
    {"alpaca", R"({{- bos_token if add_bos_token else '' }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content + '\n\n' }}
    {%- elif message.role == 'user' %}
        {%- if loop.index0 > 0 and messages[loop.index0 - 1].role == 'assistant' %}
            {{- '\n\n' }}
        {%- elif loop.first and message.input %}
            {{- 'Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n' }}
        {%- elif loop.first %}
            {{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n' }}
        {%- endif %}
        {{- '### Instruction:\n' + message.instruction | default(message.content) + '\n\n' }}
        {%- if message.input %}
            {{- '### Input:\n' + message.input + '\n\n' }}
        {%- endif %}
    {%- elif message.role == 'assistant' %}
        {{- '### Response:\n' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('a message of the role ' + message.role + ', expected system, user or assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\n' }}
{%- endif %})"},
    {"chatml", R"({%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %})"},
    {"llama-3", R"({{- '<|begin_of_text|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %})"},
    {"plain", R"({{- bos_token if add_bos_token else '' }}
{%- for message in messages %}
    {{- message.content + (eos_token if message.role == 'assistant' else '') }}
{%- endfor %})"},
};

std::string spelled(int token, const Tokenizer& tokenizer) {
    return token < 0 ? "" : tokenizer.decode(&token, 1, Specials::spelled);
}

Json variables(const Messages& messages, const Tokenizer& tokenizer, bool prompt) {
    return {{"messages", messages},
            {"add_generation_prompt", prompt},
            {"bos_token", spelled(tokenizer.bos, tokenizer)},
            {"eos_token", spelled(tokenizer.eot(), tokenizer)},
            {"add_bos_token", tokenizer.bos >= 0}};
}

const Json& field_of(const Json& record, const char* name) {
    const auto at = record.find(name);
    if (at == record.end()) fail("there is no field '", name, "'");
    return *at;
}

std::string text_in(const Json& record, const char* name) {
    const Json& value = field_of(record, name);
    if (!value.is_string())
        fail("the field '", name, "' is ", quoted(nlohmann::json(value)), ", expected text");
    return value.get<std::string>();
}

// The text of a message's content: a string, or parts of type text.
std::string content_of(const Json& message) {
    const Json& content = field_of(message, "content");
    if (content.is_string()) return content.get<std::string>();
    std::string text;
    if (!content.is_array())
        fail("a message's content is ", quoted(nlohmann::json(content)), ", expected text");
    for (const Json& part : content) {
        if (!part.is_object() || part.value("type", "") != "text")
            fail("a part of a message's content is ", quoted(nlohmann::json(part)),
                 ", expected one of type text");
        text += text_in(part, "text");
    }
    return text;
}

Messages checked(const Json& messages) {
    if (!messages.is_array() || messages.empty())
        fail("the messages are ", quoted(nlohmann::json(messages)),
             ", expected a list of objects with role and content");
    Messages out = Json::array();
    for (const Json& message : messages) {
        if (!message.is_object())
            fail("a message is ", quoted(nlohmann::json(message)),
                 ", expected an object with role and content");
        Json copy = {{"role", text_in(message, "role")}, {"content", content_of(message)}};
        for (const auto& [key, value] : message.items())
            if (!copy.contains(key)) copy[key] = value;
        out.push_back(std::move(copy));
    }
    return out;
}

} // namespace

ChatTemplate::ChatTemplate(std::string template_name, std::string source)
    : name(std::move(template_name)), text(std::move(source)),
      jinja(std::make_shared<const Jinja>(text, "the chat template " + name)) {}

std::vector<std::string> ChatTemplate::names() {
    std::vector<std::string> all;
    for (const NamedTemplate& row : named_templates) all.emplace_back(row.name);
    return all;
}

ChatTemplate ChatTemplate::load(const std::string& name) {
    for (const NamedTemplate& row : named_templates)
        if (name == row.name) return {name, row.text};
    if (is_directory_at(name)) {
        if (auto found = in_folder(name)) return *found;
        fail(name, " has no chat template, in chat_template.jinja or tokenizer_config.json. Name "
                   "one of alpaca, chatml, llama-3, plain, or a file of Jinja");
    }
    if (!path_exists(name))
        fail("there is no chat template '", name,
             "': expected alpaca, chatml, llama-3, plain, a file of Jinja, or a folder with "
             "tokenizer_config.json");
    return {name, read_file(name)};
}

std::optional<ChatTemplate> ChatTemplate::in_folder(const std::string& folder) {
    const std::string text = chat_template_in(folder);
    return text.empty() ? std::nullopt : std::optional(ChatTemplate("of " + folder, text));
}

std::string ChatTemplate::prompt(const Messages& messages, const Tokenizer& tokenizer) const {
    return jinja->render(variables(messages, tokenizer, true)).text;
}

Jinja::Output ChatTemplate::conversation(const Messages& messages,
                                         const Tokenizer& tokenizer) const {
    Jinja::Output out = jinja->render(variables(messages, tokenizer, false));
    if (jinja->marks_generation()) return out;
    for (size_t i = 0; i < messages.size(); i++) {
        if (messages[i].value("role", "") != "assistant") continue;
        const Messages before(messages.begin(), messages.begin() + std::ptrdiff_t(i)),
            through(messages.begin(), messages.begin() + std::ptrdiff_t(i) + 1);
        const std::string start = prompt(before, tokenizer),
                          end = jinja->render(variables(through, tokenizer, false)).text;
        if (!end.starts_with(start) || !out.text.starts_with(end))
            fail("the chat template ", name, " writes message ", i + 1,
                 " otherwise when others follow it, so that its answer cannot be found: mark "
                 "answers in the template by {% generation %}");
        out.generated.emplace_back(start.size(), end.size());
    }
    return out;
}

std::vector<int> encode_rendered(std::string_view text, const Tokenizer& tokenizer,
                                 bool continues) {
    return continues ? tokenizer.encode_continuation(text, Specials::spelled)
                     : tokenizer.encode(text, Specials::spelled);
}

Example encode_conversation(const Messages& messages, const ChatTemplate& format,
                            const Tokenizer& tokenizer, bool all) {
    const Jinja::Output rendered = format.conversation(messages, tokenizer);
    Example example;
    const auto add = [&](size_t begin, size_t end, bool learned) {
        if (begin >= end) return;
        const std::vector<int> tokens = encode_rendered(
            std::string_view(rendered.text).substr(begin, end - begin), tokenizer, begin > 0);
        example.tokens.insert(example.tokens.end(), tokens.begin(), tokens.end());
        example.learned.insert(example.learned.end(), tokens.size(), learned || all);
    };
    size_t at = 0;
    for (const auto& [begin, end] : rendered.generated) {
        add(at, begin, false);
        add(begin, end, true);
        at = end;
    }
    add(at, rendered.text.size(), false);
    if (!example.learned.empty()) example.learned[0] = 0; // nothing comes before it
    return example;
}

std::vector<int> answer_ends(const ChatTemplate& format, const Tokenizer& tokenizer) {
    std::vector<int> ends;
    if (tokenizer.eot() >= 0) ends.push_back(tokenizer.eot());
    const std::string answer = "an answer";
    const Messages messages = {{{"role", "user"}, {"content", "a question"}},
                               {{"role", "assistant"}, {"content", answer}}};
    const Jinja::Output rendered = format.conversation(messages, tokenizer);
    if (rendered.generated.empty()) return ends;
    const auto [begin, end] = rendered.generated.back();
    const size_t after = rendered.text.find(answer, begin) + answer.size();
    if (after >= end) return ends;
    const std::vector<int> tokens = encode_rendered(
        std::string_view(rendered.text).substr(after, end - after), tokenizer, true);
    // A special token decodes to nothing; an ordinary one may stand in the middle of an answer.
    if (!tokens.empty() && tokenizer.decode(tokens.data(), 1).empty() &&
        std::find(ends.begin(), ends.end(), tokens[0]) == ends.end())
        ends.push_back(tokens[0]);
    return ends;
}

Messages to_messages(const nlohmann::json& given) {
    const Json record(given);
    if (!record.is_object()) fail("it is ", quoted(given), ", expected an object");
    if (record.contains("messages")) return checked(record["messages"]);
    if (record.contains("prompt") && record["prompt"].is_array()) {
        Json all = record["prompt"];
        for (const Json& message : checked(field_of(record, "completion"))) all.push_back(message);
        return checked(all);
    }
    if (record.contains("prompt"))
        return {{{"role", "user"}, {"content", text_in(record, "prompt")}},
                {{"role", "assistant"}, {"content", text_in(record, "completion")}}};
    if (!record.contains("instruction"))
        fail("it has none of the fields instruction (with output, and perhaps input), prompt (with "
             "completion), and messages");
    const std::string instruction = text_in(record, "instruction"),
                      input = record.contains("input") ? text_in(record, "input") : "";
    return {{{"role", "user"},
             {"content", instruction + (input.empty() ? "" : "\n\n" + input)},
             {"instruction", instruction},
             {"input", input}},
            {{"role", "assistant"}, {"content", text_in(record, "output")}}};
}

} // namespace lns
