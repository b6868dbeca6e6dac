#include "gpt/run/flags.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <sstream>

#include "gpt/base/error.h"
#include "gpt/base/json.h"
#include "gpt/base/suggest.h"
#include "gpt/base/terminal.h"
#include "gpt/data/paths.h"

namespace lns {

using nlohmann::json;

SavedFlags parse_saved_flags(const json& object, const std::string& where) {
    if (!object.is_object()) fail(where, " are ", quoted(object), ", expected an object");
    SavedFlags flags;
    for (const auto& [name, value] : object.items()) {
        if (!value.is_string() && !value.is_number() && !value.is_boolean())
            fail(where, ": ", name, " is ", quoted(value),
                 ", expected text, a number or a boolean");
        flags[name] = value;
    }
    return flags;
}

std::string flag_text(const json& value) {
    if (value.is_string()) return value.get<std::string>();
    if (!value.is_number_float()) return value.dump(-1, ' ', false, json::error_handler_t::replace);
    char shortest[32];
    return std::string(shortest, std::to_chars(shortest, shortest + 32, value.get<double>()).ptr);
}

std::vector<std::string> Flag::all_names() const {
    std::vector<std::string> all;
    std::istringstream stream(names);
    for (std::string name; std::getline(stream, name, ',');) all.push_back(name);
    return all;
}

std::string Flag::name() const { return all_names().back(); }

json Flag::value() const {
    return std::visit([](auto* p) { return json(*p); }, variable);
}

void Flag::set(const json& value) const {
    std::visit([&](auto* p) { value.get_to(*p); }, variable);
}

namespace {

double parse_number(const std::string& text) {
    char* end;
    const double x = std::strtod(text.c_str(), &end);
    if (text.empty() || *end || std::isnan(x)) fail("'", text, "' is not a number");
    return x;
}

bool parse_boolean(const std::string& text) {
    for (const char* yes : {"true", "yes", "on", "1"})
        if (text == yes) return true;
    for (const char* no : {"false", "no", "off", "0"})
        if (text == no) return false;
    fail("'", text, "' is neither true nor false");
}

} // namespace

json Flag::parse(const std::string& text) const {
    json value;
    if (std::holds_alternative<int64_t*>(variable)) value = parse_count(text);
    if (std::holds_alternative<double*>(variable)) value = parse_number(text);
    if (std::holds_alternative<bool*>(variable)) value = parse_boolean(text);
    if (std::holds_alternative<std::string*>(variable)) value = expand ? expand(text) : text;
    if (std::holds_alternative<std::vector<std::string>*>(variable)) value = {text};
    if (check) check(value);
    return value;
}

json Flag::from_saved(const json& value) const {
    if (value == standard) return value;
    const bool of_text = std::holds_alternative<std::string*>(variable);
    if (value == "" || value == flag_text(standard)) return standard; // of an older version
    if (value.is_string()) return parse(value.get<std::string>());
    const bool fits = std::holds_alternative<int64_t*>(variable)  ? value.is_number_integer()
                      : std::holds_alternative<double*>(variable) ? value.is_number()
                                                                  : value.is_boolean();
    if (of_text || !fits) fail(quoted(value), " is not of its type");
    if (check) check(value);
    return value;
}

Flag& FlagList::add(Names names, const char* type, decltype(Flag::variable) variable, Names help) {
    return flags.emplace_back(Flag{names, type, variable, help, group, change, {}});
}

Flag& FlagList::text(Names names, const char* type, std::string& value, Names help) {
    Flag& flag = add(names, type, &value, help);
    flag.check = [](const json& text) {
        if (text == "") fail("there is no value: name one, or leave the flag out");
    };
    return flag;
}

Flag& FlagList::path(Names names, const char* type, std::string& value, Names help) {
    Flag& flag = text(names, type, value, help);
    flag.expand = expand_home;
    return flag;
}

void FlagList::choice(Names names, std::string& value, const std::vector<std::string>& known,
                      Names help) {
    add(names, "NAME", &value, help).check = [known](const json& text) {
        if (std::find(known.begin(), known.end(), text) == known.end())
            fail("'", flag_text(text), "' is not one of ", join(known), ".",
                 did_you_mean(flag_text(text), known));
    };
}

void FlagList::count(Names names, int64_t& value, int64_t low, int64_t high, Names help) {
    add(names, "N", &value, help).check = [low, high](const json& n) {
        if (n < low || n > high)
            fail(flag_text(n), " is out of range, expected ", low, " to ", high);
    };
}

void FlagList::number(Names names, double& value, double low, double high, Names help, bool above) {
    add(names, "X", &value, help).check = [=](const json& number) {
        const double x = number;
        if (x >= low && x <= high && !(above && x == low) && std::isfinite(x)) return;
        fail(flag_text(number), " is out of range, expected ", above ? "above " : "at least ", low,
             std::isfinite(high) ? cat(" and at most ", high) : "");
    };
}

const Flag* find_flag(const std::vector<Flag>& flags, const std::string& name) {
    for (const Flag& flag : flags)
        for (const std::string& other : flag.all_names())
            if (other == name) return &flag;
    return nullptr;
}

std::string flags_help(const std::vector<Flag>& flags) {
    const size_t column = 30, width = 100;
    std::string out, group;
    for (const Flag& flag : flags) {
        if (flag.group != group) out += cat("\n", group = flag.group, ":\n");
        std::string line = flag.names.starts_with("--") ? "      " : "  ";
        line += join(flag.all_names());
        if (!flag.type.empty() && !flag.is_argument()) line += " " + flag.type;
        if (line.size() > column - 2) out += line + "\n", line.clear();
        line.resize(column, ' ');
        const std::string standard = flag_text(flag.standard);
        const bool shown = !flag.standard.is_boolean() && !flag.is_argument() && standard != "0";
        std::istringstream words(flag.help +
                                 (shown && standard != "" ? " [" + standard + "]" : ""));
        for (std::string word; words >> word;) {
            if (line.size() + word.size() + 1 > width) {
                out += line + "\n";
                line.assign(column, ' ');
            }
            line += (line.size() > column ? " " : "") + word;
        }
        out += line + "\n";
    }
    return out;
}

std::vector<int> parse_layers(const std::string& text) {
    std::vector<int> layers;
    for (size_t begin = 0; begin <= text.size();) {
        const size_t end = std::min(text.find(',', begin), text.size());
        const std::string word = text.substr(begin, end - begin);
        if (word.empty() || word.size() > 6 || word.find_first_not_of("0123456789") != word.npos)
            fail("'", text, "' is not a list of layers, such as 5,6");
        layers.push_back(std::stoi(word));
        begin = end + 1;
    }
    return layers;
}

} // namespace lns
