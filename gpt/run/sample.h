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
    int top_k = 0;          // only the k likeliest tokens; 0: all
    double top_p = 1;       // only the likeliest tokens whose probabilities add up to p
    uint64_t seed = 0;
    int vocabulary = 0; // only the first tokens, those that the tokenizer has; 0: all
};

struct Candidate {
    int token;
    double probability;
};

// The distribution of the next token, likeliest first (then by id). Temperature comes first, then
// top-k, then top-p of the rest. Throws if a logit is NaN.
std::vector<Candidate> candidates(const float* logits, int V, const Sampling& sampling);

// Draw number i of the seed: the same logits, seed and i give the same token.
int sample_token(const float* logits, int V, const Sampling& sampling, uint64_t i);

// Continues `tokens`, which must not be empty, by up to n tokens and returns these. Each is drawn
// given the last `context` tokens. on_token is called with each; false ends the text.
std::vector<int> generate(Model& model, std::vector<int> tokens, int n, int context,
                          const Sampling& sampling, const std::function<bool(int)>& on_token = {});

// The text that the tokens `made` add to a prompt: the difference between decoding both and the
// prompt alone, since a token's text may depend on those before it (SentencePiece drops the first
// word's space). Unknown tokens add nothing.
std::string continuation(const Tokenizer& tokenizer, const std::vector<int>& prompt,
                         const std::vector<int>& made);

// The length of the text without a last character that more tokens may complete: incomplete UTF-8,
// or the U+FFFD that SentencePiece decodes it to.
size_t whole_characters(std::string_view text);

} // namespace lns
