#include "gpt/run/config_file.h"

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/terminal.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace lns {
namespace {

constexpr size_t most_bytes = 1 << 20;

std::string_view trimmed(std::string_view text) {
    const size_t begin = text.find_first_not_of(" \t");
    if (begin == std::string_view::npos) return {};
    return text.substr(begin, text.find_last_not_of(" \t") - begin + 1);
}

std::string_view without_quotes(std::string_view text) {
    const bool quoted = text.size() >= 2 && text.front() == text.back() &&
                        (text.front() == '"' || text.front() == '\'');
    return quoted ? text.substr(1, text.size() - 2) : text;
}

// As much of a line as a message should quote.
std::string excerpt(std::string_view text) {
    const size_t most = 60;
    return printable(text.substr(0, most)) + (text.size() > most ? "..." : "");
}

bool is_control(char c) {
    const unsigned char byte = static_cast<unsigned char>(c);
    return (byte < 0x20 && c != '\t') || byte == 0x7F;
}

} // namespace

std::vector<ConfigLine> parse_config_file(std::string_view text, const std::string& where) {
    if (text.size() > most_bytes)
        fail(where, " has ", text.size(), " bytes, expected at most ", most_bytes,
             ": a --config file has lines `long-name = value`");
    if (text.starts_with("\xFF\xFE") || text.starts_with("\xFE\xFF"))
        fail(where, " is UTF-16, expected UTF-8: save it as that");
    if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);

    std::vector<ConfigLine> lines;
    std::string section;
    for (int number = 1; !text.empty(); number++) {
        const size_t end = std::min(text.find('\n'), text.size());
        std::string_view line = text.substr(0, end);
        text.remove_prefix(std::min(end + 1, text.size()));
        if (line.ends_with('\r')) line.remove_suffix(1);
        auto wrong = [&](const auto&... parts) { fail(where, ", line ", number, ": ", parts...); };
        if (std::any_of(line.begin(), line.end(), is_control))
            wrong("there is a control character in '", excerpt(line), "', expected text");

        line = trimmed(line);
        if (line.empty() || line[0] == '#' || line[0] == ';') continue;
        const size_t equals = line.find('=');
        if (line[0] == '[' && (line.back() == ']' || equals == std::string_view::npos)) {
            const std::string_view name = trimmed(line.substr(1, line.size() - 2));
            if (line.back() != ']' || name.empty() || name.find_first_of("[]") != name.npos)
                wrong("'", excerpt(line), "' is not a section, expected one like [optimizer]");
            section = name;
            continue;
        }
        if (equals == std::string_view::npos)
            wrong("'", excerpt(line), "' has no =, expected `long-name = value`");
        std::string_view name = trimmed(line.substr(0, equals));
        if (name.starts_with("--")) name.remove_prefix(2);
        if (name.empty()) wrong("'", excerpt(line), "' has no name, expected `long-name = value`");
        const std::string_view value = without_quotes(trimmed(line.substr(equals + 1)));
        lines.push_back({number, section, std::string(name), std::string(value)});
    }
    return lines;
}

std::vector<ConfigLine> read_config_file(const std::string& path) {
    auto cannot = [&](const std::string& why) { fail("the --config file ", path, " ", why); };
    const Fd file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)); // a pipe would block
    if (!file) cannot(cat("cannot be opened: ", std::strerror(errno)));
    struct stat status;
    if (fstat(file.fd, &status) != 0) cannot(cat("cannot be read: ", std::strerror(errno)));
    if (S_ISDIR(status.st_mode)) cannot("is a directory, expected a file");
    if (!S_ISREG(status.st_mode))
        cannot("is a pipe or a device, expected a file that can be read more than once");
    std::string text(most_bytes + 1, '\0');
    size_t size = 0;
    while (size < text.size()) {
        const ssize_t n = read(file.fd, text.data() + size, text.size() - size);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) cannot(cat("cannot be read: ", std::strerror(errno)));
        if (n == 0) break;
        size += size_t(n);
    }
    text.resize(size);
    if (size > most_bytes)
        cannot(
            cat("has more than ", most_bytes, " bytes, expected a few lines `long-name = value`"));
    return parse_config_file(text, path);
}

} // namespace lns
