#include "gpt/base/terminal.h"

#include "dev/test/data_helpers.h"

#include <cmath>
#include <csignal>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

using namespace lns;
using namespace lns::test;

namespace {

// Sets an environment variable for its lifetime.
struct Environment {
    std::string name, before;
    bool was_set;
    Environment(const char* name, const char* value) : name(name), was_set(std::getenv(name)) {
        if (was_set) before = std::getenv(name);
        value ? setenv(name, value, 1) : unsetenv(name);
    }
    ~Environment() { was_set ? setenv(name.c_str(), before.c_str(), 1) : unsetenv(name.c_str()); }
};

// A terminal of 30 columns: the output to it, and its screen.
struct FakeTerminal {
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    FILE* out = nullptr;
    FakeTerminal() {
        if (master < 0 || grantpt(master) != 0 || unlockpt(master) != 0) return;
        out = fopen(ptsname(master), "w");
        winsize size = {24, 30, 0, 0};
        if (out) ioctl(master, TIOCSWINSZ, &size);
    }
    ~FakeTerminal() {
        if (out) fclose(out);
        if (master >= 0) close(master);
    }
    std::string written() {
        fflush(out);
        fcntl(master, F_SETFL, O_NONBLOCK);
        std::string bytes;
        char block[4096];
        for (ssize_t n; (n = read(master, block, sizeof block)) > 0;) bytes.append(block, n);
        return bytes;
    }
    static std::vector<std::string> screen(const std::string& bytes) {
        std::vector<std::string> lines(1);
        size_t column = 0;
        for (char c : bytes) {
            if (c == '\r') {
                column = 0;
            } else if (c == '\b') {
                column--;
            } else if (c == '\n') {
                lines.emplace_back();
            } else {
                std::string& line = lines.back();
                if (line.size() <= column) line.resize(column + 1, ' ');
                line[column++] = c;
            }
        }
        for (std::string& line : lines) line.erase(line.find_last_not_of(' ') + 1);
        return lines;
    }
};
using Lines = std::vector<std::string>;

} // namespace

TEST(Terminal, NumbersForPeople) {
    EXPECT_EQ(format_count(0), "0");
    EXPECT_EQ(format_count(999), "999");
    EXPECT_EQ(format_count(1000), "1.00K");
    EXPECT_EQ(format_count(12345), "12.3K");
    EXPECT_EQ(format_count(999999), "1.00M");
    EXPECT_EQ(format_count(1234567), "1.23M");
    EXPECT_EQ(format_count(124439808), "124M");
    EXPECT_EQ(format_count(-6.7e9), "-6.70B");
    EXPECT_EQ(format_count(2e16), "20000T");
    EXPECT_EQ(format_count(9.996e3), "10.0K");
    EXPECT_EQ(format_bytes(1023), "1023 B");
    EXPECT_EQ(format_bytes(1536), "1.50 KiB");
    EXPECT_EQ(format_bytes(80.0 * (1 << 30)), "80.0 GiB");
    EXPECT_EQ(format_duration(0), "0.0s");
    EXPECT_EQ(format_duration(12.34), "12.3s");
    EXPECT_EQ(format_duration(59.97), "1m00s");
    EXPECT_EQ(format_duration(200), "3m20s");
    EXPECT_EQ(format_duration(3599.6), "1h00m");
    EXPECT_EQ(format_duration(3720), "1h02m");
    EXPECT_EQ(format_duration(2 * 86400 + 3 * 3600), "2d03h");
    EXPECT_EQ(format_duration(NAN), "?");
    EXPECT_EQ(format_duration(INFINITY), "?");
}

TEST(Terminal, CountsAreParsed) {
    const std::pair<const char*, int64_t> good[] = {
        {"0", 0},          {"500", 500},        {"64k", 64000},
        {"64Ki", 65536},   {"10M", 10000000},   {"1.5B", 1500000000},
        {"1.1M", 1100000}, {"2G", 2000000000},  {"3t", 3000000000000},
        {"1e6", 1000000},  {"2.5e3k", 2500000}, {"9223372036854775807", INT64_MAX}};
    for (auto [text, value] : good) EXPECT_EQ(parse_count(text), value) << text;
    for (const char* text : {"", "k", "Ki", "-1", "1.5", "64x", "64kk", " 5", "5 ", "0x10", "nan",
                             "inf", "1.0001k", "--", "1e"})
        EXPECT_TRUE(says(error_of([&] { parse_count(text, "a value for --steps"); }),
                         {cat("'", text, "' is not a value for --steps"), "64k"}))
            << text;
    for (const char* text : {"9223372036854775808", "1e300", "10000000T"})
        EXPECT_TRUE(says(error_of([&] { parse_count(text); }), {text, "too large"})) << text;
}

TEST(Terminal, WidthsAndUnusualText) {
    EXPECT_EQ(display_width("abc"), 3);
    EXPECT_EQ(display_width("é█·"), 3);
    EXPECT_EQ(display_width("語🙂"), 4);
    EXPECT_EQ(display_width("e\u0301"), 1);
    EXPECT_EQ(display_width("\xff\xc3"), 2);
    EXPECT_EQ(printable("plain é 語\n\ttext"), "plain é 語\n\ttext");
    EXPECT_EQ(printable("\x1b[31m\x7f"), "^[[31m^?");
    EXPECT_EQ(printable("\xff\xc3(\xed\xa0\x80"), "\uFFFD\uFFFD(\uFFFD\uFFFD\uFFFD");
    EXPECT_EQ(printable("\u009b"), "\uFFFD");
    EXPECT_EQ(one_line("a\nb\tc\r\x1b[31m é"), "a^Jb^Ic^M^[[31m é");
    EXPECT_EQ(one_line(std::string(4000, 'x')), std::string(4000, 'x'));
    const std::string shortened = one_line("begin" + std::string(1000000, '\n') + "end");
    EXPECT_LT(shortened.size(), 8001u);
    EXPECT_TRUE(shortened.starts_with("begin^J") && shortened.ends_with("^Jend"));
    EXPECT_NE(shortened.find("..."), std::string::npos);
}

TEST(Terminal, ATableAligns) {
    Table table = {{"name", "params", "note"},
                   {{"wte", "1.5M", "tied"}, {"h.0 é", "-", ""}, {"b"}}};
    EXPECT_EQ(table.text(), "name   params  note\n"
                            "wte      1.5M  tied\n"
                            "h.0 é       -\n"
                            "b\n");
}

TEST(Terminal, BarsHaveTheLengthOfTheirValue) {
    {
        Environment locale("LC_ALL", "C.UTF-8");
        EXPECT_EQ(bar(1, 1, 4), "████");
        EXPECT_EQ(bar(1, 2, 5), "██▌");
        EXPECT_EQ(bar(5, 1, 2), "██");
        EXPECT_EQ(bar(0, 1, 4), "");
        EXPECT_EQ(bar(NAN, 1, 4), "");
        EXPECT_EQ(bar(1, 0, 4), "");
    }
    Environment locale("LC_ALL", "C");
    EXPECT_EQ(bar(1, 2, 5), "###");
}

TEST(Terminal, ProgressIsRedrawnInPlace) {
    FakeTerminal terminal;
    if (!terminal.out) GTEST_SKIP() << "no pseudo-terminals here";
    Environment term("TERM", "xterm"), columns("COLUMNS", nullptr);
    std::string bytes;
    {
        Progress progress(terminal.out);
        progress.update("step 1, a long line that does not fit the window", true);
        bytes += terminal.written();
        EXPECT_EQ(terminal.screen(bytes), Lines{"step 1, a long line that does"});
        progress.update("step 2", true);
        bytes += terminal.written();
        EXPECT_EQ(terminal.screen(bytes), Lines{"step 2"});
        EXPECT_FALSE(progress.due());
        progress.update("too soon");
        progress.message("saved");
        bytes += terminal.written();
        EXPECT_EQ(terminal.screen(bytes), (Lines{"saved", "step 2"}));
        progress.message("twice\n");
    }
    bytes += terminal.written();
    EXPECT_EQ(terminal.screen(bytes), (Lines{"saved", "twice", "step 2", ""}));
    EXPECT_EQ(bytes.find('\x1b'), std::string::npos);
}

TEST(Terminal, ProgressIsPlainLinesInAFile) {
    TemporaryDirectory dir;
    FILE* out = fopen((dir / "log").c_str(), "w");
    {
        Progress progress(out);
        EXPECT_TRUE(progress.due());
        for (int i = 0; i < 1000; i++) progress.update("step " + std::to_string(i));
        progress.message("saved");
        progress.update("the last", true);
    }
    fclose(out);
    EXPECT_EQ(read_bytes(dir / "log"), "step 0\nsaved\nthe last\n");

    FakeTerminal terminal;
    if (!terminal.out) GTEST_SKIP() << "no pseudo-terminals here";
    Environment term("TERM", "dumb");
    Progress(terminal.out).update("a", true);
    EXPECT_EQ(terminal.written(), "a\r\n"); // the terminal itself adds the carriage return
}

TEST(Terminal, LostOutputIsNoticed) {
    FILE* full = fopen("/dev/full", "w");
    if (!full) GTEST_SKIP() << "no /dev/full here";
    {
        Progress progress(full);
        EXPECT_EQ(progress.failure(), "");
        progress.update("a");
        EXPECT_TRUE(says(progress.failure(), {"standard output", "No space left on device"}));
        progress.message("b"); // no further attempts
    }
    fclose(full);
}
