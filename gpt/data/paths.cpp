#include "gpt/data/paths.h"

#include "gpt/base/error.h"
#include "gpt/data/publish.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <glob.h>
#include <pwd.h>
#include <string_view>
#include <sys/stat.h>
#include <unistd.h>

namespace lns {
namespace {

bool exists(const std::string& path) {
    struct stat status;
    return stat(path.c_str(), &status) == 0;
}

std::string escaped(std::string_view text, std::string_view special) {
    std::string out;
    for (char c : text) {
        if (special.find(c) != std::string_view::npos) out += '\\';
        out += c;
    }
    return out;
}

// glob(3) overflows the stack on thousands of nested braces, and {a,b}{a,b}... is exponential.
void check_size(const std::string& pattern) {
    constexpr size_t most_bytes = 4096, most_braces = 16;
    if (pattern.size() > most_bytes)
        fail("the pattern '", pattern.substr(0, 60), "...' has ", pattern.size(),
             " bytes, expected at most ", most_bytes);
    if (size_t(std::count(pattern.begin(), pattern.end(), '{')) > most_braces)
        fail("the pattern '", pattern, "' has more than ", most_braces, " braces");
}

// Escapes the leading folders of the pattern that exist literally.
std::string with_literal_folders(const std::string& pattern) {
    size_t literal = 0;
    for (size_t at = pattern.find('/', 1); at != std::string::npos;
         at = pattern.find('/', at + 1)) {
        if (!exists(pattern.substr(0, at))) break;
        literal = at;
    }
    return literal_pattern(pattern.substr(0, literal)) + pattern.substr(literal);
}

std::vector<std::string> matches(const std::string& pattern) {
    glob_t found{};
    const int result = glob(pattern.c_str(), GLOB_BRACE, nullptr, &found);
    const int error = errno;
    std::vector<std::string> paths(found.gl_pathv, found.gl_pathv + found.gl_pathc);
    globfree(&found);
    if (result != 0 && result != GLOB_NOMATCH)
        fail("cannot list the files of '", pattern, "': ", std::strerror(error));
    return paths;
}

std::vector<std::string> find_paths(const std::string& pattern) {
    const std::string path = expand_home(pattern);
    if (exists(path)) return {path};
    check_size(path);
    std::vector<std::string> paths = matches(with_literal_folders(path));
    // Names with literal brackets: "a[1]_train_*.bin".
    if (paths.empty()) paths = matches(escaped(path, "[]{}"));
    paths.erase(std::remove_if(paths.begin(), paths.end(), is_dangling_member), paths.end());
    std::sort(paths.begin(), paths.end());
    return paths;
}

} // namespace

std::string expand_home(const std::string& path) {
    if (path.empty() || path[0] != '~') return path;
    const size_t slash = std::min(path.find('/'), path.size());
    const std::string user = path.substr(1, slash - 1);
    const char* home = user.empty() ? std::getenv("HOME") : nullptr;
    if (!home || !*home) {
        const passwd* entry = user.empty() ? getpwuid(getuid()) : getpwnam(user.c_str());
        if (!entry)
            fail("'", path, "' begins with a home folder, but there is no ",
                 user.empty() ? "HOME in the environment" : "user '" + user + "'",
                 ": write the path in full, or ./", path, " for a name that begins with ~");
        home = entry->pw_dir;
    }
    return home + path.substr(slash);
}

std::string expand_home_in_tokenizer(const std::string& spec) {
    const std::string gpt2 = "gpt2:";
    return spec.starts_with(gpt2) ? gpt2 + expand_home(spec.substr(gpt2.size()))
                                  : expand_home(spec);
}

std::string literal_pattern(const std::string& path) { return escaped(path, "*?[]{}\\"); }

std::vector<std::string> glob_paths(const std::string& pattern) {
    std::vector<std::string> paths = find_paths(pattern);
    if (paths.empty())
        fail("no file matches '", pattern,
             "'. Check the path, quote the pattern, or make shards with data/tokenize -o PREFIX "
             "FILE");
    return paths;
}

bool matches_any(const std::string& pattern) { return !find_paths(pattern).empty(); }

} // namespace lns
