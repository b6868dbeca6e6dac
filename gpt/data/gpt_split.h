// The splitting rules of GPT-2 and of GPT-4's family, many times faster than as regexes. A text is
// split into pieces, which are encoded independently; alternatives are tried from left to right.
//
// GPT-2 (openai/gpt-2, src/encoder.py):
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// GPT-4's family, with at most k digits in a piece (3: Llama 3, OLMo 2; 1: Qwen):
//   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,k}|
//    ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
//
// They depend only on classes of characters. Each invalid byte is a symbol, like U+FFFD.
#pragma once

#include "gpt/data/unicode.h"

#include <cstddef>
#include <string>
#include <string_view>

namespace lns {

struct GptSplit {
    enum Rule { gpt2, gpt4 } rule = gpt2;
    size_t most_digits = 1; // of gpt4's pieces
    // gpt2: how digits are split off first, if they are.
    enum Digits { in_runs_with_spaces, each, runs } digits = in_runs_with_spaces;

    // Throws if the build has no library for the classes.
    GptSplit();
    // Whether the regex is that of a gpt4 rule, which is then chosen.
    bool choose(const std::string& regex);

    // The end of the segment that starts at i < text.size(). `digits` first splits a text into
    // segments (digits, one by one or in runs, and the text between), each then split on its own.
    size_t segment_end(std::string_view text, size_t i) const;
    // The end of the piece that starts at i < text.size().
    size_t next_piece(std::string_view text, size_t i) const;
    // See Tokenizer::safe_cut.
    size_t safe_cut(std::string_view text) const;

  private:
    const CharacterClass* table;
    CharacterClass at(std::string_view text, size_t i, size_t& length) const;
    size_t run_end(std::string_view text, size_t i, CharacterClass kind) const;
    size_t next_piece_gpt2(std::string_view text, size_t i) const;
    size_t next_piece_gpt4(std::string_view text, size_t i) const;
};

} // namespace lns
