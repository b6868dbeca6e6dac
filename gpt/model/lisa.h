// LISA (arXiv 2403.17919): only some layers train, drawn anew every few steps; the others rest. As
// in the code of OwLore (arXiv 2405.18380; github.com/pixeli99/OwLore, src/lmflow/pipeline/
// finetuner.py), each set of layers is equally likely, and all other parameters always train.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "gpt/base/random.h"

namespace lns {

// n of the layers 0 … layers − 1, ascending; a pure function of its arguments.
inline std::vector<int> drawn_layers(uint64_t seed, uint64_t draw, int layers, int n) {
    std::vector<int> drawn(static_cast<size_t>(layers));
    std::iota(drawn.begin(), drawn.end(), 0);
    for (int i = 0; i < n; i++) {
        const uint64_t number = draw * uint64_t(layers) + uint64_t(i);
        const uint32_t other = random_below(uint32_t(layers - i), seed, fnv1a("lisa"), number);
        std::swap(drawn[size_t(i)], drawn[size_t(i) + other]);
    }
    drawn.resize(size_t(n));
    std::sort(drawn.begin(), drawn.end());
    return drawn;
}

class Lisa {
  public:
    std::vector<int> drawn; // the layers that train in the last step that was asked for

    // n of the layers train for `interval` steps each.
    Lisa(uint64_t seed, int layers, int n, int64_t interval)
        : seed(seed), n(n), interval(interval), before(size_t(layers)) {}

    // Of each layer, how many updates it has had after this step (from 1); 0 if it rests in it.
    // Takes longest after a step that is much earlier, or later.
    std::vector<int64_t> updates(int64_t step) {
        const int64_t wanted = (step - 1) / interval;
        if (wanted < draw) *this = Lisa(seed, int(before.size()), n, interval);
        while (draw < wanted) {
            for (int layer : drawn) before[size_t(layer)] += interval;
            drawn = drawn_layers(seed, uint64_t(++draw), int(before.size()), n);
        }
        std::vector<int64_t> found(before.size());
        for (int layer : drawn)
            found[size_t(layer)] = before[size_t(layer)] + step - draw * interval;
        return found;
    }

  private:
    uint64_t seed;
    int n;
    int64_t interval, draw = -1;
    std::vector<int64_t> before; // updates of each layer in earlier draws
};

} // namespace lns
