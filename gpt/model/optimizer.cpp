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
        {.name = "muon",
         .title = "Muon", // kellerjordan.github.io/posts/muon
         .matrices = UpdateRule::muon,
         .rest = UpdateRule::adamw,
         .states = {{.name = "m", .what = "first moments"},
                    {.name = "v", .what = "second moments", .matrices = false}}},
        {.name = "normuon",
         .title = "NorMuon", // arXiv 2510.05491
         .matrices = UpdateRule::normuon,
         .rest = UpdateRule::adamw,
         .states = {{.name = "m", .what = "first moments"},
                    {.name = "v", .what = "second moments", .matrices = false},
                    {.name = "v_rows", .what = "moments of rows", .rest = false, .of_rows = true}}},
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
    : sizes(optimizer.states.size()), rows(sizes.size()) {
    const std::vector<Param>& params = registry.params;
    const int states = int(sizes.size());
    auto alike = [&](const Param& p, const Param& q) {
        if (optimizer.rule(p) != optimizer.rule(q)) return false;
        for (int s = 0; s < states; s++)
            if (optimizer.has(s, p) != optimizer.has(s, q)) return false;
        return p.lr_scale == q.lr_scale && p.decay_scale == q.decay_scale &&
               p.eps_scale == q.eps_scale;
    };
    for (const Param& p : params) {
        if (optimizer.rule(p) == UpdateRule::adamw) continue;
        const int64_t smaller = std::min(p.shape[0], p.shape[1]);
        largest = std::max(largest, p.size()), gram = std::max(gram, smaller * smaller);
        most_rows = std::max(most_rows, p.shape[0]);
    }
    for (size_t s = 0; s < sizes.size(); s++)
        for (const Param& p : params)
            if (optimizer.states[s].of_rows && optimizer.has(int(s), p))
                rows[s][p.offset] = sizes[s], sizes[s] += p.shape[0];
    for (size_t i = 0; i < params.size();) {
        const Param& p = params[i];
        UpdateRange range{optimizer.rule(p), -1, i, i + 1, p.offset, registry.size, {}};
        while (range.last < params.size() && alike(p, params[range.last])) range.last++;
        if (range.last < params.size()) range.end = params[range.last].offset;
        for (int s = 0; s < states; s++) {
            const bool has = optimizer.has(s, p) && !optimizer.states[size_t(s)].of_rows;
            range.states.push_back(has ? sizes[size_t(s)] : -1);
            if (has) sizes[size_t(s)] += range.size();
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
    if (const auto& of_rows = rows[size_t(state)]; !of_rows.empty()) return of_rows.at(p.offset);
    const auto range = std::find_if(ranges.begin(), ranges.end(),
                                    [&](const UpdateRange& r) { return p.offset < r.end; });
    return range->states[size_t(state)] + p.offset - range->begin;
}

int64_t OptimizerLayout::bytes(int64_t bytes_each) const {
    return std::accumulate(sizes.begin(), sizes.end(), int64_t(0)) * bytes_each;
}

} // namespace lns
