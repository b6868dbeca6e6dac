// Signals. While a run trains, HUP, INT, TERM, USR1, USR2 and XCPU ask it to stop: it saves and
// exits with 130, which always means saved. PIPE and XFSZ become errors of writing, and what was
// printed is known to have arrived.
#pragma once

#include <string>

namespace lns {

// To be called first by main. A closed standard descriptor is opened again, so that no file gets
// its number and what is printed; writing to it still fails.
void prepare_process();

// What the stop signals do now.
enum class Stage {
    starting, // end the process, status 1: nothing is there to save
    training, // the first makes stop_requested() true; one a second later ends the process, status
              // 1
    saved,    // nothing: the process is about to end
};
void install_stop_handlers(); // of Stage::starting
void enter(Stage stage);
void remove_stop_handlers(); // the signals end the process again, with no word
bool stop_requested();

// The sentence for an errno of the standard output.
std::string output_failed(int error);
// Throws if what was printed on the standard output did not get there.
void check_output();
// For a program's end: 0, or 1 where check_output throws, which is told on stderr.
int output_status(const char* program);

} // namespace lns
