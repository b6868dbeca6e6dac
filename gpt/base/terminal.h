// Output for people: a progress line, tables, bars, readable numbers.
// No escape codes: the progress line is redrawn with a carriage return, and if the output is not a
// terminal (or TERM=dumb) it becomes plain lines, at growing intervals.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace lns {

// One number in printf's format.
std::string format_number(const char* format, double value);

// 1234567 -> 1.23M; below 1000 unchanged. K, M, B, T are powers of 1000.
std::string format_count(double count);
// 1536 -> 1.50 KiB. Powers of 1024.
std::string format_bytes(double bytes);
// 5.3e12 -> 5300 GFLOP/s, 7.9e14 -> 790.0 TFLOP/s.
std::string format_flops(double flops);
// 12.3s, 3m20s, 1h02m, 2d03h.
std::string format_duration(double seconds);
// "64k" = 64,000, "10M", "1.5B", "1e6", "64Ki" = 65,536. Throws if it is not a whole number; the
// message names `what`, the option or field.
int64_t parse_count(const std::string& text, const std::string& what = "a count");

// The width of UTF-8 text in terminal columns.
int display_width(std::string_view text);
// Text from a model or a file, made safe for a terminal: invalid UTF-8 becomes U+FFFD, control
// characters other than newline and tab become ^X.
std::string printable(std::string_view text);
// The same for a message of one line: newline and tab become ^X too, and the middle of very long
// text is omitted.
std::string one_line(std::string_view text);
bool is_utf8(std::string_view text);
bool locale_is_utf8();
// Whether out is a terminal that can redraw a line.
bool is_interactive(FILE* out);
// COLUMNS, else the terminal's width, else 80.
int terminal_width(FILE* out);

// A bar of at most width columns, full at max, in eighths of a column if the locale is UTF-8.
std::string bar(double value, double max, int width);

// Aligned columns; numeric columns are right-aligned.
struct Table {
    std::vector<std::string> headers;
    std::vector<std::vector<std::string>> rows;
    std::string text() const;
    void print(FILE* out = stdout) const;
};

// A progress line, thread-safe. All text is made printable().
class Progress {
  public:
    explicit Progress(FILE* out = stdout);
    ~Progress(); // as finish()
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;

    // Whether update() would show the line: check before composing an expensive one.
    bool due() const;
    // Shows the line if it is due, or if now is true.
    void update(const std::string& line, bool now = false);
    // Prints text above the progress line, and a newline if it does not end in one.
    void message(const std::string& text);
    // Keeps the last line and moves below it.
    void finish();
    // Why a line could not be written; "" if all were. A closed terminal is not a failure: users
    // close it to leave a run in the background.
    std::string failure() const;

  private:
    using Clock = std::chrono::steady_clock;
    FILE* out_;
    bool in_place_, terminal_, silent_ = false;
    int error_ = 0;
    Clock::time_point started_ = Clock::now(), shown_;
    bool any_ = false;
    std::string line_; // on the screen now
    mutable std::mutex mutex_;
    bool due_locked() const;
    void flush();
    void erase();
    void draw(const std::string& line);
};

} // namespace lns
