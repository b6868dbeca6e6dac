#include "gpt/run/score.h"

#include <algorithm>
#include <optional>

#include "gpt/base/error.h"
#include "gpt/base/terminal.h"
#include "gpt/data/unicode.h"

namespace lns {

namespace {

// Encodes many continuations of one context.
struct ContextEncoder {
    const Tokenizer& tokenizer;
    std::string context;
    size_t cut;
    std::vector<int> head; // the tokens of context[0, cut), whatever follows

    ContextEncoder(const Tokenizer& t, std::string text)
        : tokenizer(t), context(std::move(text)), cut(t.safe_cut(context)) {
        head = tokenizer.encode_prompt(std::string_view(context).substr(0, cut));
    }
    std::vector<int> with(const std::string& continuation) const {
        const std::string rest = context.substr(cut) + continuation;
        std::vector<int> tokens = head;
        const std::vector<int> more =
            cut > 0 ? tokenizer.encode_continuation(rest) : tokenizer.encode(rest);
        tokens.insert(tokens.end(), more.begin(), more.end());
        return tokens;
    }
};

// A sequence before it is part of a batch.
struct Sequence {
    std::vector<int> tokens, position, branch;
    std::vector<ScoredToken> scored; // rows of the sequence
    std::vector<int> request;
};

size_t common_length(const std::vector<int>& a, size_t n, const std::vector<int>& b) {
    n = std::min(n, b.size());
    return size_t(std::mismatch(a.begin(), a.begin() + n, b.begin()).first - a.begin());
}

// The inputs of a request: all tokens but the last.
std::vector<int> inputs_of(const Request& r) { return {r.tokens.begin(), r.tokens.end() - 1}; }

// Requests that begin with the same tokens, in one sequence.
struct Shared {
    std::vector<std::vector<int>> inputs; // that differ
    std::vector<std::pair<int, const Request*>> requests;
    std::vector<size_t> input; // of each request
    size_t shared = 0;         // tokens

    void add(int number, const Request& r) {
        const std::vector<int> tokens = inputs_of(r);
        size_t i = 0;
        while (i < inputs.size() && inputs[i] != tokens) i++;
        if (i == inputs.size()) {
            shared = inputs.empty() ? tokens.size() : common_length(inputs[0], shared, tokens);
            inputs.push_back(tokens);
        }
        requests.push_back({number, &r}), input.push_back(i);
    }
    size_t rows() const {
        size_t n = shared;
        for (const auto& x : inputs) n += x.size() - shared;
        return n;
    }
    Sequence sequence() const {
        Sequence s;
        std::vector<size_t> begin; // of each input's own rows
        auto append = [&](const std::vector<int>& tokens, size_t from, size_t to, size_t branch) {
            for (size_t i = from; i < to; i++) {
                s.tokens.push_back(tokens[i]), s.position.push_back(int(i));
                s.branch.push_back(int(branch));
            }
        };
        append(inputs[0], 0, shared, 0);
        for (const auto& x : inputs) {
            begin.push_back(s.tokens.size());
            append(x, shared, x.size(), s.tokens.size());
        }
        for (size_t r = 0; r < requests.size(); r++) {
            const Request& request = *requests[r].second;
            for (size_t i = request.continuation; i < request.tokens.size(); i++) {
                const size_t at = i - 1; // the input after which the token comes
                const size_t row = at < shared ? at : begin[input[r]] + at - shared;
                s.scored.push_back({int64_t(row), request.tokens[i]});
                s.request.push_back(requests[r].first);
            }
        }
        return s;
    }
};

std::vector<Sequence> sequences_of(const std::vector<std::vector<Request>>& questions,
                                   size_t rows) {
    std::vector<Sequence> sequences;
    Shared open; // of questions with one input each
    auto close = [&](Shared& s) {
        if (!s.requests.empty()) sequences.push_back(s.sequence());
        s = {};
    };
    int number = 0;
    for (const std::vector<Request>& question : questions) {
        Shared own;
        for (const Request& r : question) {
            if (r.tokens.size() - 1 > rows)
                fail("a question has ", r.tokens.size() - 1, " tokens, and a batch ", rows);
            Shared with = own;
            with.add(number, r);
            if (with.rows() > rows) {
                close(own);
                with = {};
                with.add(number, r);
            }
            own = std::move(with);
            number++;
        }
        if (own.inputs.size() != 1) {
            close(own);
            continue;
        }
        // Joins the questions before if that saves half of it. Attention passes over the keys of
        // other branches, too, so that long sequences cost more than they save.
        Shared joined = open;
        for (const auto& [n, request] : own.requests) joined.add(n, *request);
        if (open.requests.empty() || (2 * joined.shared >= own.inputs[0].size() &&
                                      joined.rows() <= std::min(rows, 3 * joined.shared))) {
            open = std::move(joined);
        } else {
            close(open);
            open = std::move(own);
        }
    }
    close(open);
    return sequences;
}

void add_scores(std::vector<double>& sums, const ScoreBatch& batch,
                const std::vector<double>& scores) {
    for (size_t i = 0; i < scores.size(); i++) sums[size_t(batch.request[i])] += scores[i];
}

} // namespace

std::vector<Request> encode_question(const Tokenizer& tokenizer, const Question& question,
                                     int max_length) {
    std::vector<Request> requests;
    std::optional<ContextEncoder> encoder;
    std::vector<int> context_tokens;
    for (int i = 0; i < question.choices(); i++) {
        const std::string& whole = question.context(i);
        const std::string context(stripped(whole, false)); // as Python's rstrip()
        const std::string continuation = whole.substr(context.size()) + question.continuation(i);
        if (!encoder || encoder->context != context) {
            encoder.emplace(tokenizer, context);
            context_tokens = encoder->with("");
        }
        Request r;
        if (whole.empty()) { // the token that begins a text is its context
            const int begin = tokenizer.bos >= 0 ? tokenizer.bos : tokenizer.eot();
            r.tokens = tokenizer.encode(continuation);
            if (begin < 0) fail("the tokenizer has no token that begins a text without context");
            if (r.tokens.empty() || r.tokens[0] != begin) r.tokens.insert(r.tokens.begin(), begin);
            r.continuation = 1;
        } else {
            r.tokens = encoder->with(continuation);
            r.continuation = context_tokens.size();
            if (r.tokens.size() > r.continuation)
                std::copy(context_tokens.begin(), context_tokens.end(), r.tokens.begin());
        }
        const size_t n = r.tokens.size() - std::min(r.tokens.size(), r.continuation);
        if (n == 0 || n > size_t(max_length) || r.continuation == 0)
            fail("the answer ", one_line(question.continuation(i)), " has ", n,
                 " tokens, expected 1 to ", max_length, ", the longest sequence");
        if (r.tokens.size() > size_t(max_length) + 1) {
            const size_t dropped = r.tokens.size() - size_t(max_length) - 1;
            r.tokens.erase(r.tokens.begin(), r.tokens.begin() + int64_t(dropped));
            r.continuation -= dropped;
        }
        requests.push_back(std::move(r));
    }
    return requests;
}

std::vector<ScoreBatch> pack_requests(const std::vector<std::vector<Request>>& questions,
                                      int64_t rows) {
    std::vector<Sequence> sequences = sequences_of(questions, size_t(rows));
    std::stable_sort(sequences.begin(), sequences.end(), [](const Sequence& a, const Sequence& b) {
        return a.tokens.size() > b.tokens.size();
    });
    std::vector<ScoreBatch> batches;
    for (const Sequence& s : sequences) {
        if (batches.empty() || int64_t(batches.back().B + 1) * batches.back().T > rows) {
            batches.emplace_back();
            batches.back().T = int(s.tokens.size());
        }
        ScoreBatch& b = batches.back();
        const int64_t first = int64_t(b.B++) * b.T;
        const size_t padding = size_t(b.T) - s.tokens.size();
        b.inputs.insert(b.inputs.end(), s.tokens.begin(), s.tokens.end());
        b.position.insert(b.position.end(), s.position.begin(), s.position.end());
        b.branch.insert(b.branch.end(), s.branch.begin(), s.branch.end());
        b.inputs.insert(b.inputs.end(), padding, 0);
        b.position.insert(b.position.end(), padding, 0);
        for (int row = int(s.tokens.size()); row < b.T; row++) b.branch.push_back(row);
        for (auto [row, token] : s.scored) b.scored.push_back({first + row, token});
        b.request.insert(b.request.end(), s.request.begin(), s.request.end());
    }
    return batches;
}

std::vector<double> score_requests(Model& model, const std::vector<ScoreBatch>& batches,
                                   size_t requests, const Ranks& ranks,
                                   const std::function<void(double)>& tell,
                                   const std::function<bool()>& stop) {
    std::vector<double> sums(requests);
    int64_t all = 0, done = 0;
    for (const ScoreBatch& b : batches) all += int64_t(b.inputs.size());
    CaughtError error;
    for (size_t i = 0; i < batches.size(); i++) {
        const ScoreBatch& b = batches[i];
        done += int64_t(b.inputs.size());
        if (stop && int64_t(i) % ranks.size == 0 && ranks.any(stop())) return {};
        if (int64_t(i) % ranks.size != ranks.rank) continue;
        error.run([&] {
            std::vector<double> scores(b.scored.size());
            model.score(b.inputs.data(), b.B, b.T, b.branches(), b.scored, scores.data());
            add_scores(sums, b, scores);
            if (tell) tell(double(done) / double(all));
        });
    }
    error.share(ranks);
    ranks.sum(sums.data(), int(sums.size()));
    return sums;
}

std::vector<std::vector<double>> score_without_layers(Model& model,
                                                      const std::vector<ScoreBatch>& batches,
                                                      size_t requests,
                                                      const std::function<void(double)>& tell) {
    const int L = model.config.layers;
    std::vector<std::vector<double>> sums(size_t(L) + 1, std::vector<double>(requests));
    double all = 0, done = 0; // layers to run, of all rows
    for (const ScoreBatch& b : batches) all += double(b.inputs.size()) * L * (L + 1) / 2;
    for (const ScoreBatch& b : batches) {
        std::vector<double> scores(b.scored.size());
        auto finish = [&](int without, int begin) {
            for (int l = begin; l < L; l++) model.run_layer(l);
            model.finish(b.scored, scores.data());
            add_scores(sums[size_t(without)], b, scores);
            done += double(b.inputs.size()) * (L - begin);
            if (tell) tell(done / all);
        };
        model.embed(b.inputs.data(), b.B, b.T, b.branches());
        finish(L, 0);
        for (int l = L - 1; l >= 0; l--) { // backwards: running layers overwrites later r only
            model.rewind(l);
            finish(l, l + 1);
        }
    }
    return sums;
}

} // namespace lns
