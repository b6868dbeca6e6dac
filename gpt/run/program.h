// The program train_gpt: its command line, its commands and its exit status.
#pragma once

#include <functional>

#include "gpt/base/files.h"
#include "gpt/base/ranks.h"
#include "gpt/run/options.h"

namespace lns {

struct CommandLine {
    Options options;
    Fd lock; // of the run's directory, with -y: held from before its flags are read
};
// With -y, flags that are not given are the run's own. Throws if ranks differ.
CommandLine read_command_line(int argc, char** argv, const Ranks& ranks);

// Any command but training. Returns the exit status.
int run_command(const Options& options, const Ranks& ranks);

// Joins the ranks and returns what program(ranks) returns. An error is printed to stderr as
// `train_gpt: sentence`, ends all ranks, and the status is 1.
int run_program(const std::function<int(const Ranks&)>& program);

} // namespace lns
