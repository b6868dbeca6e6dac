#include "gpt/data/pre_tokenizer.h"

#include <array>

#include "gpt/base/error.h"
#include "gpt/base/json.h"
#include "gpt/data/tokenizer_files.h"
#include "gpt/data/unicode.h"

namespace lns {

using json = nlohmann::json;

namespace {

struct ByteNames {
    std::array<uint32_t, 256> name_of;
    std::array<int, 0x200> byte_of; // -1: none
    ByteNames() {
        byte_of.fill(-1);
        uint32_t next = 0x100;
        for (uint32_t b = 0; b < 256; b++) {
            const bool printable =
                (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
            name_of[b] = printable ? b : next++;
            byte_of[name_of[b]] = int(b);
        }
    }
};

const ByteNames& byte_names() {
    static const ByteNames names;
    return names;
}

} // namespace

std::string byte_name(unsigned char byte) { return utf8(byte_names().name_of[byte]); }

bool bytes_of_name(std::string_view name, std::string& bytes) {
    bytes.clear();
    const ByteNames& names = byte_names();
    for (size_t i = 0; i < name.size();) {
        const Character c = character_at(name, i);
        if (c.code >= names.byte_of.size() || names.byte_of[c.code] < 0) return false;
        bytes += char(names.byte_of[c.code]);
        i += c.length;
    }
    return true;
}

PreTokenizer::PreTokenizer(const json& spec, const std::string& path) {
    add(spec, path);
    limit_parts(steps.size(), "pre-tokenizer", path);
    for (const Step& step : steps) limit_text(step.mark, path);
    // At the end there is no need for the characters that stand for bytes.
    if (!steps.empty() && steps.back().kind == Step::names) steps.pop_back();
    for (const Step& step : steps) names |= step.kind == Step::names;
}

void PreTokenizer::add(const json& spec, const std::string& path) {
    if (spec.is_null()) return;
    const std::string type = type_of(spec);
    auto behavior_of = [&](Behavior otherwise) {
        const std::string name = text_of(field(spec, "behavior"));
        if (name.empty() && field(spec, "behavior").is_null()) return otherwise;
        // `tokenizers` writes the former, transformers the latter.
        for (const auto& [known, also, behavior] :
             {std::tuple("Isolated", "isolated", isolated),
              {"Removed", "removed", removed},
              {"Contiguous", "contiguous", contiguous},
              {"MergedWithPrevious", "merged_with_previous", merged_with_previous},
              {"MergedWithNext", "merged_with_next", merged_with_next}})
            if (name == known || name == also) return behavior;
        fail(path, ": the behavior of ", type, " is ", quoted(field(spec, "behavior")),
             ", expected Isolated, Removed, Contiguous, MergedWithPrevious or MergedWithNext");
    };
    auto split = [&](Regex regex, Behavior behavior, bool invert = false) {
        steps.push_back({.kind = Step::split,
                         .regex = std::move(regex),
                         .behavior = behavior,
                         .invert = invert,
                         .digits = type == "Digits"});
    };
    if (type == "Sequence") {
        for (const json& member : list_field(spec, "pretokenizers", path)) add(member, path);
    } else if (type == "Split") {
        const json& pattern = field(spec, "pattern");
        const Behavior behavior = behavior_of(isolated);
        const bool invert = bool_field(spec, "invert", false, path);
        const bool is_regex = pattern.contains("Regex");
        const std::string text = text_field(pattern, is_regex ? "Regex" : "String", path);
        GptSplit rule;
        if (is_regex && (invert ? behavior == removed : behavior == isolated) && rule.choose(text))
            steps.push_back({.kind = Step::rule, .gpt = rule});
        else
            split(is_regex ? Regex(text, path) : Regex::literal(text, path), behavior, invert);
    } else if (type == "Digits") {
        split(Regex(R"(\p{N})", path),
              bool_field(spec, "individual_digits", false, path) ? isolated : contiguous);
    } else if (type == "Punctuation") {
        split(Regex(R"([\p{P}$+<=>^`|~])", path), behavior_of(isolated));
    } else if (type == "Whitespace") {
        split(Regex(cat("[", rust_word, "]+|[^", rust_word, "\\s]+"), path), removed, true);
    } else if (type == "WhitespaceSplit") {
        split(Regex(R"(\s)", path), removed);
    } else if (type == "Metaspace") {
        Step step = {.kind = Step::metaspace, .mark = text_field(spec, "replacement", path)};
        const std::string scheme = text_of(field(spec, "prepend_scheme"));
        step.prepend = scheme == "first" ? first : scheme == "never" ? never : always;
        if (!scheme.empty() && scheme != "always" && step.prepend == always)
            fail(path, ": prepend_scheme is ", quoted(scheme), ", expected always, first or never");
        if (!bool_field(spec, "add_prefix_space", true, path)) step.prepend = never;
        step.words = bool_field(spec, "split", true, path);
        if (step.mark.empty()) fail(path, ": the replacement of Metaspace is empty");
        steps.push_back(step);
    } else if (type == "ByteLevel") {
        if (byte_level) unsupported(path, "its pre-tokenizer has ByteLevel twice");
        byte_level = true;
        add_prefix_space = bool_field(spec, "add_prefix_space", true, path);
        const bool splits = bool_field(spec, "use_regex", true, path);
        GptSplit rule;
        // A preceding Digits is part of the rule's implementation.
        if (splits && !*add_prefix_space && steps.size() == 1 && steps[0].digits) {
            rule.digits = steps[0].behavior == isolated ? GptSplit::each : GptSplit::runs;
            steps.clear();
        }
        if (*add_prefix_space) steps.push_back({.kind = Step::space});
        if (splits) steps.push_back({.kind = Step::rule, .gpt = rule});
        steps.push_back({.kind = Step::names});
    } else {
        unsupported(path, cat("its pre-tokenizer is ", description(spec)));
    }
}

const GptSplit* PreTokenizer::only_rule() const {
    const GptSplit* rule = nullptr;
    for (const Step& step : steps) {
        if (step.kind == Step::space) continue; // only before the text
        if (step.kind != Step::rule || rule) return nullptr;
        rule = &*step.gpt;
    }
    return rule;
}

// Calls next(begin, end) for the parts of the text that the matches and what lies between them
// give under the step's behavior.
template <class Next>
void PreTokenizer::fold(const Step& step, std::string_view text, const Next& next) {
    struct Part {
        size_t begin, end;
        bool match;
    };
    Part open = {0, 0, false}; // not yet passed on: later ones may join it
    bool any = false, previous = false;
    auto flush = [&] {
        if (any) next(open.begin, open.end);
    };
    auto add = [&](size_t begin, size_t end, bool match) {
        bool joins = false;
        switch (step.behavior) {
        case isolated:
            return next(begin, end);
        case removed:
            if (!match) next(begin, end);
            return;
        case contiguous:
            joins = any && match == previous;
            break;
        case merged_with_previous:
            joins = any && match && !previous;
            break;
        case merged_with_next:
            joins = any && open.match && !match;
            break;
        }
        if (!joins) flush();
        open = {joins ? open.begin : begin, end, match};
        any = true;
        previous = match;
    };
    size_t at = 0;
    auto found = [&](size_t begin, size_t end) {
        if (at < begin) add(at, begin, step.invert);
        add(begin, end, !step.invert);
        at = end;
    };
    step.regex->each_match(text, found);
    if (at < text.size()) add(at, text.size(), step.invert);
    flush();
}

void PreTokenizer::run(size_t k, std::string_view text, Position position, const Word& word) const {
    if (text.empty()) return;
    if (k == steps.size()) {
        if (!names) return word(text);
        std::string bytes;
        if (!bytes_of_name(text, bytes)) bytes = text;
        return word(bytes);
    }
    const Step& step = steps[k];
    const bool last = k + 1 == steps.size() && !names;
    auto next = [&](std::string_view whole, size_t begin, size_t end) {
        if (last && begin < end) return word(whole.substr(begin, end - begin));
        run(k + 1, whole.substr(begin, end - begin),
            {position.at_start && begin == 0, position.continues && begin == 0}, word);
    };
    switch (step.kind) {
    case Step::split:
        return fold(step, text, [&](size_t begin, size_t end) { next(text, begin, end); });
    case Step::rule:
        for (size_t i = 0; i < text.size();) {
            const size_t segment = step.gpt->segment_end(text, i);
            const std::string_view until = text.substr(0, segment);
            while (i < segment) {
                const size_t end = step.gpt->next_piece(until, i);
                next(text, i, end);
                i = end;
            }
        }
        return;
    case Step::space:
        if (text[0] == ' ' || position.continues) return next(text, 0, text.size());
        return run(k + 1, " " + std::string(text), position, word);
    case Step::names: {
        std::string named;
        for (char c : text) named += byte_name(static_cast<unsigned char>(c));
        return run(k + 1, named, position, word);
    }
    case Step::metaspace: {
        std::string marked;
        for (char c : text) {
            if (c == ' ')
                marked += step.mark;
            else
                marked += c;
        }
        const bool prepend = step.prepend == always || (step.prepend == first && position.at_start);
        if (prepend && !position.continues && !marked.starts_with(step.mark))
            marked.insert(0, step.mark);
        size_t begin = 0;
        // A mark begins a word; marks in a row are words of their own.
        while (step.words && begin < marked.size()) {
            const size_t end = marked.find(step.mark, begin + 1);
            if (end == marked.npos) break;
            next(marked, begin, end);
            begin = end;
        }
        return next(marked, begin, marked.size());
    }
    }
}

void PreTokenizer::operator()(std::string_view part, bool at_start, bool continues,
                              const Word& word) const {
    run(0, part, {at_start, continues}, word);
}

} // namespace lns
