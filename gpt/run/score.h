// The probabilities of answers: log p(continuation | context) for many requests at once, as
// lm-evaluation-harness defines them (lm_eval/api/model.py, lm_eval/models/huggingface.py).
//
// A question's requests share the beginning of their tokens, which is computed once: in a sequence
// it stands first, and what differs stands behind it, as branches (gpt/model/model.h). Questions
// that are answered by one token are one branch each, and share their examples. Sequences are
// sorted by length, so that a batch has little padding. The head runs on the rows of continuations
// alone.
#pragma once

#include <functional>
#include <vector>

#include "gpt/base/ranks.h"
#include "gpt/data/tokenizer.h"
#include "gpt/model/model.h"
#include "gpt/run/tasks.h"

namespace lns {

// The tokens of a context and, from `continuation` on, of what is scored.
struct Request {
    std::vector<int> tokens;
    size_t continuation = 0;
};

// The requests of a question, one for each choice. Context and continuation are encoded together
// and split at the length of the encoded context; spaces that end the context belong to the
// continuation. Of more than max_length + 1 tokens the first are dropped. Throws if a continuation
// has no token, or more than max_length.
std::vector<Request> encode_question(const Tokenizer& tokenizer, const Question& question,
                                     int max_length);

// Sequences of one forward pass, (B, T). Each row of padding is a branch of its own.
struct ScoreBatch {
    int B = 0, T = 0;
    std::vector<int> inputs, position, branch; // as Model::score takes them
    std::vector<ScoredToken> scored;
    std::vector<int> request; // of each scored token

    Branches branches() const { return {position.data(), branch.data()}; }
};

// The requests of each question in turn, numbered throughout, in batches of at most `rows` rows;
// the longest first. Throws if a request alone is longer.
std::vector<ScoreBatch> pack_requests(const std::vector<std::vector<Request>>& questions,
                                      int64_t rows);

// The log-probability of each request's continuation, on every rank; each computes its share of
// the batches. tell(done) reports the share of the work that is done, and may throw. stop is asked
// between batches: true on any rank ends the work, and nothing is returned.
std::vector<double> score_requests(Model& model, const std::vector<ScoreBatch>& batches,
                                   size_t requests, const Ranks& ranks,
                                   const std::function<void(double)>& tell = {},
                                   const std::function<bool()>& stop = {});

// The same without each layer in turn: [l] for layer l from 0; [L] is the whole model's. Requires a
// model that runs layer by layer.
std::vector<std::vector<double>> score_without_layers(Model& model,
                                                      const std::vector<ScoreBatch>& batches,
                                                      size_t requests,
                                                      const std::function<void(double)>& tell = {});

} // namespace lns
