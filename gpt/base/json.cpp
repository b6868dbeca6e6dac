#include "gpt/base/json.h"

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/terminal.h"

#include <algorithm>
#include <set>
#include <vector>

namespace lns {
namespace {

constexpr size_t max_quote = 80;

std::string shortened(const std::string& text, size_t max) {
    if (text.size() <= max) return printable(text);
    size_t end = max; // not inside a UTF-8 character
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) end--;
    return printable(text.substr(0, end)) + "…";
}

template <class Json>
Json parse(std::string_view text, const std::string& where, size_t max_bytes) {
    if (text.size() > max_bytes)
        fail(where, " has ", text.size(), " bytes, expected JSON of at most ", max_bytes);
    if (is_lfs_pointer(text))
        fail(where, " is a Git LFS pointer, not the file itself: fetch it with git lfs pull");
    if (text.find('\0') != text.npos) // the parser would stop there
        fail(where, " is not valid JSON: it has a zero byte at ", text.find('\0'));
    std::vector<std::set<std::string>> keys; // of the open objects
    auto check = [&](int depth, typename Json::parse_event_t event, Json& value) {
        using Event = typename Json::parse_event_t;
        if ((event == Event::object_start || event == Event::array_start) && depth >= json_depth)
            fail(where, " nests more than ", json_depth, " arrays and objects: it is damaged");
        if (event == Event::object_start) keys.emplace_back();
        if (event == Event::object_end) keys.pop_back();
        if (event == Event::key && !keys.back().insert(value.template get<std::string>()).second)
            fail(where, " has the key ", quoted(value), " twice in one object");
        return true;
    };
    try {
        return Json::parse(text.begin(), text.end(), check);
    } catch (const nlohmann::json::exception& error) {
        std::string why = error.what();
        why.erase(0, why.find("] ") + 2); // "[json.exception.parse_error.101] "
        if (const std::string line = "line 1, "; text.find('\n') == text.npos)
            if (const size_t at = why.find(line); at != why.npos) why.erase(at, line.size());
        fail(where, " is not valid JSON: ", shortened(why, 200));
    }
}

// Appends value to out until it is long enough. Parsed values are at most json_depth deep.
void quote(const nlohmann::json& value, std::string& out) {
    if (out.size() > max_quote) return;
    if (!value.is_structured()) {
        out += value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
        return;
    }
    out += value.is_object() ? '{' : '[';
    bool first = true;
    for (auto item = value.begin(); item != value.end(); ++item) {
        if (out.size() > max_quote) break;
        if (!std::exchange(first, false)) out += ',';
        if (value.is_object()) quote(nlohmann::json(item.key()), out), out += ':';
        quote(*item, out);
    }
    out += value.is_object() ? '}' : ']';
}

} // namespace

nlohmann::json parse_json(std::string_view text, const std::string& where, size_t max_bytes) {
    return parse<nlohmann::json>(text, where, max_bytes);
}

nlohmann::ordered_json parse_ordered_json(std::string_view text, const std::string& where,
                                          size_t max_bytes) {
    return parse<nlohmann::ordered_json>(text, where, max_bytes);
}

int each_json_line(std::string_view text, const std::string& file,
                   const std::function<void(nlohmann::json, const std::string&)>& use) {
    if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
    int line = 0;
    for (size_t begin = 0, end; begin < text.size(); begin = end + 1) {
        end = std::min(text.find('\n', begin), text.size());
        const std::string_view record = text.substr(begin, end - begin);
        line++;
        if (record.find_first_not_of(" \t\r\v\f") == record.npos) continue;
        const std::string where = cat(file, ", line ", line);
        use(parse_json(record, where), where);
    }
    return line;
}

std::string quoted(const nlohmann::json& value) {
    std::string text;
    quote(value, text);
    return shortened(text, max_quote);
}

} // namespace lns
