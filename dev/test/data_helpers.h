// Test helpers: a temporary directory, files as strings, a subprocess's output, and error messages.
#pragma once

#include "gpt/base/error.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <gtest/gtest.h>
#include <sstream>
#include <string>
#include <sys/wait.h>
#include <vector>

namespace lns::test {

struct TemporaryDirectory {
    std::string path = (std::filesystem::temp_directory_path() / "lns-test-XXXXXX").string();
    TemporaryDirectory() {
        if (!mkdtemp(path.data())) fail("cannot make a temporary directory ", path);
    }
    TemporaryDirectory(const TemporaryDirectory&) = delete;
    TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
    ~TemporaryDirectory() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
    std::string operator/(const std::string& name) const { return path + "/" + name; }
};

inline std::string read_bytes(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) fail("cannot read ", path);
    std::ostringstream out;
    out << in.rdbuf();
    return out.str();
}

inline void write_bytes(const std::string& path, const std::string& bytes) {
    std::ofstream out(path, std::ios::binary);
    out << bytes;
    out.close();
    if (!out) fail("cannot write ", path);
}

// The message of the action's Error, or "" if it does not fail.
template <class Action> std::string error_of(Action action) {
    try {
        action();
    } catch (const Error& error) {
        return error.what();
    }
    return "";
}

// Whether the sentence contains all parts.
inline testing::AssertionResult says(const std::string& sentence,
                                     const std::vector<std::string>& parts) {
    for (const std::string& part : parts)
        if (sentence.find(part) == std::string::npos)
            return testing::AssertionFailure()
                   << "'" << sentence << "' does not say '" << part << "'";
    return testing::AssertionSuccess();
}

struct Finished {
    int status; // exit status, or 128 + signal
    std::string output;
};

// Runs a shell command; stdout and stderr together.
inline Finished run(const std::string& command) {
    FILE* pipe = popen(("{ " + command + "\n} 2>&1").c_str(), "r");
    if (!pipe) fail("cannot run ", command);
    std::string output;
    char block[4096];
    while (size_t n = fread(block, 1, sizeof block, pipe)) output.append(block, n);
    int status = pclose(pipe);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), output};
}

} // namespace lns::test
