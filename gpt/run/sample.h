// From logits to text: temperature, top-k, top-p (nucleus), greedy.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "gpt/data/tokenizer.h"
#include "gpt/model/model.h"

namespace lns {

struct Sampling {
    double temperature = 1; // 0: always the likeliest token
    int top_k = 0;          // of the k likeliest tokens only; 0: of all
    double top_p = 1;       // of the fewest likeliest tokens that have probability p together
    uint64_t seed = 0;
    int vocabulary = 0; // of the first so many tokens only, those the tokenizer has; 0: of all
};

struct Candidate {
    int token;
    double probability;
};

// What a token is drawn from, likeliest first (of equals, the lower id), probabilities adding up
// to 1. Temperature comes first, then top-k, then top-p of what is left. Throws if a logit is NaN.
std::vector<Candidate> candidates(const float* logits, int V, const Sampling& sampling);

// Draw number i of the seed: the same logits, seed and i give the same token.
int sample_token(const float* logits, int V, const Sampling& sampling, uint64_t i);

// Continues `tokens`, which must not be empty, by up to n tokens and returns those. Each is drawn
// given the last `context` tokens. on_token sees each as it comes; false ends it there.
std::vector<int> generate(Model& model, std::vector<int> tokens, int n, int context,
                          const Sampling& sampling, const std::function<bool(int)>& on_token = {});

// The text that the tokens `made` add to a prompt: the difference between decodings of the whole,
// since a token's text may depend on those before it (SentencePiece drops the space of a first
// word). Tokens that the tokenizer does not have add nothing.
std::string continuation(const Tokenizer& tokenizer, const std::vector<int>& prompt,
                         const std::vector<int>& made);

// The length of the text without a last character that more tokens may still complete: an
// unfinished one of UTF-8, or the U+FFFD that SentencePiece decodes its bytes to.
size_t whole_characters(std::string_view text);

} // namespace lns
