#include "gpt/data/jinja.h"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <map>
#include <memory>
#include <optional>

#include "gpt/base/error.h"
#include "gpt/data/unicode.h"

namespace lns {

using Json = nlohmann::ordered_json;

struct Jinja::Context {
    std::vector<std::map<std::string, Json>> frames; // innermost last
    Output out;
    int64_t steps = 0;

    // A template from elsewhere must end.
    void count_step() {
        if (++steps > 1'000'000 || out.text.size() > (size_t(64) << 20))
            fail("it does not end, or writes more than 64 MiB");
    }
    Json* find(const std::string& name) {
        for (auto frame = frames.rbegin(); frame != frames.rend(); ++frame)
            if (auto at = frame->find(name); at != frame->end()) return &at->second;
        return nullptr;
    }
};

namespace {

using Context = Jinja::Context;
using Flow = Jinja::Flow;
using Node = Jinja::Node;

// Cheap to copy: an expression holds its operands.
class Expression {
  public:
    Expression() = default;
    template <class F>
    Expression(F f) : call_(std::make_shared<const std::function<Json(Context&)>>(std::move(f))) {}
    Json operator()(Context& context) const { return (*call_)(context); }
    explicit operator bool() const { return bool(call_); }

  private:
    std::shared_ptr<const std::function<Json(Context&)>> call_;
};

constexpr int most_operators = 1000;   // of a tag: each is a call within the next
constexpr int deepest = 100;           // nested expressions and blocks
constexpr int64_t max_range = 100'000; // as in Jinja's sandbox

// Values

// What an unknown name has for a value.
const Json undefined(Json::value_t::discarded);

bool is_defined(const Json& value) { return !value.is_discarded(); }

bool truth(const Json& value) {
    if (value.is_boolean()) return value.get<bool>();
    if (value.is_number()) return value.get<double>() != 0;
    if (value.is_string()) return !value.get_ref<const std::string&>().empty();
    if (value.is_structured()) return !value.empty();
    return false; // null and undefined
}

const char* type_of(const Json& value) {
    return !is_defined(value)   ? "undefined"
           : value.is_null()    ? "none"
           : value.is_boolean() ? "a boolean"
           : value.is_number()  ? "a number"
           : value.is_string()  ? "a string"
           : value.is_array()   ? "a list"
                                : "a dict";
}

// Strings are sequences of characters, as in Python.
std::string strip(const std::string& text, bool left, bool right, const std::string& set) {
    return std::string(stripped(text, left, right, set));
}

std::string mapped(std::string text, int (*f)(int), size_t first = 0, size_t last = SIZE_MAX) {
    for (size_t i = first; i < std::min(last, text.size()); i++)
        if (static_cast<unsigned char>(text[i]) < 0x80) text[i] = char(f(text[i]));
    return text;
}
std::string upper(const std::string& text) { return mapped(text, std::toupper); }
std::string lower(const std::string& text) { return mapped(text, std::tolower); }
std::string capitalized(const std::string& text) {
    return mapped(mapped(text, std::tolower, 1), std::toupper, 0, 1);
}
std::string titled(std::string text) {
    bool inside = false;
    for (char& c : text) {
        const bool letter = std::isalpha(static_cast<unsigned char>(c)) || (c & 0x80);
        if (letter && !(c & 0x80)) c = char(inside ? std::tolower(c) : std::toupper(c));
        inside = letter;
    }
    return text;
}

std::string replace(const std::string& text, const std::string& from, const std::string& to) {
    if (from.empty()) fail("replace() of an empty string is not supported");
    return replaced(text, from, to);
}

Json split(const std::string& text, const std::string& separator) {
    Json parts = Json::array();
    if (separator.empty()) { // at white space
        std::string word;
        for (std::string_view character : characters(text)) {
            if (!stripped(character).empty())
                word += character;
            else if (!word.empty())
                parts.push_back(std::exchange(word, ""));
        }
        if (!word.empty()) parts.push_back(word);
        return parts;
    }
    for (size_t at = 0;;) {
        const size_t next = text.find(separator, at);
        parts.push_back(text.substr(at, next - at));
        if (next == std::string::npos) return parts;
        at = next + separator.size();
    }
}

// As Python's repr and str.
std::string float_text(double x) {
    if (!std::isfinite(x)) return std::isnan(x) ? "nan" : x > 0 ? "inf" : "-inf";
    return Json(x).dump();
}
std::string repr(const Json& value);
std::string str(const Json& value) {
    if (!is_defined(value)) return "";
    if (value.is_string()) return value.get<std::string>();
    return repr(value);
}
std::string repr(const Json& value) {
    if (value.is_null()) return "None";
    if (value.is_boolean()) return value.get<bool>() ? "True" : "False";
    if (value.is_number_float()) return float_text(value.get<double>());
    if (value.is_string()) {
        const std::string& text = value.get_ref<const std::string&>();
        const bool has_single = text.find('\'') != std::string::npos;
        const char quote = has_single && text.find('"') == std::string::npos ? '"' : '\'';
        std::string out(1, quote);
        for (char c : text) {
            if (c == '\n')
                out += "\\n";
            else if (c == '\t')
                out += "\\t";
            else if (c == '\r')
                out += "\\r";
            else if (c == '\\' || c == quote)
                out += std::string("\\") + c;
            else
                out += c;
        }
        return out + quote;
    }
    if (!value.is_structured()) return value.dump();
    std::string out;
    for (const auto& [key, item] : value.items())
        out += (out.empty() ? "" : ", ") + (value.is_object() ? repr(Json(key)) + ": " : "") +
               repr(item);
    return value.is_object() ? "{" + out + "}" : "[" + out + "]";
}

// As json.dumps(value, ensure_ascii=False).
std::string json_text(const Json& value, int indent) {
    const auto replace = Json::error_handler_t::replace;
    if (indent >= 0) return value.dump(indent, ' ', false, replace);
    if (!value.is_structured()) return value.dump(-1, ' ', false, replace);
    std::string out;
    for (const auto& [key, item] : value.items())
        out += (out.empty() ? "" : ", ") +
               (value.is_object() ? Json(key).dump(-1, ' ', false, replace) + ": " : "") +
               json_text(item, indent);
    return value.is_object() ? "{" + out + "}" : "[" + out + "]";
}

const std::string& text_of(const Json& value, const char* what) {
    if (!value.is_string()) fail(what, " needs a string, not ", type_of(value));
    return value.get_ref<const std::string&>();
}

int64_t whole(const Json& value, const char* what) {
    if (!value.is_number_integer()) fail(what, " needs a whole number, not ", type_of(value));
    return value.get<int64_t>();
}

// What a loop, list() or join() goes through.
std::vector<Json> items_of(const Json& value, const char* what) {
    std::vector<Json> items;
    if (value.is_string())
        for (std::string_view c : characters(value.get_ref<const std::string&>()))
            items.emplace_back(std::string(c));
    else if (value.is_object())
        for (const auto& item : value.items()) items.emplace_back(item.key());
    else if (value.is_array())
        items.assign(value.begin(), value.end());
    else if (is_defined(value))
        fail(what, " needs a list, a dict or a string, not ", type_of(value));
    return items;
}

bool contains(const Json& whole, const Json& part) {
    if (whole.is_string())
        return whole.get_ref<const std::string&>().find(text_of(part, "'in' a string")) !=
               std::string::npos;
    const std::vector<Json> items = items_of(whole, "'in'");
    return std::find(items.begin(), items.end(), part) != items.end();
}

Json item(const Json& value, const Json& key) {
    if (!is_defined(value)) fail("an undefined value has no item ", repr(key));
    if (value.is_object() && key.is_string()) {
        const auto at = value.find(key.get_ref<const std::string&>());
        return at == value.end() ? undefined : *at;
    }
    if ((value.is_array() || value.is_string()) && key.is_number_integer()) {
        const std::vector<Json> items = items_of(value, "an index");
        int64_t i = key.get<int64_t>();
        if (i < 0) i += int64_t(items.size());
        return i < 0 || i >= int64_t(items.size()) ? undefined : items[size_t(i)];
    }
    return undefined;
}

Json slice(const Json& value, const Json& from, const Json& to, const Json& by) {
    const std::vector<Json> items = items_of(value, "a slice");
    const int64_t n = int64_t(items.size()), step = by.is_null() ? 1 : whole(by, "a slice");
    if (step == 0) fail("a slice has a step of 0");
    auto bound = [&](const Json& given, int64_t missing) {
        if (given.is_null()) return missing;
        const int64_t i = whole(given, "a slice");
        return std::clamp<int64_t>(i < 0 ? i + n : i, step > 0 ? 0 : -1, step > 0 ? n : n - 1);
    };
    const int64_t begin = bound(from, step > 0 ? 0 : n - 1), end = bound(to, step > 0 ? n : -1);
    Json list = Json::array();
    std::string text;
    for (int64_t i = begin; step > 0 ? i < end : i > end; i += step) {
        if (value.is_string())
            text += items[size_t(i)].get<std::string>();
        else
            list.push_back(items[size_t(i)]);
    }
    return value.is_string() ? Json(text) : list;
}

// Booleans count as 0 and 1.
Json number_of(const Json& value) {
    return value.is_boolean() ? Json(int64_t(value.get<bool>())) : value;
}

Json arithmetic(const std::string& op, const Json& left, const Json& right) {
    const Json a = number_of(left), b = number_of(right);
    if (op == "+" && a.is_string() && b.is_string())
        return a.get<std::string>() + b.get<std::string>();
    if (op == "+" && a.is_array() && b.is_array()) {
        Json all = a;
        all.insert(all.end(), b.begin(), b.end());
        return all;
    }
    if (op == "*" && a.is_string() && b.is_number_integer()) {
        const int64_t n = std::max<int64_t>(0, b.get<int64_t>());
        const std::string& text = a.get_ref<const std::string&>();
        if (n > 0 && text.size() > size_t(1 << 20) / size_t(n))
            fail("a string is repeated too often");
        std::string out;
        for (int64_t i = 0; i < n; i++) out += text;
        return out;
    }
    auto number = [](const Json& x) { return x.is_number() || x.is_boolean(); };
    if (!number(a) || !number(b)) fail("'", op, "' between ", type_of(a), " and ", type_of(b));
    if (a.is_number_float() || b.is_number_float() || op == "/") {
        const double x = a.get<double>(), y = b.get<double>();
        if (y == 0 && (op == "/" || op == "//" || op == "%")) fail("a division by zero");
        return op == "+"    ? x + y
               : op == "-"  ? x - y
               : op == "*"  ? x * y
               : op == "/"  ? x / y
               : op == "//" ? std::floor(x / y)
                            : x - y * std::floor(x / y);
    }
    // In __int128 nothing overflows.
    const __int128 x = a.get<int64_t>(), y = b.get<int64_t>();
    if (y == 0 && (op == "//" || op == "%")) fail("a division by zero");
    __int128 quotient = y == 0 ? 0 : x / y;
    if (y != 0 && x % y != 0 && (x < 0) != (y < 0)) quotient--; // rounded down, as in Python
    const __int128 z = op == "+"    ? x + y
                       : op == "-"  ? x - y
                       : op == "*"  ? x * y
                       : op == "//" ? quotient
                                    : x - quotient * y;
    if (z > INT64_MAX || z < INT64_MIN) fail("a number is too large");
    return int64_t(z);
}

bool compare(const std::string& op, const Json& left, const Json& right) {
    const Json a = number_of(left), b = number_of(right);
    if (op == "==") return is_defined(a) == is_defined(b) && (!is_defined(a) || a == b);
    if (op == "!=") return !compare("==", a, b);
    if (op == "in") return contains(b, a);
    if (op == "not in") return !contains(b, a);
    if (!(a.is_number() && b.is_number()) && !(a.is_string() && b.is_string()))
        fail("'", op, "' between ", type_of(a), " and ", type_of(b));
    return op == "<" ? a < b : op == ">" ? a > b : op == "<=" ? a <= b : a >= b;
}

// Calls

struct Arguments {
    std::vector<Json> values;
    std::map<std::string, Json> named;

    // The argument at a position or of a name, else the default.
    Json get(size_t i, const char* name, const Json& missing = nullptr) const {
        if (i < values.size()) return values[i];
        const auto at = named.find(name);
        return at == named.end() ? missing : at->second;
    }
};

Json method(const Json& value, const std::string& name, const Arguments& args) {
    auto text_argument = [&](size_t i) { return text_of(args.get(i, ""), name.c_str()); };
    if (value.is_string()) {
        const std::string& text = value.get_ref<const std::string&>();
        const Json set = args.get(0, "chars");
        const std::string chars = set.is_string() ? set.get<std::string>() : "";
        if (name == "strip") return strip(text, true, true, chars);
        if (name == "lstrip") return strip(text, true, false, chars);
        if (name == "rstrip") return strip(text, false, true, chars);
        if (name == "upper") return upper(text);
        if (name == "lower") return lower(text);
        if (name == "title") return titled(text);
        if (name == "capitalize") return capitalized(text);
        if (name == "startswith") return text.rfind(text_argument(0), 0) == 0;
        if (name == "endswith") {
            const std::string end = text_argument(0);
            return text.size() >= end.size() &&
                   text.compare(text.size() - end.size(), end.size(), end) == 0;
        }
        if (name == "split" && args.values.size() <= 1) return split(text, chars);
        if (name == "replace" && args.values.size() == 2)
            return replace(text, text_argument(0), text_argument(1));
        if (name == "join") {
            std::string out;
            const std::vector<Json> parts = items_of(args.get(0, ""), "join()");
            for (size_t i = 0; i < parts.size(); i++)
                out += (i ? text : "") + text_of(parts[i], "join()");
            return out;
        }
    }
    if (value.is_object()) {
        if (name == "get") {
            const Json found = item(value, args.get(0, "key"));
            return is_defined(found) ? found : args.get(1, "default");
        }
        Json list = Json::array();
        if (name == "items" || name == "keys" || name == "values") {
            for (const auto& [key, item] : value.items())
                list.push_back(name == "items"  ? Json::array({key, item})
                               : name == "keys" ? Json(key)
                                                : item);
            return list;
        }
    }
    fail("there is no method ", name, "() of ", type_of(value), " here");
}

bool test(const std::string& name, const Json& value, const std::optional<Json>& argument) {
    if (name == "defined") return is_defined(value);
    if (name == "undefined") return !is_defined(value);
    if (name == "none") return value.is_null();
    if (name == "true") return value == Json(true);
    if (name == "false") return value == Json(false);
    if (name == "boolean") return value.is_boolean();
    if (name == "string") return value.is_string();
    if (name == "number") return value.is_number() || value.is_boolean();
    if (name == "integer") return value.is_number_integer();
    if (name == "float") return value.is_number_float();
    if (name == "mapping") return value.is_object();
    if (name == "iterable" || name == "sequence") return value.is_string() || value.is_structured();
    if (name == "odd" || name == "even")
        return (whole(value, name.c_str()) % 2 != 0) == (name == "odd");
    if (argument) {
        if (name == "equalto" || name == "eq" || name == "==")
            return compare("==", value, *argument);
        if (name == "in") return contains(*argument, value);
        if (name == "divisibleby") return arithmetic("%", value, *argument) == Json(0);
    }
    fail("the test '", name, "' is not supported");
}

Json filter(const std::string& name, const Json& value, const Arguments& args) {
    if (name == "trim") return strip(str(value), true, true, str(args.get(0, "chars", "")));
    if (name == "upper") return upper(str(value));
    if (name == "lower") return lower(str(value));
    if (name == "title") return titled(str(value));
    if (name == "capitalize") return capitalized(str(value));
    if (name == "string") return str(value);
    if (name == "safe" || name == "e" || name == "escape") return value;
    if (name == "length" || name == "count") return items_of(value, "length").size();
    if (name == "list") return Json(items_of(value, "list"));
    if (name == "first" || name == "last") {
        const std::vector<Json> items = items_of(value, name.c_str());
        return items.empty() ? undefined : name == "first" ? items.front() : items.back();
    }
    if (name == "reverse") {
        std::vector<Json> items = items_of(value, "reverse");
        std::reverse(items.begin(), items.end());
        return Json(items);
    }
    if (name == "join") {
        std::string out;
        const std::string between = str(args.get(0, "d", ""));
        for (bool first = true; const Json& part : items_of(value, "join"))
            out += (std::exchange(first, false) ? "" : between) + str(part);
        return out;
    }
    if (name == "replace")
        return replace(str(value), text_of(args.get(0, "old"), "replace"),
                       text_of(args.get(1, "new"), "replace"));
    if (name == "default" || name == "d") {
        const bool falsy = truth(args.get(1, "boolean", false)) && !truth(value);
        return !is_defined(value) || falsy ? args.get(0, "default_value", "") : value;
    }
    if (name == "tojson") {
        const Json indent = args.get(0, "indent");
        return json_text(value, indent.is_null() ? -1 : int(whole(indent, "tojson")));
    }
    if (name == "int") {
        if (value.is_number()) return int64_t(value.get<double>());
        const std::string text = str(value);
        char* end;
        const int64_t number = std::strtoll(text.c_str(), &end, 10);
        return *end || text.empty() ? args.get(0, "default", 0) : Json(number);
    }
    if (name == "abs" && value.is_number()) return value < 0 ? arithmetic("-", 0, value) : value;
    if (name == "selectattr" || name == "rejectattr" || (name == "map" && args.values.empty())) {
        const std::string attribute =
            text_of(name == "map" ? args.get(9, "attribute") : args.get(0, ""), name.c_str());
        Json chosen = Json::array();
        for (const Json& object : items_of(value, name.c_str())) {
            const Json x = item(object, attribute);
            if (name == "map") {
                chosen.push_back(x);
                continue;
            }
            const std::optional<Json> argument =
                args.values.size() > 2 ? std::optional<Json>(args.values[2]) : std::nullopt;
            const bool passes = args.values.size() > 1
                                    ? test(text_of(args.values[1], name.c_str()), x, argument)
                                    : truth(x);
            if (passes == (name == "selectattr")) chosen.push_back(object);
        }
        return chosen;
    }
    if (name == "items") return is_defined(value) ? method(value, "items", {}) : Json::array();
    fail("the filter ", name, " is not supported");
}

Json call(const std::string& name, const Arguments& args) {
    if (name == "namespace") {
        Json object = Json::object();
        for (const auto& [key, value] : args.named) object[key] = value;
        return object;
    }
    if (name == "dict") return call("namespace", args);
    if (name == "range") {
        const bool one = args.values.size() == 1;
        const int64_t begin = one ? 0 : whole(args.get(0, ""), "range()"),
                      end = whole(args.get(one ? 0 : 1, ""), "range()"),
                      step = whole(args.get(2, "", 1), "range()");
        if (step == 0) fail("range() has a step of 0");
        Json list = Json::array();
        for (__int128 i = begin; step > 0 ? i < end : i > end; i += step) {
            if (int64_t(list.size()) == max_range)
                fail("range() has more than ", max_range, " items");
            list.push_back(int64_t(i));
        }
        return list;
    }
    if (name == "raise_exception") fail(str(args.get(0, "message")));
    if (name == "strftime_now") {
        const std::time_t now = std::time(nullptr);
        struct tm local {};
        localtime_r(&now, &local);
        char text[256];
        return std::string(
            text, std::strftime(text, sizeof text,
                                text_of(args.get(0, "format"), "strftime_now()").c_str(), &local));
    }
    fail("there is no function ", name, "() here");
}

// From text to tokens

struct Token {
    enum Kind { text, print, block, name, number, string, symbol, end } kind;
    std::string value; // text; of print and block tags: what is inside
    int line;
};

bool starts(std::string_view text, size_t at, std::string_view what) {
    return text.substr(at, what.size()) == what;
}

// The end of a tag that begins at `at`, outside of string literals.
size_t tag_end(std::string_view text, size_t at, std::string_view closing) {
    for (char quote = 0; at < text.size(); at++) {
        if (quote) {
            if (text[at] == '\\')
                at++;
            else if (text[at] == quote)
                quote = 0;
        } else if (starts(text, at, closing)) {
            return at;
        } else if (text[at] == '"' || text[at] == '\'') {
            quote = text[at];
        }
    }
    return std::string_view::npos;
}

// Text and tags, with white space removed as '-', trim_blocks and lstrip_blocks say.
std::vector<Token> split_tags(std::string_view text) {
    std::vector<Token> tokens;
    if (!text.empty() && text.back() == '\n') text.remove_suffix(1);
    int line = 1;
    size_t at = 0;
    bool strip_next = false, trim_newline = false;
    while (at <= text.size()) {
        size_t open = at;
        while (open < text.size() && !starts(text, open, "{{") && !starts(text, open, "{%") &&
               !starts(text, open, "{#"))
            open++;
        std::string data(text.substr(at, open - at));
        const int data_line = line;
        line += int(std::count(data.begin(), data.end(), '\n'));
        if (strip_next)
            data = strip(data, true, false, "");
        else if (trim_newline && data.rfind("\r\n", 0) == 0)
            data.erase(0, 2);
        else if (trim_newline && data.rfind('\n', 0) == 0)
            data.erase(0, 1);
        if (open >= text.size()) {
            tokens.push_back({Token::text, data, data_line});
            break;
        }
        const char kind = text[open + 1];
        const char sign = open + 2 < text.size() ? text[open + 2] : ' ';
        if (sign == '-') {
            data = strip(data, false, true, "");
        } else if (sign != '+' && kind != '{') { // lstrip_blocks
            const size_t start = data.find_last_not_of(" \t");
            const bool first_of_line = start == std::string::npos
                                           ? at == 0 || text[at - 1] == '\n' ||
                                                 (data.size() < open - at) // a newline was trimmed
                                           : data[start] == '\n';
            if (first_of_line) data.erase(start == std::string::npos ? 0 : start + 1);
        }
        tokens.push_back({Token::text, data, data_line});

        const std::string closing = kind == '{' ? "}}" : kind == '%' ? "%}" : "#}";
        const size_t inside = open + 2 + (sign == '-' || sign == '+');
        const size_t close =
            kind == '#' ? text.find(closing, inside) : tag_end(text, inside, closing);
        if (close == std::string_view::npos)
            fail("line ", line, ": '", text.substr(open, 2), "' is not closed by '", closing, "'");
        std::string body(text.substr(inside, close - inside));
        strip_next = !body.empty() && body.back() == '-';
        const bool keep_newline = !body.empty() && body.back() == '+' && kind != '{';
        if (strip_next || keep_newline) body.pop_back();
        trim_newline = kind != '{' && !keep_newline;
        if (kind != '#') tokens.push_back({kind == '{' ? Token::print : Token::block, body, line});
        line += int(std::count(text.begin() + long(open), text.begin() + long(close), '\n'));
        at = close + 2;
    }
    return tokens;
}

std::vector<Token> split_expression(const std::string& text, int line) {
    std::vector<Token> tokens;
    for (size_t at = 0; at < text.size();) {
        const char c = text[at];
        const auto byte = static_cast<unsigned char>(c);
        if (c == '\n') line++;
        if (std::isspace(byte)) {
            at++;
        } else if (std::isalpha(byte) || c == '_') {
            size_t end = at;
            while (end < text.size() &&
                   (std::isalnum(static_cast<unsigned char>(text[end])) || text[end] == '_'))
                end++;
            tokens.push_back({Token::name, text.substr(at, end - at), line});
            at = end;
        } else if (std::isdigit(byte)) {
            size_t end = at;
            while (end < text.size() && std::isdigit(static_cast<unsigned char>(text[end]))) end++;
            if (end + 1 < text.size() && text[end] == '.' &&
                std::isdigit(static_cast<unsigned char>(text[end + 1])))
                for (end++;
                     end < text.size() && std::isdigit(static_cast<unsigned char>(text[end]));)
                    end++;
            tokens.push_back({Token::number, text.substr(at, end - at), line});
            at = end;
        } else if (c == '"' || c == '\'') {
            std::string value;
            size_t end = at + 1;
            for (; end < text.size() && text[end] != c; end++) {
                if (text[end] != '\\' || end + 1 == text.size()) {
                    value += text[end];
                    continue;
                }
                const char escaped = text[++end];
                const size_t known = std::string_view("ntr\\'\"").find(escaped);
                if (known == std::string_view::npos)
                    fail("line ", line, ": the escape \\", escaped, " is not supported");
                value += "\n\t\r\\'\""[known];
            }
            if (end >= text.size()) fail("line ", line, ": a string is not closed");
            tokens.push_back({Token::string, value, line});
            at = end + 1;
        } else {
            std::string symbol(1, c);
            for (const char* two : {"==", "!=", "<=", ">=", "//"})
                if (starts(text, at, two)) symbol = two;
            if (std::string_view("+-*/%~=<>!()[]{}.,:|").find(c) == std::string_view::npos ||
                symbol == "!")
                fail("line ", line, ": '", c, "' does not belong in an expression");
            tokens.push_back({Token::symbol, symbol, line});
            at += symbol.size();
        }
    }
    tokens.push_back({Token::end, "", line});
    return tokens;
}

// From tokens to functions

struct Parser {
    std::vector<Token> tags;
    size_t tag = 0;
    std::vector<Token> tokens = {}; // of the current tag
    size_t at = 0;
    int depth = 0;
    int operators = 0; // of the current tag
    bool marks_generation = false;

    // Chains such as 1 + 1 + ... nest as deeply as parentheses.
    void count_operator() {
        if (++operators > most_operators)
            fail("line ", peek().line, ": a tag has more than ", most_operators, " operators");
    }

    struct Deeper {
        int& depth;
        Deeper(int& depth, int line) : depth(depth) {
            if (++depth > deepest)
                fail("line ", line, ": more than ", deepest, " levels are nested");
        }
        ~Deeper() { depth--; }
    };

    const Token& peek() const { return tokens[at]; }
    bool is(std::string_view value) const {
        return (peek().kind == Token::symbol || peek().kind == Token::name) &&
               peek().value == value;
    }
    bool accept(std::string_view value) {
        if (!is(value)) return false;
        at++;
        return true;
    }
    void expect(std::string_view value) {
        if (!accept(value)) unexpected(cat("'", value, "'"));
    }
    [[noreturn]] void unexpected(const std::string& wanted) const {
        fail("line ", peek().line, ": ",
             peek().kind == Token::end ? "the tag ends" : cat("'", peek().value, "' was found"),
             ", expected ", wanted);
    }
    std::string name() {
        if (peek().kind != Token::name) unexpected("a name");
        return tokens[at++].value;
    }
    void end_of_tag() const {
        if (peek().kind != Token::end) unexpected("the end of the tag");
    }
    static bool is_keyword(const std::string& name) {
        for (const char* word : {"and", "or", "not", "if", "else", "in", "is"})
            if (name == word) return true;
        return false;
    }

    // a if c else b
    Expression expression() {
        const Deeper deeper(depth, peek().line);
        Expression value = either();
        while (accept("if")) {
            count_operator();
            Expression condition = either();
            Expression other = accept("else") ? expression() : [](Context&) { return undefined; };
            value = [=](Context& c) { return truth(condition(c)) ? value(c) : other(c); };
        }
        return value;
    }
    Expression either() {
        Expression a = both();
        while (accept("or")) {
            count_operator();
            Expression b = both();
            a = [=](Context& c) {
                Json value = a(c);
                return truth(value) ? value : b(c);
            };
        }
        return a;
    }
    Expression both() {
        Expression a = negation();
        while (accept("and")) {
            count_operator();
            Expression b = negation();
            a = [=](Context& c) {
                Json value = a(c);
                return truth(value) ? b(c) : value;
            };
        }
        return a;
    }
    Expression negation() {
        if (!accept("not")) return comparison();
        const Deeper deeper(depth, peek().line);
        Expression a = negation();
        return [=](Context& c) { return Json(!truth(a(c))); };
    }
    // a < b < c compares both pairs.
    Expression comparison() {
        const Expression first = sum();
        std::vector<std::pair<std::string, Expression>> rest;
        while (true) {
            std::string op;
            for (const char* known : {"==", "!=", "<=", ">=", "<", ">", "in"})
                if (op.empty() && accept(known)) op = known;
            if (op.empty() && is("not") && tokens[at + 1].value == "in") op = "not in", at += 2;
            if (op.empty()) break;
            rest.emplace_back(op, sum());
        }
        if (rest.empty()) return first;
        return [=](Context& c) {
            Json a = first(c);
            for (const auto& [op, expression] : rest) {
                Json b = expression(c);
                if (!compare(op, a, b)) return Json(false);
                a = std::move(b);
            }
            return Json(true);
        };
    }
    template <class Next> Expression binary(std::initializer_list<const char*> ops, Next next) {
        Expression a = next();
        while (true) {
            std::string op;
            for (const char* known : ops)
                if (op.empty() && accept(known)) op = known;
            if (op.empty()) return a;
            count_operator();
            Expression b = next();
            a = [=](Context& c) {
                const Json x = a(c), y = b(c);
                return op == "~" ? Json(str(x) + str(y)) : arithmetic(op, x, y);
            };
        }
    }
    Expression sum() {
        return binary({"+", "-"}, [&] {
            return binary({"~"}, [&] {
                return binary({"*", "//", "/", "%"}, [&] { return unary(true); });
            });
        });
    }
    Expression unary(bool filters) {
        const Deeper deeper(depth, peek().line);
        Expression value;
        if (accept("-")) {
            Expression a = unary(false);
            value = [=](Context& c) { return arithmetic("-", 0, a(c)); };
        } else if (accept("+")) {
            value = unary(false);
        } else {
            value = primary();
        }
        value = postfix(std::move(value));
        return filters ? filtered(std::move(value)) : value;
    }
    Expression primary() {
        const Token token = peek();
        if (token.kind == Token::number) {
            at++;
            const Json value = Json::parse(token.value, nullptr, false);
            if (value.is_discarded() || value > Json(INT64_MAX))
                fail("line ", token.line, ": the number ", token.value, " is not supported");
            return [=](Context&) { return value; };
        }
        if (token.kind == Token::string) {
            std::string value;
            while (peek().kind == Token::string) value += tokens[at++].value; // "a" "b" is "ab"
            return [value = Json(value)](Context&) { return value; };
        }
        if (token.kind == Token::name && !is_keyword(token.value)) {
            at++;
            const std::string& word = token.value;
            if (word == "true" || word == "True") return [](Context&) { return Json(true); };
            if (word == "false" || word == "False") return [](Context&) { return Json(false); };
            if (word == "none" || word == "None") return [](Context&) { return Json(nullptr); };
            if (is("(")) {
                auto args = arguments();
                return [=](Context& c) { return call(word, args(c)); };
            }
            return [=](Context& c) {
                c.count_step();
                const Json* value = c.find(word);
                return value ? *value : undefined;
            };
        }
        if (accept("(")) {
            Expression value = expression();
            if (!is(",")) {
                expect(")");
                return value;
            }
            at++;
            return list(")", {value});
        }
        if (accept("[")) return list("]", {});
        if (accept("{")) return dict();
        unexpected("a value");
    }
    Expression list(const char* closing, std::vector<Expression> items) {
        while (!accept(closing)) {
            items.push_back(expression());
            if (!is(closing)) expect(",");
        }
        return [=](Context& c) {
            Json values = Json::array();
            for (const Expression& item : items) values.push_back(item(c));
            return values;
        };
    }
    Expression dict() {
        std::vector<std::pair<Expression, Expression>> items;
        while (!accept("}")) {
            Expression key = expression();
            expect(":");
            items.emplace_back(key, expression());
            if (!is("}")) expect(",");
        }
        return [=](Context& c) {
            Json values = Json::object();
            for (const auto& [key, value] : items) values[text_of(key(c), "a key")] = value(c);
            return values;
        };
    }
    std::function<Arguments(Context&)> arguments() {
        std::vector<std::pair<std::string, Expression>> given; // "": by position
        expect("(");
        while (!accept(")")) {
            std::string key;
            if (peek().kind == Token::name && tokens[at + 1].value == "=" &&
                tokens[at + 1].kind == Token::symbol)
                key = name(), expect("=");
            given.emplace_back(key, expression());
            if (!is(")")) expect(",");
        }
        return [=](Context& c) {
            Arguments args;
            for (const auto& [key, value] : given) {
                if (key.empty())
                    args.values.push_back(value(c));
                else
                    args.named[key] = value(c);
            }
            return args;
        };
    }
    Expression postfix(Expression value) {
        for (;; count_operator()) {
            if (accept(".")) {
                const std::string key = name();
                if (is("(")) {
                    auto args = arguments();
                    value = [=](Context& c) {
                        c.count_step();
                        return method(value(c), key, args(c));
                    };
                } else {
                    value = [=](Context& c) {
                        const Json object = value(c);
                        if (!is_defined(object)) fail("an undefined value has no attribute ", key);
                        return item(object, key);
                    };
                }
            } else if (accept("[")) {
                value = subscript(value);
            } else {
                return value;
            }
        }
    }
    Expression subscript(const Expression& value) {
        Expression part[3];
        int parts = 0, colons = 0;
        while (!accept("]")) {
            if (accept(":")) {
                if (++colons == 3) unexpected("']'");
            } else {
                if (part[colons]) unexpected("']'");
                part[colons] = expression(), parts++;
            }
        }
        if (colons == 0 && parts == 0) unexpected("an index");
        const Expression from = part[0], to = part[1], by = part[2];
        if (colons == 0) return [=](Context& c) { return item(value(c), from(c)); };
        return [=](Context& c) {
            return slice(value(c), from ? from(c) : Json(), to ? to(c) : Json(),
                         by ? by(c) : Json());
        };
    }
    Expression filtered(Expression value) {
        for (;; count_operator()) {
            if (accept("|")) {
                const std::string key = name();
                std::function<Arguments(Context&)> args = [](Context&) { return Arguments(); };
                if (is("(")) args = arguments();
                value = [=](Context& c) {
                    c.count_step();
                    return filter(key, value(c), args(c));
                };
            } else if (accept("is")) {
                const bool negated = accept("not");
                const std::string key = name();
                Expression argument;
                if (accept("(")) {
                    argument = expression();
                    expect(")");
                } else if (peek().kind == Token::string || peek().kind == Token::number ||
                           is("[") || (peek().kind == Token::name && !is_keyword(peek().value))) {
                    argument = postfix(primary());
                }
                value = [=](Context& c) {
                    const Json x = value(c);
                    const std::optional<Json> y =
                        argument ? std::optional<Json>(argument(c)) : std::nullopt;
                    return Json(test(key, x, y) != negated);
                };
            } else {
                return value;
            }
        }
    }

    // Statements

    // Nodes up to a block tag that begins with one of `ends`, which becomes the current tag.
    Node nodes(const std::vector<std::string>& ends, int opened_in_line) {
        std::vector<Node> all;
        for (; tag < tags.size(); tag++) {
            const Token& token = tags[tag];
            if (token.kind == Token::text) {
                if (token.value.empty()) continue;
                all.push_back([text = token.value](Context& c) {
                    c.out.text += text;
                    c.count_step();
                    return Flow::next;
                });
                continue;
            }
            tokens = split_expression(token.value, token.line), at = 0, operators = 0;
            if (token.kind == Token::print) {
                Expression value = expression();
                end_of_tag();
                all.push_back([=](Context& c) {
                    c.out.text += str(value(c));
                    c.count_step();
                    return Flow::next;
                });
                continue;
            }
            if (peek().kind == Token::name &&
                std::find(ends.begin(), ends.end(), peek().value) != ends.end())
                return sequence(std::move(all));
            all.push_back(statement());
        }
        if (!ends.empty()) fail("line ", opened_in_line, ": the block has no '", ends.back(), "'");
        return sequence(std::move(all));
    }
    static Node sequence(std::vector<Node> all) {
        return [all = std::move(all)](Context& c) {
            for (const Node& node : all)
                if (const Flow flow = node(c); flow != Flow::next) return flow;
            return Flow::next;
        };
    }
    // The body of a block up to one of `ends`; returns that word.
    Node body(const std::vector<std::string>& ends, std::string& end) {
        const int line = tags[tag].line;
        tag++;
        Node node = nodes(ends, line);
        end = name();
        return node;
    }
    Node statement() {
        const int line = peek().line;
        const Deeper deeper(depth, line);
        const std::string word = name();
        if (word == "if") return condition();
        if (word == "for") return loop();
        if (word == "set") return assignment();
        if (word == "break" || word == "continue") {
            end_of_tag();
            const Flow flow = word == "break" ? Flow::leave_loop : Flow::next_round;
            return [=](Context&) { return flow; };
        }
        if (word == "generation") {
            end_of_tag();
            marks_generation = true;
            std::string end;
            Node inside = body({"endgeneration"}, end);
            end_of_tag();
            return [=](Context& c) {
                const size_t begin = c.out.text.size();
                const Flow flow = inside(c);
                c.out.generated.emplace_back(begin, c.out.text.size());
                return flow;
            };
        }
        fail("line ", line, ": the statement '", word, "' is not supported");
    }
    Node condition() {
        const Expression value = expression();
        end_of_tag();
        std::string end;
        const Node yes = body({"elif", "else", "endif"}, end);
        Node no = [](Context&) { return Flow::next; };
        if (end == "elif") {
            const Deeper deeper(depth, peek().line);
            no = condition();
        } else if (end == "else") {
            end_of_tag();
            no = body({"endif"}, end);
            end_of_tag();
        } else {
            end_of_tag();
        }
        return [=](Context& c) { return truth(value(c)) ? yes(c) : no(c); };
    }
    std::vector<std::string> targets() {
        std::vector<std::string> names = {name()};
        while (accept(",")) names.push_back(name());
        return names;
    }
    static void assign(Context& c, const std::vector<std::string>& names, const Json& value) {
        if (names.size() == 1) {
            c.frames.back()[names[0]] = value;
            return;
        }
        const std::vector<Json> items = items_of(value, "an assignment to several names");
        if (items.size() != names.size())
            fail(items.size(), " values for ", names.size(), " names");
        for (size_t i = 0; i < items.size(); i++) c.frames.back()[names[i]] = items[i];
    }
    Node loop() {
        const std::vector<std::string> names = targets();
        expect("in");
        const Expression values = either(); // without the inline if, which is the loop's
        const Expression wanted = accept("if") ? expression() : Expression();
        end_of_tag();
        std::string end;
        const Node inside = body({"else", "endfor"}, end);
        Node otherwise = [](Context&) { return Flow::next; };
        end_of_tag();
        if (end == "else") {
            otherwise = body({"endfor"}, end);
            end_of_tag();
        }
        return [=](Context& c) {
            std::vector<Json> items;
            for (Json& item : items_of(values(c), "a loop")) {
                c.count_step();
                c.frames.emplace_back();
                assign(c, names, item);
                if (!wanted || truth(wanted(c))) items.push_back(std::move(item));
                c.frames.pop_back();
            }
            if (items.empty()) return otherwise(c);
            for (size_t i = 0; i < items.size(); i++) {
                c.count_step();
                c.frames.emplace_back();
                assign(c, names, items[i]);
                c.frames.back()["loop"] = {{"index", i + 1},
                                           {"index0", i},
                                           {"revindex", items.size() - i},
                                           {"revindex0", items.size() - i - 1},
                                           {"first", i == 0},
                                           {"last", i + 1 == items.size()},
                                           {"length", items.size()}};
                if (i > 0) c.frames.back()["loop"]["previtem"] = items[i - 1];
                if (i + 1 < items.size()) c.frames.back()["loop"]["nextitem"] = items[i + 1];
                const Flow flow = inside(c);
                c.frames.pop_back();
                if (flow == Flow::leave_loop) break;
            }
            return Flow::next;
        };
    }
    Node assignment() {
        const std::vector<std::string> names = targets();
        std::string attribute;
        if (names.size() == 1 && accept(".")) attribute = name();
        Node block;
        Expression value;
        if (accept("=")) {
            value = expression();
            if (is(",")) at++, value = open_list(value);
            end_of_tag();
        } else {
            end_of_tag();
            std::string end;
            block = body({"endset"}, end);
            end_of_tag();
        }
        return [=](Context& c) {
            Json result;
            if (block) {
                const size_t begin = c.out.text.size();
                const Flow flow = block(c);
                result = c.out.text.substr(begin);
                c.out.text.resize(begin);
                if (flow != Flow::next) return flow;
            } else {
                result = value(c);
            }
            if (attribute.empty()) {
                assign(c, names, result);
                return Flow::next;
            }
            Json* object = c.find(names[0]);
            if (!object || !object->is_object()) fail(names[0], " is not a namespace");
            (*object)[attribute] = std::move(result);
            return Flow::next;
        };
    }
    // The values of `set a, b = x, y`.
    Expression open_list(const Expression& first) {
        std::vector<Expression> items = {first, expression()};
        while (accept(",")) items.push_back(expression());
        return [=](Context& c) {
            Json values = Json::array();
            for (const Expression& item : items) values.push_back(item(c));
            return values;
        };
    }
};

} // namespace

Jinja::Jinja(std::string_view text, std::string where) : where_(std::move(where)) {
    try {
        Parser parser{split_tags(text)};
        root_ = parser.nodes({}, 1);
        marks_generation_ = parser.marks_generation;
    } catch (const Error& error) {
        fail(where_, ": ", error.what());
    }
}

Jinja::Output Jinja::render(const Json& variables) const {
    Context context;
    context.frames.emplace_back();
    for (const auto& [key, value] : variables.items()) context.frames.back()[key] = value;
    context.frames.emplace_back();
    try {
        root_(context);
    } catch (const Error& error) {
        fail(where_, ": ", error.what());
    }
    return std::move(context.out);
}

} // namespace lns
