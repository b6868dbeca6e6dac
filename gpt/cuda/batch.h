// A micro-batch as it lies on the host and on the GPU: one array of ints.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace lns::cuda {

// The rows of a batch sorted by token: the i-th of *count distinct tokens is tokens[i], at the rows
// order[begin[i]] … order[begin[i + 1] − 1] in ascending order.
struct TokenRows {
    const int *tokens, *begin, *order, *count;
};

// Offsets of the parts of a micro-batch: inputs, targets, TokenRows, loss_scale.
struct BatchLayout {
    int64_t rows;

    int64_t ints() const { return 5 * rows + 8; }
    int64_t targets() const { return rows; }
    int64_t order() const { return 2 * rows; }
    int64_t tokens() const { return 3 * rows; }
    int64_t begin() const { return 4 * rows; } // (rows + 1)
    int64_t count() const { return 5 * rows + 4; }
    int64_t loss_scale() const { return 5 * rows + 5; } // a float

    TokenRows token_rows(const int* batch) const {
        return {batch + tokens(), batch + begin(), batch + order(), batch + count()};
    }
};

// Writes a micro-batch to out; targets may be null. counts: scratch, (V + 1).
inline void fill_batch(int* out, const BatchLayout& at, const int* inputs, const int* targets,
                       float loss_scale, int V, std::vector<int>& counts) {
    std::copy(inputs, inputs + at.rows, out);
    if (targets) std::copy(targets, targets + at.rows, out + at.targets());
    counts.assign(V + 1, 0);
    for (int64_t i = 0; i < at.rows; i++) counts[inputs[i] + 1]++;
    int *tokens = out + at.tokens(), *begin = out + at.begin(), distinct = 0;
    for (int token = 0; token < V; token++) {
        if (counts[token + 1] > 0) tokens[distinct] = token, begin[distinct++] = counts[token];
        counts[token + 1] += counts[token];
    }
    begin[distinct] = int(at.rows);
    out[at.count()] = distinct;
    for (int64_t i = 0; i < at.rows; i++) out[at.order() + counts[inputs[i]]++] = int(i);
    std::memcpy(out + at.loss_scale(), &loss_scale, sizeof loss_scale);
}

} // namespace lns::cuda
