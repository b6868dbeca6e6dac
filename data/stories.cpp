// Prints the built-in corpus as text: documents separated by lines of <|endoftext|>.
#include "gpt/data/stories.h"
#include "data/tool.h"

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
    return lns::run_tool("stories", app, argc, argv, [&] { print(megabytes, seed); });
}
