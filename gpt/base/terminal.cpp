#include "gpt/base/terminal.h"

#include "gpt/base/error.h"
#include "gpt/base/signals.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <sys/ioctl.h>
#include <unistd.h>

namespace lns {
namespace {

// Three significant digits: 1.23, 12.3, 123.
std::string three_digits(double value) {
    return format_number(value < 9.995 ? "%.2f" : value < 99.95 ? "%.1f" : "%.0f", value);
}

// The code point at text[i] and its length in bytes; length 0 if it is not valid UTF-8.
struct CodePoint {
    uint32_t value;
    int length;
};

CodePoint decode(std::string_view text, size_t i) {
    unsigned char first = text[i];
    if (first < 0x80) return {first, 1};
    int length = first >= 0xF0 && first < 0xF5 ? 4 : first >= 0xE0 ? 3 : first >= 0xC2 ? 2 : 0;
    if (length == 0 || first >= 0xF5 || i + length > text.size()) return {0, 0};
    uint32_t value = first & (0x7F >> length);
    for (int k = 1; k < length; k++) {
        unsigned char next = text[i + k];
        if ((next & 0xC0) != 0x80) return {0, 0};
        value = value << 6 | (next & 0x3F);
    }
    // Overlong, surrogate, beyond Unicode.
    const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    if (value < least[length] || (value >= 0xD800 && value < 0xE000) || value > 0x10FFFF)
        return {0, 0};
    return {value, length};
}

int width_of(uint32_t c) {
    auto in = [c](uint32_t low, uint32_t high) { return low <= c && c <= high; };
    if (in(0x300, 0x36F) || in(0x200B, 0x200F) || in(0xFE00, 0xFE0F)) return 0;
    bool wide = in(0x1100, 0x115F) || in(0x2E80, 0xA4CF) || in(0xAC00, 0xD7A3) ||
                in(0xF900, 0xFAFF) || in(0xFE30, 0xFE6F) || in(0xFF00, 0xFF60) ||
                in(0x1F300, 0x1FAFF) || in(0x20000, 0x3FFFD);
    return wide ? 2 : 1;
}

// The longest prefix of text that fits into `columns`.
std::string fit(std::string_view text, int columns) {
    size_t i = 0;
    for (int used = 0; i < text.size();) {
        CodePoint c = decode(text, i);
        used += c.length ? width_of(c.value) : 1;
        if (used > columns) break;
        i += std::max(c.length, 1);
    }
    return std::string(text.substr(0, i));
}

bool looks_numeric(const std::string& cell) {
    size_t i = cell.find_first_not_of("+-.~<");
    return i != std::string::npos && cell[i] >= '0' && cell[i] <= '9';
}

} // namespace

std::string format_number(const char* format, double value) {
    char text[64];
    std::snprintf(text, sizeof text, format, value);
    return text;
}

std::string format_count(double count) {
    if (!std::isfinite(count)) return format_number("%g", count);
    if (count < 0) return "-" + format_count(-count);
    if (count < 999.5) return format_number("%.0f", count);
    const char* units[] = {"K", "M", "B", "T"};
    int unit = 0;
    for (count /= 1000; count >= 999.5 && unit < 3; unit++) count /= 1000;
    return three_digits(count) + units[unit];
}

std::string format_bytes(double bytes) {
    if (!std::isfinite(bytes)) return format_number("%g B", bytes);
    if (bytes < 1023.5) return format_number("%.0f B", bytes);
    const char* units[] = {"KiB", "MiB", "GiB", "TiB"};
    int unit = 0;
    for (bytes /= 1024; bytes >= 1023.5 && unit < 3; unit++) bytes /= 1024;
    return three_digits(bytes) + " " + units[unit];
}

std::string format_flops(double flops) {
    return flops < 10e12 ? format_number("%.0f GFLOP/s", flops / 1e9)
                         : format_number("%.1f TFLOP/s", flops / 1e12);
}

std::string format_duration(double seconds) {
    if (!std::isfinite(seconds) || seconds < 0) return "?";
    if (seconds < 59.95) return format_number("%.1fs", seconds);
    if (seconds > 1e12) return "ages";
    auto two = [](int64_t big, const char* unit, int64_t small, const char* small_unit) {
        return cat(big, unit, small < 10 ? "0" : "", small, small_unit);
    };
    int64_t s = std::llround(seconds), minutes = s / 60, hours = s / 3600;
    if (hours == 0) return two(minutes, "m", s % 60, "s");
    if (hours < 24) return two(hours, "h", minutes % 60, "m");
    return two(hours / 24, "d", hours % 24, "h");
}

int64_t parse_count(const std::string& text, const std::string& what) {
    const std::string expected = "a whole number such as 500, 64k, 10M, 1.5B or 1e6";
    const char *begin = text.data(), *end = begin + text.size();
    double factor = 1;
    auto unit_of = [&](char c) {
        switch (c) {
        case 'k':
        case 'K':
            return 1;
        case 'm':
        case 'M':
            return 2;
        case 'g':
        case 'G':
        case 'b':
        case 'B':
            return 3;
        case 't':
        case 'T':
            return 4;
        default:
            return 0;
        }
    };
    const char* number_end = end;
    if (end - begin >= 3 && end[-1] == 'i' && unit_of(end[-2])) {
        number_end = end - 2, factor = std::pow(1024, unit_of(end[-2]));
    } else if (end - begin >= 2 && unit_of(end[-1])) {
        number_end = end - 1, factor = std::pow(1000, unit_of(end[-1]));
    }
    if (factor == 1) { // exact beyond 2^53
        int64_t whole = 0;
        auto [stop, error] = std::from_chars(begin, end, whole);
        if (error == std::errc() && stop == end && whole >= 0) return whole;
    }
    double value = 0;
    auto [stop, error] = std::from_chars(begin, number_end, value);
    if (error != std::errc() || stop != number_end || begin == number_end)
        fail("'", text, "' is not ", what, ": expected ", expected, ".");
    value *= factor;
    double whole = std::round(value);
    // 1.1M is 1100000.0000000002 in floating point.
    if (!(value >= 0) || std::isinf(value) || std::abs(value - whole) > 1e-9 * whole)
        fail("'", text, "' is not ", what, ": expected ", expected, ".");
    if (whole >= 0x1p63) fail("'", text, "' is too large for ", what, ".");
    return int64_t(whole);
}

int display_width(std::string_view text) {
    int width = 0;
    for (size_t i = 0; i < text.size();) {
        CodePoint c = decode(text, i);
        width += c.length ? width_of(c.value) : 1;
        i += std::max(c.length, 1);
    }
    return width;
}

std::string printable(std::string_view text) {
    std::string out;
    for (size_t i = 0; i < text.size();) {
        CodePoint c = decode(text, i);
        if (c.length == 0) {
            out += "\xEF\xBF\xBD";
        } else if (c.value == 0x7F || (c.value < 0x20 && c.value != '\n' && c.value != '\t')) {
            out += {'^', char(c.value ^ 0x40)};
        } else if (c.value >= 0x80 && c.value < 0xA0) { // C1 control characters
            out += "\xEF\xBF\xBD";
        } else {
            out += text.substr(i, c.length);
        }
        i += std::max(c.length, 1);
    }
    return out;
}

std::string one_line(std::string_view text) {
    constexpr size_t begin = 3000, end = 1000;
    if (text.size() > begin + end)
        return one_line(cat(text.substr(0, begin - 3), "...", text.substr(text.size() - end)));
    std::string out;
    for (char c : printable(text)) {
        if (c == '\n' || c == '\t')
            out += {'^', char(c ^ 0x40)};
        else
            out += c;
    }
    return out;
}

bool is_utf8(std::string_view text) {
    for (size_t i = 0; i < text.size();) {
        int length = decode(text, i).length;
        if (length == 0) return false;
        i += size_t(length);
    }
    return true;
}

bool locale_is_utf8() {
    for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
        const char* value = std::getenv(name);
        if (!value || !*value) continue;
        std::string lower(value);
        for (char& c : lower) c = char(std::tolower(static_cast<unsigned char>(c)));
        return lower.find("utf-8") != std::string::npos || lower.find("utf8") != std::string::npos;
    }
    return false;
}

bool is_interactive(FILE* out) {
    const char* term = std::getenv("TERM");
    return isatty(fileno(out)) && term && *term && std::string_view(term) != "dumb";
}

int terminal_width(FILE* out) {
    const char* columns = std::getenv("COLUMNS");
    int width = columns ? std::atoi(columns) : 0;
    winsize size = {};
    if (width <= 0 && ioctl(fileno(out), TIOCGWINSZ, &size) == 0) width = size.ws_col;
    return width > 0 ? width : 80;
}

std::string bar(double value, double max, int width) {
    double share = max > 0 && value > 0 ? std::min(value / max, 1.0) : 0;
    if (!locale_is_utf8()) return std::string(size_t(std::lround(share * width)), '#');
    int eighths = int(std::lround(share * width * 8));
    std::string text;
    for (; eighths >= 8; eighths -= 8) text += "█";
    const char* parts[] = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
    return text + parts[eighths];
}

std::string Table::text() const {
    size_t columns = headers.size();
    for (const auto& row : rows) columns = std::max(columns, row.size());
    std::vector<int> width(columns, 0);
    std::vector<bool> right(columns, !rows.empty());
    for (size_t c = 0; c < headers.size(); c++) width[c] = display_width(headers[c]);
    for (const auto& row : rows) {
        for (size_t c = 0; c < row.size(); c++) {
            width[c] = std::max(width[c], display_width(row[c]));
            if (!row[c].empty() && row[c] != "-" && !looks_numeric(row[c])) right[c] = false;
        }
    }
    std::string out;
    auto add = [&](const std::vector<std::string>& cells) {
        std::string line;
        for (size_t c = 0; c < cells.size(); c++) {
            std::string space(width[c] - display_width(cells[c]), ' ');
            line += c ? "  " : "";
            line += right[c] ? space + cells[c] : cells[c] + space;
        }
        out += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
    };
    if (!headers.empty()) add(headers);
    for (const auto& row : rows) add(row);
    return out;
}

void Table::print(FILE* out) const { std::fputs(text().c_str(), out); }

Progress::Progress(FILE* out)
    : out_(out), in_place_(is_interactive(out)), terminal_(isatty(fileno(out))) {}

Progress::~Progress() { finish(); }

bool Progress::due() const {
    std::lock_guard lock(mutex_);
    return due_locked();
}

bool Progress::due_locked() const {
    if (!any_) return true;
    using Seconds = std::chrono::duration<double>;
    Clock::time_point now = Clock::now();
    double interval = 0.1;
    if (!in_place_) interval = std::clamp(Seconds(now - started_).count() / 10, 2.0, 60.0);
    return Seconds(now - shown_).count() >= interval;
}

void Progress::update(const std::string& text, bool now) {
    std::lock_guard lock(mutex_);
    if (silent_ || (!now && !due_locked())) return;
    const std::string line = printable(text);
    any_ = true;
    shown_ = Clock::now();
    if (in_place_) {
        draw(line);
    } else {
        std::fprintf(out_, "%s\n", line.c_str());
    }
    flush();
}

void Progress::flush() {
    errno = 0;
    if (std::fflush(out_) == 0 && !std::ferror(out_)) return;
    const int error = errno;
    std::clearerr(out_);
    silent_ = true;
    if (!(terminal_ && error == EIO)) error_ = error ? error : EIO;
}

std::string Progress::failure() const {
    std::lock_guard lock(mutex_);
    return error_ ? output_error(error_) : "";
}

void Progress::draw(const std::string& line) {
    // The last column stays empty: some terminals wrap when it is filled.
    std::string fitted = fit(line, terminal_width(out_) - 1);
    int rest = std::max(0, display_width(line_) - display_width(fitted));
    std::fprintf(out_, "\r%s%*s%s", fitted.c_str(), rest, "", std::string(rest, '\b').c_str());
    line_ = fitted;
}

void Progress::erase() {
    if (!line_.empty()) std::fprintf(out_, "\r%*s\r", display_width(line_), "");
}

void Progress::message(const std::string& text) {
    std::lock_guard lock(mutex_);
    if (silent_) return;
    std::string line = line_;
    erase();
    std::fputs(printable(text).c_str(), out_);
    if (text.empty() || text.back() != '\n') std::fputc('\n', out_);
    line_.clear();
    if (!line.empty()) draw(line);
    flush();
}

void Progress::finish() {
    std::lock_guard lock(mutex_);
    if (silent_) return;
    if (!line_.empty()) std::fputc('\n', out_);
    line_.clear();
    flush();
}

} // namespace lns
