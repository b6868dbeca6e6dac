// A conversation with a model: lines of a terminal or of standard input, and its answers.
#pragma once

#include <string>

#include "gpt/data/chat.h"
#include "gpt/model/model.h"
#include "gpt/run/sample.h"

namespace lns {

struct ChatSettings {
    std::string system; // "": none
    int context = 0;    // tokens of the conversation; its oldest turns are forgotten
    int longest = 0;    // tokens of an answer
    Sampling sampling;
};

// Reads and answers until the end of the input. On a terminal lines can be edited and recalled, if
// the program is built with libedit, and Ctrl-C stops an answer.
void chat(Model& model, const Tokenizer& tokenizer, const ChatTemplate& format,
          const ChatSettings& settings);

} // namespace lns
