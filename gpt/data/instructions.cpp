#include "gpt/data/instructions.h"

#include <algorithm>

#include "gpt/base/error.h"

namespace lns {

namespace {

constexpr size_t most_open = 64;

bool is_blank(std::string_view text) {
    return text.find_first_not_of(" \t\r\n\v\f") == std::string_view::npos;
}

} // namespace

void read_records(std::string_view text, const std::string& file,
                  const std::function<void(Record)>& use) {
    const size_t first = text.find_first_not_of(" \t\r\n\xef\xbb\xbf"); // a byte order mark, too
    if (first != std::string_view::npos && text[first] == '[') {
        nlohmann::json all = parse_json(text, file, size_t(4) << 30);
        for (size_t i = 0; i < all.size(); i++)
            use({cat(file, ", record ", i + 1), std::move(all[i])});
        return;
    }
    each_json_line(text, file, [&](nlohmann::json value, const std::string& where) {
        use({where, std::move(value)});
    });
}

Encoded encode_record(const Record& record, const ChatTemplate& format, const Tokenizer& tokenizer,
                      const InstructionOptions& options) {
    Encoded out;
    out.where = record.where;
    try {
        const Messages messages = to_messages(record.value);
        bool answered = false, any = false;
        for (const auto& message : messages) {
            if (message["role"] != "assistant") continue;
            any = true;
            answered = answered || !is_blank(message["content"].get_ref<const std::string&>());
        }
        if (!any) fail("it has no answer: none of its messages has the role assistant");
        if (!answered) {
            out.kind = Encoded::empty;
            return out;
        }
        out.example = encode_conversation(messages, format, tokenizer, options.learn_all);
    } catch (const Error& error) {
        fail(record.where, ": ", error.what());
    }
    const size_t window = size_t(options.window);
    out.cut = out.example.tokens.size() > window;
    if (out.cut) out.example.tokens.resize(window), out.example.learned.resize(window);
    const auto& learned = out.example.learned;
    if (std::find(learned.begin(), learned.end(), 1) == learned.end()) out.kind = Encoded::too_long;
    return out;
}

void Packer::add(Example example) {
    size_t best = open.size();
    for (size_t i = 0; pack && i < open.size(); i++)
        if (open[i].tokens.size() + example.tokens.size() <= size_t(window) &&
            (best == open.size() || open[i].tokens.size() > open[best].tokens.size()))
            best = i;
    if (best == open.size()) {
        open.push_back(std::move(example));
    } else {
        auto append = [](auto& to, const auto& from) {
            to.insert(to.end(), from.begin(), from.end());
        };
        append(open[best].tokens, example.tokens);
        append(open[best].learned, example.learned);
    }
    if (!pack) {
        close(0);
    } else if (open[best].tokens.size() == size_t(window)) {
        close(best);
    } else if (open.size() > most_open) {
        const auto fullest = std::max_element(open.begin(), open.end(), [](auto& a, auto& b) {
            return a.tokens.size() < b.tokens.size();
        });
        close(size_t(fullest - open.begin()));
    }
}

void Packer::close(size_t i) {
    Example full = std::move(open[i]);
    open.erase(open.begin() + std::ptrdiff_t(i));
    windows++;
    padding += size_t(window) - full.tokens.size();
    learned += uint64_t(std::count(full.learned.begin(), full.learned.end(), 1));
    full.tokens.resize(size_t(window), padding_token);
    full.learned.resize(size_t(window), 0);
    write(full);
}

void Packer::finish() {
    while (!open.empty()) close(0);
}

} // namespace lns
