#include "gpt/data/normalizer.h"

#include "gpt/base/error.h"
#include "gpt/data/tokenizer_files.h"

namespace lns {

using json = nlohmann::json;

namespace {

// By grapheme cluster where it has at most 5 bytes, else by character, as `tokenizers` does.
std::string mapped(std::string_view text, const Charsmap& map) {
    std::string out;
    for (size_t i = 0; i < text.size();) {
        if (character_at(text, i).code == Character::invalid) {
            out += text[i++];
            continue;
        }
        const size_t length = grapheme_length(text.substr(i));
        const std::string_view cluster = text.substr(i, length);
        std::string_view norm;
        if (length < 6 && map.find(cluster, norm)) {
            out += norm;
        } else {
            for (size_t k = 0, n; k < length; k += n) {
                n = character_at(cluster, k).length;
                const std::string_view c = cluster.substr(k, n);
                out += map.find(c, norm) ? norm : c;
            }
        }
        i += length;
    }
    return out;
}

} // namespace

Normalizer::Normalizer(const json& spec, const std::string& path) : path(path) {
    add(spec, path);
    limit_parts(steps.size(), "normalizer", path);
    for (const Step& step : steps) limit_text(step.content, path);
}

void Normalizer::add(const json& spec, const std::string& path) {
    if (spec.is_null()) return;
    const std::string type = type_of(spec);
    auto needs_unicode = [&] {
        if (const char* why = unicode_unavailable())
            fail(path, " has the normalizer ", type, ", which needs utf8proc: ", why);
    };
    if (type == "Sequence") {
        for (const json& member : list_field(spec, "normalizers", path)) add(member, path);
    } else if (type == "Prepend") {
        steps.push_back({.kind = Step::prepend, .content = text_field(spec, "prepend", path)});
    } else if (type == "Replace") {
        Step step = {.kind = Step::replace, .content = text_field(spec, "content", path)};
        const json& pattern = field(spec, "pattern");
        if (pattern.contains("Regex"))
            step.regex.emplace(text_field(pattern, "Regex", path), path);
        else if ((step.text = text_field(pattern, "String", path)).empty())
            fail(path, " has a normalizer that replaces the empty text, expected some characters");
        steps.push_back(step);
    } else if (type == "Strip") {
        steps.push_back({.kind = Step::strip,
                         .left = bool_field(spec, "strip_left", true, path),
                         .right = bool_field(spec, "strip_right", true, path)});
    } else if (type == "StripAccents") {
        steps.push_back({.kind = Step::replace, .regex = Regex(R"(\p{M}+)", path)});
    } else if (type == "Lowercase") {
        needs_unicode();
        steps.push_back({.kind = Step::lower});
    } else if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
        needs_unicode();
        const NormalForm form = type == "NFC"    ? NormalForm::nfc
                                : type == "NFD"  ? NormalForm::nfd
                                : type == "NFKC" ? NormalForm::nfkc
                                                 : NormalForm::nfkd;
        steps.push_back({.kind = Step::form, .normal_form = form});
    } else if (type == "Precompiled") {
        const json& table = field(spec, "precompiled_charsmap");
        if (table.is_null() || table == "") return;
        needs_unicode();
        Step step = {.kind = Step::charsmap};
        step.map.emplace(from_base64(text_field(spec, "precompiled_charsmap", path), path), path);
        steps.push_back(step);
    } else {
        unsupported(path, cat("its normalizer is ", description(spec)));
    }
}

std::string Normalizer::operator()(std::string_view text, bool continues) const {
    std::string now(text);
    for (const Step& step : steps) {
        switch (step.kind) {
        case Step::prepend:
            if (!continues && !now.empty()) now.insert(0, step.content);
            break;
        case Step::replace:
            now = step.regex ? step.regex->replaced(now, step.content)
                             : replaced(now, step.text, step.content);
            break;
        case Step::strip:
            if (step.right) now.erase(now.size() - trailing_space(now));
            if (step.left && !continues) now.erase(0, leading_space(now));
            break;
        case Step::form:
            now = lns::normal_form(now, step.normal_form);
            break;
        case Step::lower:
            now = lower_case(now);
            break;
        case Step::charsmap:
            now = mapped(now, *step.map);
            break;
        }
        if (now.size() > 100 * (text.size() + 1000))
            fail(path, " has a normalizer that makes a text more than 100 times as long");
    }
    return now;
}

} // namespace lns
