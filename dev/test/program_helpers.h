// For tests that run ./train_gpt as a user does, with a model that trains in an instant.
#pragma once

#include "dev/test/data_helpers.h"

#include "gpt/data/shard.h"
#include "gpt/data/tokenizer.h"

namespace lns::test {

inline const std::string small_model =
    " --threads 1 --layers 2 --width 16 --heads 2 -b 2 -t 16 --val-tokens 64 -v 0 -s 0 -g 4 ";

// These tests run the program on the CPU even if there is a GPU.
inline const bool no_gpu = setenv("CUDA_VISIBLE_DEVICES", "", 1) == 0;

inline Finished train_gpt(const std::string& arguments) { return run("./train_gpt " + arguments); }

// Sanitizer builds have only the tests.
#define NEEDS_PROGRAM()                                                                            \
    if (!std::filesystem::exists("train_gpt")) GTEST_SKIP() << "./train_gpt is not built"

// Expects status 1 and one line on stderr with these parts.
inline testing::AssertionResult fails_with(const std::string& arguments,
                                           const std::vector<std::string>& parts) {
    Finished f = train_gpt(arguments + " >/dev/null");
    if (f.status != 1)
        return testing::AssertionFailure() << "status " << f.status << ": " << f.output;
    if (f.output.rfind("train_gpt: ", 0) != 0 ||
        std::count(f.output.begin(), f.output.end(), '\n') != 1)
        return testing::AssertionFailure() << "not one sentence: " << f.output;
    return says(f.output, parts);
}

// n tokens below 200, partly predictable.
inline void write_shard(const std::string& path, size_t n,
                        TokenizerId id = load_tokenizer("bytes")->id()) {
    std::vector<int> tokens(n);
    for (size_t i = 0; i < n; i++) tokens[i] = int((i * i / 7 + i % 13) % 200);
    ShardWriter writer(path, id);
    writer.write(tokens.data(), n);
    writer.close();
}

} // namespace lns::test
