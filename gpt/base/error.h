// Errors are sentences: what was found, what was expected, where, and what to do.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace lns {

// Anything that input, files or the machine can cause. main prints what() and exits 1.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The parts, written one after the other.
template <class... Parts> std::string cat(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

template <class... Parts> [[noreturn]] void fail(const Parts&... parts) {
    throw Error(cat(parts...));
}

} // namespace lns
