// The learning rate as a function of the step: warmup, then one of four curves.
//
// Steps count from 1: the first step has 1 / warmup of the peak, step `warmup` the peak, and the
// last step exactly peak · final_fraction (except under `constant`). PyTorch's LambdaLR, as in the
// code of arXiv 2502.05795, counts from 0: its first update has rate 0, and its schedule lags ours
// by one step.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "gpt/base/error.h"
#include "gpt/base/suggest.h"

namespace lns {

struct Schedule {
    std::string kind = "cosine"; // one of schedule_kinds
    double peak = 1e-3;
    int64_t steps = 0;  // total
    int64_t warmup = 0; // a run shorter than its warmup ends below the peak
    double final_fraction = 0.1;
};

inline const std::vector<std::string> schedule_kinds = {"cosine", "linear", "wsd", "constant"};

// The fraction of the run in which wsd decays (arXiv 2405.18392, which found 1 − √x the best
// curve).
constexpr double wsd_decay_fraction = 0.2;

inline double learning_rate(const Schedule& s, int64_t step) {
    if (step < s.warmup) return s.peak * double(step) / double(s.warmup);

    // 1 at the peak, 0 at the end; x goes from 0 to 1 over the decay.
    auto curve = [&]() -> double {
        int64_t begin = s.warmup;
        if (s.kind == "wsd")
            begin = std::max(begin, s.steps - int64_t(wsd_decay_fraction * s.steps));
        if (step <= begin || s.kind == "constant") return 1;
        if (step >= s.steps) return 0;
        double x = double(step - begin) / double(s.steps - begin);
        if (s.kind == "cosine") return 0.5 * (1 + std::cos(3.14159265358979323846 * x));
        if (s.kind == "linear") return 1 - x;
        if (s.kind == "wsd") return 1 - std::sqrt(x); // warmup, stable, decay
        fail("unknown schedule '", s.kind, "'.", did_you_mean(s.kind, schedule_kinds),
             " The schedules are ", join(schedule_kinds), ".");
    };
    return s.peak * (s.final_fraction + (1 - s.final_fraction) * curve());
}

} // namespace lns
