// Optimizers: how weights are updated, and what is remembered of each from step to step. Memory
// plans, checkpoints, the comparison of ranks and the dispatch of the update follow from a row of
// the table.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lns {

// A buffer with a number for every parameter.
struct OptimizerState {
    std::string name; // the prefix of its tensors in optimizer.safetensors: "m" for m.NAME
    std::string what; // for messages: "first moments"
};

struct Optimizer {
    enum class Kind { adamw } kind;
    std::vector<OptimizerState> states;

    int64_t bytes(int64_t parameters, int64_t bytes_each) const {
        return int64_t(states.size()) * parameters * bytes_each;
    }
};

inline const std::vector<Optimizer>& optimizers() {
    static const std::vector<Optimizer> table = {
        {.kind = Optimizer::Kind::adamw,
         .states = {{"m", "first moments"}, {"v", "second moments"}}},
    };
    return table;
}

} // namespace lns
