// The summary that a run prints before it starts: build, machine, model, data, schedule.
#pragma once

#include <string>

#include "gpt/base/ranks.h"
#include "gpt/model/model.h"
#include "gpt/model/schedule.h"
#include "gpt/run/device.h"
#include "gpt/run/setup.h"

namespace lns {

// The build's features and this machine's hardware. peak: summed over ranks; 0 if not measured.
std::string describe_machine(int threads, const Ranks& ranks, const Peak& peak,
                             const ModelOptions& options);

// A table of parameters by kind, then totals, FLOPs and the memory of one rank.
std::string describe_model(const Config& config, int B, int T, const ModelOptions& options);

// Sources, tokens, windows, and the number of epochs.
std::string describe_data(const Data& data, const Loader& train, const Loader& val, double windows);

std::string describe_schedule(const Schedule& schedule, const Options& options,
                              int64_t tokens_per_step, int64_t micro_batches);

// Of a run with --lisa: how many layers and parameters train at a time. flops: for a token.
std::string describe_lisa(const Options& options, const Config& config, double flops);

// A bar chart of the residual stream's variance after each layer.
std::string describe_variance(const std::vector<double>& variance);

} // namespace lns
