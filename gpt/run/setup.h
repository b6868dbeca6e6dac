// From options to what they name: the model's configuration, the data, the tokenizer.
#pragma once

#include <memory>
#include <string>

#include "gpt/data/loader.h"
#include "gpt/data/tokenizer.h"
#include "gpt/model/config.h"
#include "gpt/model/model.h"
#include "gpt/run/options.h"

namespace lns {

// The preset, the config.json or the checkpoint of --init-from, with what the flags say otherwise.
Config model_config(const Options& options);

struct Data {
    std::shared_ptr<TokenSource> train, val;
    std::unique_ptr<Tokenizer> tokenizer; // null if nobody knows it: text is then token ids
    std::string why_no_tokenizer;         // of one that lies beside the data and cannot be loaded
    TokenizerId id;                       // of the data; vocab_size 0 if not known
};

// Throws unless training and validation tokens are of one tokenizer.
Data open_data(const Options& options);

// -j, or if that is "" the shards beside those of -i. "" if both are: stories.
std::string validation_pattern(const std::string& train, const std::string& val);

// A pattern that a run was given, found from another working directory: as it is if it names files
// here, else in a folder where the run (a directory, or "") was started. Throws, and names those
// folders, if it names files nowhere.
std::string saved_pattern(const std::string& pattern, const std::string& run);
// The same for every path of a run that goes on, where it is the saved one.
void find_saved_paths(Options& options, const SavedFlags& saved);

// Shards, or if the pattern is "" stories of a run of that seed, others than it trains on.
std::shared_ptr<TokenSource> open_validation(const std::string& pattern, int64_t seed);

// --tokenizer, or what is saved beside the shards that `pattern` names ("" if none), or what `id`
// says by itself; null if none of them. Throws if it is not the one that made the tokens.
// Where `why_none` is given, one beside the shards that this build cannot load is told there.
std::unique_ptr<Tokenizer> find_tokenizer(const std::string& spec, const std::string& pattern,
                                          const TokenizerId& id, std::string* why_none = nullptr);

// Throws unless the tokenizer, which lies in dir, is the one of `id` (vocab_size 0: any).
void expect_tokenizer(const Tokenizer& tokenizer, const std::string& dir, const TokenizerId& id);

// Throws if the weights at `path` are of another tokenizer than tokens of `id`: of what their run
// recorded, else of the tokenizer's files beside them. Where neither says, any will do.
void expect_tokenizer_of_weights(const std::string& path, const TokenizerId& id);

// Takes the data's vocabulary where neither a preset nor --vocab says one, and throws if the
// data's tokens do not fit the model's.
void fit_vocabulary(const Options& options, Data& data, Config& config);

// Sequences of T tokens must fit the model's positions, and B of them any machine at all.
void check_length(int64_t B, int64_t T, const Config& config);

// A step's tokens over all ranks, and the sequences of a micro-batch on each.
struct StepShape {
    int64_t tokens = 0, batch = 0;
};
// --total-batch, of which all ranks take equal parts, in micro-batches of --batch; a run that goes
// on without -b takes fewer sequences where they do not add up. Throws, and says what would do, if
// they cannot.
StepShape step_shape(const Options& options, int ranks);

// Where the model is to compute and how it is held, of --device, --dtype, --master-weights, …
// --device auto is a GPU if there is one; --dtype auto is `trained` ("float32" or "bf16") if that
// is given, else bf16 on a GPU and where the CPU multiplies it. Throws if the flags contradict each
// other or the machine.
ModelOptions model_options(const Options& options, bool training, const std::string& trained = "");

// "bf16 (AMX-BF16), float32 master weights and moments"
std::string describe_numbers(const ModelOptions& options);

// Sets OpenMP's threads and returns how many: --threads or default_threads(). Where the CPU is to
// compute and they use all cores, each has one of its own.
int use_threads(const Options& options);

} // namespace lns
