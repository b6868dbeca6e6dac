// Checkpoints: directories that Hugging Face tools understand, and that a run goes on from.
//
//   config.json            the model, Hugging Face's fields and ours
//   model.safetensors      its parameters, under Hugging Face names and in Hugging Face's layout:
//                          GPT-2's matrices lie transposed, as (in, out)
//   optimizer.safetensors  m.NAME and v.NAME, Adam's moments, laid out alike
//   trainer_state.json     everything else that the next step depends on
//   the tokenizer's files
//   checksums.json         gpt/base/checksum.h's checksum of each file above: of a safetensors file
//   that
//                          in its header, else of its bytes
//
// What is damaged, or holds a number that is not finite, is refused by all that reads it here; in a
// run's directory the sentence names the newest checkpoint that is whole, and how to go on from it.
#pragma once

#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gpt/data/loader.h"
#include "gpt/data/tokenizer.h"
#include "gpt/model/model.h"
#include "gpt/run/flags.h"
#include "gpt/run/safetensors.h"

namespace lns {

struct TrainerState {
    int64_t step = 0, tokens = 0; // done so far
    double seconds = 0;           // of training
    LoaderState loader;
    uint64_t windows = 0;                       // of the data's epoch
    double val_loss = NAN, best_val_loss = NAN; // NaN: not measured yet
    SavedFlags flags;                           // of the run
    TokenizerId tokenizer;                      // of the data
};

// Writes dir whole or not at all. A checkpoint that stands there is replaced.
void save_checkpoint(const std::string& dir, Model& model, const TrainerState& state,
                     const Tokenizer* tokenizer);
// An upper bound on its bytes, the tokenizer's files apart.
int64_t checkpoint_bytes(const Registry& registry);

// Where the weights are: path itself if it is a checkpoint, a Hugging Face directory, a config.json
// or a --dump-state file; the newest checkpoint if it is a run's directory. Throws if nothing.
std::string find_checkpoint(const std::string& path);

// "" if all of a checkpoint can be read and is as it was written, else what is wrong with it.
std::string checkpoint_damage(const std::string& path);
// Whether all of its tensors have checksums, and so damage to them would have been noticed.
bool has_checksums(const std::string& path);

// The newest checkpoint of a run's directory, "" if there is none yet, or no directory.
std::string newest_checkpoint(const std::string& run);

// The model that lies there.
Config checkpoint_config(const std::string& path);

// The parameters. Throws, and says what differs, if they are of another model than this one.
void load_weights(Model& model, const std::string& path);

// The parameters and moments, to go on training.
TrainerState load_checkpoint(Model& model, const std::string& path);
TrainerState read_trainer_state(const std::string& path);

// The files that hold a model's tensors, mapped into memory: model.safetensors of a directory, the
// shards that its index names, or a single file. The root of Hugging Face's names, "transformer."
// or "model.", may be left out in them, as in GPT-2's own.
class WeightFiles {
  public:
    explicit WeightFiles(const std::string& path);

    // Throws, and names them, unless all parameters are there in their shapes and, unless `others`
    // are allowed, nothing else but what Hugging Face's files may have beside them. A head beside
    // tied embeddings must be the same to the bit.
    void check(const Config& config, const Registry& registry, bool others) const;

    bool have_checksums() const;

    // The tensor prefix + p.name as float32, in memory's layout (not the file's). Throws unless all
    // of it is finite.
    void read(const Param& p, const std::string& prefix, std::vector<float>& out) const;

  private:
    std::string name; // of the file, or the index, for the errors
    std::vector<std::unique_ptr<Safetensors>> files;
    std::pair<const Safetensors*, const TensorView*> find(const std::string& tensor) const;
    void check_tied_head(const Registry& registry) const;
};

// A parameter's values, from memory's layout to the file's.
void to_file_layout(const Param& p, std::vector<float>& values);

// A parameter's value or gradient as a tensor of a file, read from the model while it is written.
TensorOut param_tensor(Model& model, Buffer buffer, const Param& param, const std::string& name);

} // namespace lns
