// Signals, and output that is lost. During training, HUP, INT, TERM, USR1, USR2 and XCPU make a run
// save and exit with 130, which always means saved. PIPE and XFSZ become write errors.
#pragma once

#include <string>

namespace lns {

// Call this first in main. It reopens closed standard descriptors, so that no file gets their
// number and receives output; writing to them still fails.
void prepare_process();

// The effect of the stop signals.
enum class Stage {
    starting, // the process exits with 1: there is nothing to save
    training, // stop_requested() becomes true; another one after a second exits with 1
    saved,    // none: the process is about to exit
};
void install_stop_handlers(); // in Stage::starting
void set_stage(Stage stage);
void remove_stop_handlers(); // restores the default actions
bool stop_requested();

// The message for an errno of standard output.
std::string output_error(int error);
// Flushes standard output, and throws if output was lost.
void check_output();
// A program's exit status: 0, or 1 with a message if output was lost.
int output_status(const char* program);

} // namespace lns
