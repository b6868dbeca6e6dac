// What a person sees: a progress line, tables, bars, numbers for humans.
// Nothing here writes escape codes: the progress line is redrawn with a carriage return, and where
// the output is no terminal (or TERM=dumb) it becomes plain lines, at growing intervals.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace lns {

// One number as printf's format has it, with what the format says around it.
std::string format_number(const char* format, double value);

// 1234567 -> 1.23M; below 1000 as it is. K, M, B, T are powers of 1000.
std::string format_count(double count);
// 1536 -> 1.50 KiB. Powers of 1024.
std::string format_bytes(double bytes);
// 5.3e12 -> 5300 GFLOP/s, 7.9e14 -> 790.0 TFLOP/s.
std::string format_flops(double flops);
// 12.3s, 3m20s, 1h02m, 2d03h.
std::string format_duration(double seconds);
// "64k" = 64,000, "10M", "1.5B", "1e6", "64Ki" = 65,536; what is not a whole count throws, naming
// the option or field that it was given for.
int64_t parse_count(const std::string& text, const std::string& what = "a count");

// Columns on the screen of UTF-8 text.
int display_width(std::string_view text);
// Text from a model or a file as a terminal may show it: invalid UTF-8 becomes U+FFFD, control
// characters but newline and tab become ^X.
std::string printable(std::string_view text);
// The same for a message, which is one line: newline and tab too become ^X, and of a very long text
// the middle is left out.
std::string one_line(std::string_view text);
bool is_utf8(std::string_view text);
bool locale_is_utf8();
// A terminal on which a line can be redrawn.
bool is_interactive(FILE* out);
// COLUMNS, or the terminal's, or 80.
int terminal_width(FILE* out);

// A bar of at most width columns, full at max, in eighths of a column where the locale is UTF-8.
std::string bar(double value, double max, int width);

// Aligned columns; one whose cells all begin like numbers stands to the right.
struct Table {
    std::vector<std::string> headers;
    std::vector<std::vector<std::string>> rows;
    std::string text() const;
    void print(FILE* out = stdout) const;
};

// One line that tells how far things are, printable() as all that is shown. Threads may share it.
class Progress {
  public:
    explicit Progress(FILE* out = stdout);
    ~Progress(); // as finish()
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;

    // True when update() would show something: ask before composing an expensive line.
    bool due() const;
    // Shows the line now if it is due; now = true shows it in any case.
    void update(const std::string& line, bool now = false);
    // Prints text (a newline is added where it lacks one) above the progress line.
    void message(const std::string& text);
    // Leaves the last line standing and moves below it.
    void finish();
    // Why a line could not be written, as a sentence; "" if all were. A terminal that was closed is
    // no failure: whoever leaves a run behind on purpose does that.
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
