#include "gpt/model/optimizer.h"

#include <algorithm>
#include <numeric>

#include "gpt/base/error.h"
#include "gpt/base/suggest.h"

namespace lns {

const std::vector<Optimizer>& optimizers() {
    static const std::vector<Optimizer> table = {
        {.name = "adamw",
         .title = "AdamW", // arXiv 1711.05101
         .matrices = UpdateRule::adamw,
         .rest = UpdateRule::adamw,
         .states = {{"m", "first moments"}, {"v", "second moments"}}},
    };
    return table;
}

std::vector<std::string> optimizer_names() {
    std::vector<std::string> names;
    for (const Optimizer& row : optimizers()) names.push_back(row.name);
    return names;
}

const Optimizer& optimizer_row(const std::string& name) {
    for (const Optimizer& row : optimizers())
        if (row.name == name) return row;
    fail("the optimizer '", name, "' does not exist.", did_you_mean(name, optimizer_names()),
         " The optimizers are ", join(optimizer_names()), ".");
}

OptimizerLayout::OptimizerLayout(const Optimizer& optimizer, const Registry& registry)
    : sizes(optimizer.states.size()) {
    const std::vector<Param>& params = registry.params;
    const int states = int(sizes.size());
    auto alike = [&](const Param& p, const Param& q) {
        if (optimizer.rule(p) != optimizer.rule(q)) return false;
        for (int s = 0; s < states; s++)
            if (optimizer.has(s, p) != optimizer.has(s, q)) return false;
        return true;
    };
    for (size_t i = 0; i < params.size();) {
        const Param& p = params[i];
        UpdateRange range{optimizer.rule(p), -1, i, i + 1, p.offset, registry.size, {}};
        while (range.last < params.size() && alike(p, params[range.last])) range.last++;
        if (range.last < params.size()) range.end = params[range.last].offset;
        for (int s = 0; s < states; s++) {
            range.states.push_back(optimizer.has(s, p) ? sizes[size_t(s)] : -1);
            if (optimizer.has(s, p)) sizes[size_t(s)] += range.size();
        }
        i = range.last;
        ranges.push_back(std::move(range));
    }
    for (const UpdateRange& range : ranges)
        for (size_t i = range.first; i < range.last; i++) {
            const Param& p = params[i];
            if (i > range.first && p.layer == layer_ranges.back().layer) {
                layer_ranges.back().last++;
                continue;
            }
            if (i > range.first) layer_ranges.back().end = p.offset;
            UpdateRange& part = layer_ranges.emplace_back(range);
            part.layer = p.layer, part.first = i, part.last = i + 1, part.begin = p.offset;
            for (int64_t& at : part.states)
                if (at >= 0) at += p.offset - range.begin;
        }
}

int64_t OptimizerLayout::offset(int state, const Param& p) const {
    const auto range = std::find_if(ranges.begin(), ranges.end(),
                                    [&](const UpdateRange& r) { return p.offset < r.end; });
    return range->states[size_t(state)] + p.offset - range->begin;
}

int64_t OptimizerLayout::bytes(int64_t bytes_each) const {
    return std::accumulate(sizes.begin(), sizes.end(), int64_t(0)) * bytes_each;
}

} // namespace lns
