// From files of instructions and answers to windows of tokens for fine-tuning.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "gpt/data/chat.h"

namespace lns {

struct Record {
    std::string where; // "FILE, line 7" or "FILE, record 7"
    nlohmann::json value;
};

// The records of a text in JSON Lines, or of one JSON list. Throws an error with line and column
// for text that is neither.
void read_records(std::string_view text, const std::string& file,
                  const std::function<void(Record)>& use);

struct InstructionOptions {
    int window = 512;
    bool learn_all = false; // the prompts too
    bool pack = false;      // several examples a window
};

// One example, or why there is none.
struct Encoded {
    std::string where;
    Example example;
    enum Kind {
        usable,
        empty,    // all its answers are empty
        too_long, // its first answer begins after the window
    } kind = usable;
    bool cut = false; // longer than the window
};

// Throws an error that begins with the record's place.
Encoded encode_record(const Record& record, const ChatTemplate& format, const Tokenizer& tokenizer,
                      const InstructionOptions& options);

// Puts examples into windows, in order; packed, each into the fullest of the last windows that has
// room. An example is never split, and later ones of a window see the earlier ones.
struct Packer {
    using Write = std::function<void(const Example& window)>;

    Packer(int window, int padding_token, bool pack, Write write)
        : window(window), padding_token(padding_token), pack(pack), write(std::move(write)) {}

    void add(Example example);
    void finish();

    uint64_t padding = 0, learned = 0, windows = 0; // of what was written

  private:
    int window, padding_token;
    bool pack;
    Write write;
    std::vector<Example> open; // at most most_open, oldest first
    void close(size_t i);
};

} // namespace lns
