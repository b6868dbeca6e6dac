// The banner of a run: the build, the machine, the model, the data, the schedule.
#pragma once

#include <string>

#include "gpt/base/ranks.h"
#include "gpt/model/model.h"
#include "gpt/model/schedule.h"
#include "gpt/run/device.h"
#include "gpt/run/setup.h"

namespace lns {

// The build and the machine. peak: of all ranks; 0: not measured.
std::string describe_machine(int threads, const Ranks& ranks, const Peak& peak,
                             const ModelOptions& options);

// A table of the parameters; then totals, FLOPs and memory of one rank.
std::string describe_model(const Config& config, int B, int T, const ModelOptions& options);

// Sources, tokens, windows and epochs.
std::string describe_data(const Data& data, const Loader& train, const Loader& val, double windows);

std::string describe_schedule(const Schedule& schedule, const Options& options,
                              int64_t tokens_per_step, int64_t micro_batches);

// The variance of the residual stream after each layer, with bars.
std::string describe_variance(const std::vector<double>& variance);

} // namespace lns
