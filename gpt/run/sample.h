// Sampling text from logits: temperature, top-k, top-p (nucleus), greedy.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "gpt/data/tokenizer.h"
#include "gpt/model/model.h"

namespace lns {

struct Sampling {
    double temperature = 1; // 0: greedy
    int top_k = 0;          // keep the k likeliest tokens; 0: all
    double top_p = 1;       // keep the smallest set of likeliest tokens with total probability p
    uint64_t seed = 0;
    int vocabulary = 0; // draw from the first `vocabulary` tokens, the tokenizer's; 0: all
};

struct Candidate {
    int token;
    double probability;
};

// The distribution that a token is drawn from: normalized, likeliest first, ties by lower id.
// Applies temperature, then top-k, then top-p. Throws if a logit is NaN.
std::vector<Candidate> candidates(const float* logits, int V, const Sampling& sampling);

// The i-th draw of the seed: a function of logits, seed and i alone.
int sample_token(const float* logits, int V, const Sampling& sampling, uint64_t i);

// Returns up to n tokens that continue `tokens`, which must not be empty. Each is conditioned on
// the last `context` tokens. on_token is called with each and stops generation by returning false.
std::vector<int> generate(Model& model, std::vector<int> tokens, int n, int context,
                          const Sampling& sampling, const std::function<bool(int)>& on_token = {});

// The text that the `generated` tokens add to the prompt. Both are decoded together, since a
// token's text may depend on those before it (SentencePiece drops the space of a first word).
// Tokens unknown to the tokenizer are skipped.
std::string continuation(const Tokenizer& tokenizer, const std::vector<int>& prompt,
                         const std::vector<int>& generated);

// The length of the text without a last character that later tokens may complete: a partial UTF-8
// sequence, or the U+FFFD that SentencePiece decodes its bytes to.
size_t whole_characters(std::string_view text);

// Throws unless all tokens of a prompt are below the vocabulary.
void check_prompt(const std::vector<int>& tokens, int vocabulary);

// Writes text to standard output as it grows.
class TextStream {
  public:
    // Writes what of text[0, end) is not yet written. Throws if output is lost.
    void show(const std::string& text, size_t end);

  private:
    size_t written_ = 0;
};

} // namespace lns
