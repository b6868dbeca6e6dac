// The program train_gpt: its commands and its exit status.
#pragma once

namespace lns {

// Trains, samples or evaluates as the command line says. An error is printed to stderr as
// `train_gpt: sentence`, and the status is 1.
int run_program(int argc, char** argv);

} // namespace lns
