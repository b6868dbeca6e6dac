#include "gpt/run/sample.h"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <iterator>
#include <unistd.h>

#include "gpt/base/error.h"
#include "gpt/base/random.h"
#include "gpt/base/signals.h"
#include "gpt/base/terminal.h"

namespace lns {

std::vector<Candidate> candidates(const float* logits, int V, const Sampling& s) {
    std::vector<Candidate> all(V);
    for (int v = 0; v < V; v++) {
        if (std::isnan(logits[v]))
            fail("the model's output is not a number (logit ", v, " of ", V,
                 "): its weights are damaged, or training diverged");
        all[v] = {v, logits[v]};
    }
    auto likelier = [](const Candidate& a, const Candidate& b) {
        return a.probability != b.probability ? a.probability > b.probability : a.token < b.token;
    };
    size_t k = s.temperature == 0 ? 1 : s.top_k > 0 ? std::min(s.top_k, V) : V;
    std::partial_sort(all.begin(), all.begin() + k, all.end(), likelier);
    all.resize(k);
    if (k == 1) return {{all[0].token, 1}};

    // softmax(logits / temperature) over the top k
    double max = all[0].probability, sum = 0;
    for (Candidate& c : all) sum += c.probability = std::exp((c.probability - max) / s.temperature);
    double kept = 0;
    size_t n = 0;
    while (n < all.size() && (n == 0 || kept < s.top_p * sum)) kept += all[n++].probability;
    all.resize(n);
    for (Candidate& c : all) c.probability /= kept;
    return all;
}

int sample_token(const float* logits, int V, const Sampling& s, uint64_t i) {
    std::vector<Candidate> from = candidates(logits, V, s);
    double left = random_uniform(s.seed, fnv1a("sample"), i);
    for (const Candidate& c : from)
        if ((left -= c.probability) < 0) return c.token;
    return from.back().token; // rounding
}

std::vector<int> generate(Model& model, std::vector<int> tokens, int n, int context,
                          const Sampling& sampling, const std::function<bool(int)>& on_token) {
    if (tokens.empty()) fail("the prompt has no tokens to continue");
    const int V = model.config.vocab_size;
    const size_t prompt = tokens.size();
    const int drawable = sampling.vocabulary > 0 ? std::min(sampling.vocabulary, V) : V;
    std::vector<float> logits(V);
    for (int i = 0; i < n; i++) {
        int T = int(std::min(tokens.size(), size_t(context)));
        model.logits(tokens.data() + tokens.size() - T, 1, T, true, logits.data());
        tokens.push_back(sample_token(logits.data(), drawable, sampling, i));
        if (on_token && !on_token(tokens.back())) break;
    }
    tokens.erase(tokens.begin(), tokens.begin() + prompt);
    return tokens;
}

std::string continuation(const Tokenizer& tokenizer, const std::vector<int>& prompt,
                         const std::vector<int>& generated) {
    std::vector<int> tokens;
    auto add = [&](const std::vector<int>& more) {
        std::copy_if(more.begin(), more.end(), std::back_inserter(tokens),
                     [&](int token) { return tokenizer.has(token); });
    };
    add(prompt);
    const std::string before = tokenizer.decode(tokens);
    add(generated);
    const std::string whole = tokenizer.decode(tokens);
    // If the prompt ends within a character, generated tokens change how its end decodes.
    size_t same =
        size_t(std::mismatch(before.begin(), before.end(), whole.begin(), whole.end()).first -
               before.begin());
    while (same < before.size() && same > 0 && (whole[same] & 0xC0) == 0x80) same--;
    return whole.substr(same);
}

size_t whole_characters(std::string_view text) {
    const std::string_view replaced = "\uFFFD";
    size_t end = text.size();
    for (int i = 0; i < 3 && end >= replaced.size(); i++) {
        if (text.substr(end - replaced.size(), replaced.size()) != replaced) break;
        end -= replaced.size();
    }
    if (end < text.size()) return end;
    for (size_t back = 1; back <= 3 && back <= end; back++) {
        const unsigned char byte = static_cast<unsigned char>(text[end - back]);
        if (byte < 0x80) break;
        const size_t length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 0;
        if (length > back) return end - back;
        if (length) break;
    }
    return end;
}

void check_prompt(const std::vector<int>& tokens, int vocabulary) {
    for (int token : tokens)
        if (token >= vocabulary)
            fail("token ", token, " of the prompt is not in the model's vocabulary of ", vocabulary,
                 ": the tokenizer is not the model's");
}

void TextStream::show(const std::string& text, size_t end) {
    if (end <= written_) return;
    const std::string part = text.substr(written_, end - written_);
    std::cout << (isatty(STDOUT_FILENO) ? printable(part) : part) << std::flush;
    check_output();
    written_ = end;
}

} // namespace lns
