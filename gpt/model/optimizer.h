// Optimizers: how weights are updated, and what is remembered of each from step to step. The flag
// --optimizer, memory plans, checkpoints, the comparison of ranks and the dispatch of the update
// follow from a row of the table in optimizer.cpp.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "gpt/model/params.h"

namespace lns {

// How a parameter is updated: a function of each backend.
enum class UpdateRule { adamw, muon, normuon };

// Muon's polynomials and the scale of its learning rate (gpt/model/muon.h).
enum class Orthogonalization { newton_schulz, polar_express };
enum class MuonScale { moonlight, jordan };

// A buffer with a number for each element of the parameters that have this state, or for each row.
struct OptimizerState {
    std::string name;                  // the prefix of its tensors in optimizer.safetensors: m.NAME
    std::string what;                  // for messages: "first moments"
    bool matrices = true, rest = true; // whether these have it: Param::layer_matrix; the others
    bool of_rows = false;              // a number for each row of a matrix
};

struct Optimizer {
    std::string name;          // as --optimizer has it
    std::string title;         // for people
    UpdateRule matrices, rest; // of Param::layer_matrix, of the others
    std::vector<OptimizerState> states;

    // The index of a state by its name.
    int index(const char* state) const {
        int i = 0;
        while (states.at(size_t(i)).name != state) i++;
        return i;
    }
    UpdateRule rule(const Param& p) const { return p.layer_matrix ? matrices : rest; }
    bool has(int state, const Param& p) const {
        return p.layer_matrix ? states[size_t(state)].matrices : states[size_t(state)].rest;
    }
    // A parameter in the shape that its state has: (rows) if that is of rows.
    Param shaped(int state, Param p) const {
        if (states[size_t(state)].of_rows) p.shape.resize(1), p.transposed = false;
        return p;
    }
};

const std::vector<Optimizer>& optimizers();
std::vector<std::string> optimizer_names();

// Throws for an unknown name, suggesting similar ones.
const Optimizer& optimizer_row(const std::string& name);

// Hyperparameters of an update; a rule reads those that it has.
struct Hyperparameters {
    double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
    double weight_decay = 0; // decoupled, on matrices only
    int64_t step = 1;        // counts from 1, for the bias correction
    double grad_scale = 1;   // multiplies every gradient first: clipping
    bool cautious = false;   // weights decay only where the update does not make them larger

    double muon_lr = 1e-3, momentum = 0.95; // of the matrices that Muon updates
    Orthogonalization orthogonalization = Orthogonalization::newton_schulz;
    MuonScale muon_scale = MuonScale::moonlight;

    // LISA: of each layer, what step is for the whole model, 0 where it rests: the layer does not
    // change, has no gradient, and keeps its states. Empty: all train.
    std::vector<int64_t> layer_steps = {};

    // A layer of −1 stands for what belongs to none.
    int64_t step_of(int layer) const {
        return layer < 0 || layer_steps.empty() ? step : layer_steps[size_t(layer)];
    }
    bool rests(int layer) const { return step_of(layer) == 0; }
};

// Parameters that follow each other in the flat buffers, [begin, end), and share a rule.
struct UpdateRange {
    UpdateRule rule;
    int layer;          // of all of them, where ranges end at layers; else −1
    size_t first, last; // of Registry::params, `last` excluded
    int64_t begin, end;
    std::vector<int64_t> states; // where each state's numbers of these begin; −1: none, or of rows

    int64_t size() const { return end - begin; }
};

// Where each optimizer state is in memory. The ranges cover the flat buffers, alignment included.
struct OptimizerLayout {
    std::vector<UpdateRange> ranges, layer_ranges; // the latter also end where a layer does
    std::vector<int64_t> sizes;                    // elements of each state

    // Of the matrices that Muon updates: the most elements, rows, and elements of A that one has.
    int64_t largest = 0, most_rows = 0, gram = 0;

    OptimizerLayout(const Optimizer& optimizer, const Registry& registry);

    // Those of an update: by layer only if layers differ, for each takes a pass.
    const std::vector<UpdateRange>& ranges_of(const Hyperparameters& o) const {
        return o.layer_steps.empty() ? ranges : layer_ranges;
    }
    int64_t scratch() const { return 2 * (largest + gram); } // elements that Muon needs besides

    // Where a parameter's numbers begin in a state that it has.
    int64_t offset(int state, const Param& p) const;
    int64_t bytes(int64_t bytes_each) const; // of all states

  private:
    std::vector<std::map<int64_t, int64_t>> rows; // of a state of rows: offset() by Param::offset
};

} // namespace lns
