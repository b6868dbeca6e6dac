// Options to what they name: the model's configuration, the data, the tokenizer.
#pragma once

#include <memory>
#include <string>

#include "gpt/data/loader.h"
#include "gpt/data/tokenizer.h"
#include "gpt/model/config.h"
#include "gpt/model/model.h"
#include "gpt/run/options.h"

namespace lns {

// The preset, config.json or checkpoint of --init-from, changed by the flags.
Config model_config(const Options& options);

struct Data {
    std::shared_ptr<TokenSource> train, val;
    std::unique_ptr<Tokenizer> tokenizer; // null if unknown: text is then shown as token ids
    std::string why_no_tokenizer;         // why the one beside the data cannot be loaded
    TokenizerId id;                       // of the data; vocab_size 0 if unknown
};

// Throws unless training and validation tokens were made by the same tokenizer.
Data open_data(const Options& options);

// -j, or if it is "" the shards beside those of -i; "" (stories) if both are.
std::string validation_pattern(const std::string& train, const std::string& val);

// A run's pattern, found from another working directory: unchanged if it matches files here, else
// relative to a folder in which the run (its directory, or "") was started. Throws, naming those
// folders, if it matches no file.
std::string saved_pattern(const std::string& pattern, const std::string& run);
// The same for every path that a continued run has from its saved flags.
void find_saved_paths(Options& options, const SavedFlags& saved);

// Shards, or if the pattern is "" held-out stories of that seed.
std::shared_ptr<TokenSource> open_validation(const std::string& pattern, int64_t seed);

// --tokenizer, else the one beside the shards of `pattern` ("": none), else the one `id` itself
// defines, else null. Throws if it did not make the tokens. If `why_none` is given, it receives why
// the one beside the shards cannot be loaded.
std::unique_ptr<Tokenizer> find_tokenizer(const std::string& spec, const std::string& pattern,
                                          const TokenizerId& id, std::string* why_none = nullptr);

// Throws unless the tokenizer, found in dir, is that of `id` (vocab_size 0: any).
void expect_tokenizer(const Tokenizer& tokenizer, const std::string& dir, const TokenizerId& id);

// Throws if the weights at `path` belong to another tokenizer than `id`, as their run recorded it,
// or else as the tokenizer's files beside them say.
void expect_tokenizer_of_weights(const std::string& path, const TokenizerId& id);

// Takes the data's vocabulary unless a preset or --vocab sets it. Throws if the data has tokens
// beyond the model's vocabulary.
void fit_vocabulary(const Options& options, Data& data, Config& config);

// Throws if T exceeds the positions, or B·T is absurdly large.
void check_length(int64_t B, int64_t T, const Config& config);

// Tokens of a step over all ranks, and sequences of a micro-batch on each.
struct StepShape {
    int64_t tokens = 0, batch = 0;
};
// --total-batch, in equal parts for all ranks, in micro-batches of --batch; a continued run without
// -b takes a smaller micro-batch if that is needed. Throws, suggesting a fix, if it does not
// divide.
StepShape step_shape(const Options& options, int ranks);

// The device, precision and recomputation that the flags choose. --device auto is a GPU if there is
// one; --dtype auto is `trained` ("float32" or "bf16") if given, else bf16 on a GPU or a CPU that
// multiplies it. Throws if flags contradict each other or the machine.
ModelOptions model_options(const Options& options, Purpose purpose,
                           const std::string& trained = "");

// Those of an update that the flags choose.
Hyperparameters hyperparameters(const Options& options, double lr, double muon_lr, int64_t step);

// "bf16 (AMX-BF16), float32 master weights and moments"
std::string describe_precision(const ModelOptions& options);

// Sets and returns the number of OpenMP threads: --threads or default_threads(). If the model is on
// the CPU and they use all cores, each is pinned to one.
int use_threads(const Options& options);

} // namespace lns
