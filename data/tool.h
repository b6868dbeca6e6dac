// The main function of the tools in data/.
#pragma once

#include "gpt/base/error.h"
#include "gpt/base/signals.h"
#include "gpt/base/terminal.h"

#include <CLI/CLI.hpp>
#include <cstdio>

namespace lns {

// Parses the command line, calls run(), and returns the exit status. Errors go to stderr, as
// sentences after the tool's name.
template <class Run>
int run_tool(const char* name, CLI::App& app, int argc, char** argv, const Run& run) {
    try {
        app.parse(argc, argv);
        run();
        return output_status(name);
    } catch (const CLI::ParseError& error) {
        if (error.get_exit_code() == 0) { // --help
            app.exit(error);
            return output_status(name);
        }
        std::fprintf(stderr, "%s: %s. See data/%s --help\n", name, one_line(error.what()).c_str(),
                     name);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", name, one_line(error.what()).c_str());
    }
    return 1;
}

} // namespace lns
