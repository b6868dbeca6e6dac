// Errors are sentences for the user: what was found, what was expected, where, and what to do.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace lns {

// An error caused by input, files or the machine. main prints what() and exits with 1.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The parts, concatenated.
template <class... Parts> std::string cat(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

template <class... Parts> [[noreturn]] void fail(const Parts&... parts) {
    throw Error(cat(parts...));
}

} // namespace lns
