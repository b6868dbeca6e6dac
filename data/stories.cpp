// Prints the built-in corpus as text: documents separated by lines of <|endoftext|>.
#include "gpt/data/stories.h"
#include "gpt/base/error.h"
#include "gpt/base/signals.h"
#include "gpt/base/terminal.h"

#include <CLI/CLI.hpp>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>

namespace {

void print(double megabytes, uint64_t seed) {
    const double bytes = megabytes * 1e6;
    double written = 0;
    for (uint64_t i = 0; written < bytes; i++) {
        std::string text = (i ? "<|endoftext|>\n" : "") + lns::story(seed, i);
        if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) break;
        written += double(text.size());
    }
    if (std::fflush(stdout) != 0 || std::ferror(stdout))
        lns::fail("cannot write to the standard output: ", std::strerror(errno),
                  ". Is the disk full?");
}

} // namespace

int main(int argc, char** argv) {
    std::signal(SIGXFSZ, SIG_IGN); // exceeding a file size limit is an error of write(2)
    CLI::App app{"Prints synthetic English stories, separated by lines of <|endoftext|>.",
                 "data/stories"};
    double megabytes = 1;
    uint64_t seed = 1;
    app.add_option("--megabytes", megabytes, "minimum amount of text; the last story is complete")
        ->capture_default_str()
        ->check(CLI::Range(0.0, 1e9));
    app.add_option("--seed", seed, "different seeds give different stories")->capture_default_str();
    try {
        app.parse(argc, argv);
        print(megabytes, seed);
    } catch (const CLI::ParseError& error) {
        if (error.get_exit_code() == 0) { // --help
            app.exit(error);
            return lns::output_status("data/stories");
        }
        std::fprintf(stderr, "data/stories: %s. See data/stories --help\n",
                     lns::one_line(error.what()).c_str());
        return 1;
    } catch (const lns::Error& error) {
        std::fprintf(stderr, "data/stories: %s\n", lns::one_line(error.what()).c_str());
        return 1;
    }
}
