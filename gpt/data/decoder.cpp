#include "gpt/data/decoder.h"

#include "gpt/base/error.h"
#include "gpt/base/json.h"
#include "gpt/data/pre_tokenizer.h"
#include "gpt/data/tokenizer_files.h"

namespace lns {

using json = nlohmann::json;

namespace {

std::string joined(const std::vector<std::string>& tokens) {
    std::string text;
    for (const std::string& token : tokens) text += token;
    return text;
}

// The byte of a token such as <0x0A>; −1 if it is none.
int byte_of(const std::string& token) {
    if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
    int byte = 0;
    for (size_t i = 3; i < 5; i++) {
        const size_t digit = std::string_view("0123456789ABCDEFabcdef").find(token[i]);
        if (digit == std::string_view::npos) return -1;
        byte = byte * 16 + int(digit < 16 ? digit : digit - 6);
    }
    return byte;
}

} // namespace

Decoder::Decoder(const json& spec, const std::string& path) : exists(!spec.is_null()) {
    add(spec, path);
    limit_parts(steps.size(), "decoder", path);
    for (const Step& step : steps) limit_text(step.text, path);
}

void Decoder::add(const json& spec, const std::string& path) {
    if (spec.is_null()) return;
    const std::string type = type_of(spec);
    auto count = [&](const char* key) {
        const json& value = field(spec, key);
        if (!value.is_number_integer() || value < 0)
            fail(path, ": ", key, " of the decoder Strip is ", quoted(value), ", expected a count");
        return value.get<size_t>();
    };
    if (type == "Sequence") {
        for (const json& member : list_field(spec, "decoders", path)) add(member, path);
    } else if (type == "ByteLevel") {
        steps.push_back({.kind = Step::byte_level});
    } else if (type == "ByteFallback") {
        steps.push_back({.kind = Step::byte_fallback});
    } else if (type == "Fuse") {
        steps.push_back({.kind = Step::fuse});
    } else if (type == "Metaspace") {
        const bool prefix = bool_field(spec, "add_prefix_space", true, path) &&
                            text_of(field(spec, "prepend_scheme")) != "never";
        steps.push_back({.kind = Step::metaspace,
                         .text = text_field(spec, "replacement", path),
                         .regex = Regex::literal(text_field(spec, "replacement", path), path),
                         .first = prefix});
    } else if (type == "Replace") {
        const json& pattern = field(spec, "pattern");
        const bool is_regex = pattern.contains("Regex");
        const std::string what = text_field(pattern, is_regex ? "Regex" : "String", path);
        steps.push_back({.kind = Step::replace,
                         .text = text_field(spec, "content", path),
                         .regex = is_regex ? Regex(what, path) : Regex::literal(what, path)});
    } else if (type == "Strip") {
        Step step = {.kind = Step::strip,
                     .text = text_field(spec, "content", path),
                     .from_start = count("start"),
                     .from_end = count("stop")};
        if (step.text.empty()) fail(path, ": the content of the decoder Strip is empty");
        steps.push_back(step);
    } else {
        unsupported(path, cat("its decoder is ", description(spec)));
    }
}

void Decoder::apply(const Step& step, std::vector<std::string>& tokens) {
    std::string bytes;
    switch (step.kind) {
    case Step::byte_level:
        for (std::string& token : tokens)
            if (bytes_of_name(token, bytes)) token = bytes;
        tokens = {joined(tokens)};
        return;
    case Step::byte_fallback: {
        std::vector<std::string> out;
        bool in_bytes = false; // the last of out consists of bytes
        for (std::string& token : tokens) {
            const int byte = byte_of(token);
            if (byte < 0)
                out.push_back(std::move(token));
            else if (in_bytes)
                out.back() += char(byte);
            else
                out.emplace_back(1, char(byte));
            in_bytes = byte >= 0;
        }
        tokens = std::move(out);
        return;
    }
    case Step::fuse:
        tokens = {joined(tokens)};
        return;
    case Step::metaspace:
        for (size_t i = 0; i < tokens.size(); i++)
            tokens[i] = step.regex->replaced(tokens[i], i == 0 && step.first ? "" : " ");
        return;
    case Step::replace:
        for (std::string& token : tokens) token = step.regex->replaced(token, step.text);
        return;
    case Step::strip:
        for (std::string& token : tokens) {
            for (size_t n = 0; n < step.from_start && token.starts_with(step.text); n++)
                token.erase(0, step.text.size());
            for (size_t n = 0; n < step.from_end && token.ends_with(step.text); n++)
                token.erase(token.size() - step.text.size());
        }
        return;
    }
}

std::string Decoder::operator()(std::vector<std::string> tokens) const {
    for (const Step& step : steps) apply(step, tokens);
    if (exists) return joined(tokens);
    std::string text; // `tokenizers` puts spaces between them
    for (const std::string& token : tokens) text += (text.empty() ? "" : " ") + token;
    return text;
}

} // namespace lns
