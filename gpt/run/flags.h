// Flags: each is declared once, with the variable it sets, its default, its range and its help.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include <nlohmann/json.hpp>

namespace lns {

// A run's flags, as run.json and its checkpoints hold them: {"--lr": 0.001, "--norm": "lns"}. Runs
// of older versions hold text instead of numbers and booleans: {"--lr": "0.001"}.
using SavedFlags = std::map<std::string, nlohmann::json>;

// Throws a sentence that begins with `where` unless it is an object of strings, numbers and
// booleans.
SavedFlags parse_saved_flags(const nlohmann::json& object, const std::string& where);

// A value as the command line has it: lns, 0.001, 64, true.
std::string flag_text(const nlohmann::json& value);

// What a resumed run does with a new value for one of its flags.
enum class Change {
    once,  // not saved: it belongs to one call of the program
    free,  // takes it
    noted, // takes it and says so: the result is not that of an uninterrupted run
    fixed  // refuses it: it would be another run
};

struct Flag {
    std::string names, type; // "-x,--steps" and "N"; PATH of an argument; no type: a switch
    std::variant<std::string*, int64_t*, double*, bool*, std::vector<std::string>*> variable;
    std::string help, group;
    Change change = Change::once;
    nlohmann::json standard;                                         // its default
    std::function<std::string(const std::string&)> expand = nullptr; // of a path's ~
    std::function<void(const nlohmann::json&)> check = nullptr;      // throws if out of range

    std::string name() const; // "--steps"
    std::vector<std::string> all_names() const;
    bool is_argument() const { return names[0] != '-'; }
    bool is_switch() const { return std::holds_alternative<bool*>(variable) && type.empty(); }

    nlohmann::json value() const;
    void set(const nlohmann::json& value) const;

    // Both throw for a value of another type or out of range.
    nlohmann::json parse(const std::string& text) const;
    nlohmann::json from_saved(const nlohmann::json& value) const;
};

// Collects a command's flags, group by group.
struct FlagList {
    std::string group = "Flags";
    Change change = Change::once;
    std::vector<Flag> flags = {};

    using Names = const std::string&;
    Flag& add(Names names, const char* type, decltype(Flag::variable) variable, Names help);
    void on_off(Names names, bool& value, Names help) { add(names, "", &value, help); }
    // Empty text is refused: it is usually an unset shell variable, as in -i "$DATA".
    Flag& text(Names names, const char* type, std::string& value, Names help);
    Flag& path(Names names, const char* type, std::string& value, Names help);
    void choice(Names names, std::string& value, const std::vector<std::string>& known, Names help);
    // A whole number from low to high, which may be written as 10M, 64k or 1e6.
    void count(Names names, int64_t& value, int64_t low, int64_t high, Names help);
    // A finite number from low to high, low itself excluded if `above`.
    void number(Names names, double& value, double low, double high, Names help,
                bool above = false);
};

// "5,6,12" into numbers. Throws for anything else.
std::vector<int> parse_layers(const std::string& text);

// null if there is none of that name: "--steps", "-x".
const Flag* find_flag(const std::vector<Flag>& flags, const std::string& name);

// A heading per group, then a line per flag, its help broken into lines of 100 columns.
std::string flags_help(const std::vector<Flag>& flags);

} // namespace lns
