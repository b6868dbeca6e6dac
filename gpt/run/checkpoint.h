// Checkpoints: directories that Hugging Face tools can read and that a run can resume from.
//
//   config.json            the model: Hugging Face's fields and ours
//   model.safetensors      the parameters, in Hugging Face's names and layout: GPT-2's matrices are
//                          transposed, (in, out)
//   optimizer.safetensors  the optimizer's states, AdamW's m.NAME and v.NAME, in the same layout
//   trainer_state.json     everything else that the next step depends on
//   the tokenizer's files
//   checksums.json         a checksum of each file above (gpt/base/checksum.h): a safetensors
//                          file's own, from its header, else of all bytes
//
// Everything here that reads a checkpoint throws if it is damaged or holds non-finite values. In a
// run's directory the error names the newest whole checkpoint and how to resume from it.
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
    int64_t step = 0, tokens = 0; // trained so far
    double seconds = 0;           // of training
    LoaderState loader;
    uint64_t windows = 0;                       // per epoch
    double val_loss = NAN, best_val_loss = NAN; // NaN: not measured yet
    SavedFlags flags;                           // of the run
    TokenizerId tokenizer;                      // the data's
};

// Writes dir atomically, replacing an existing checkpoint.
void save_checkpoint(const std::string& dir, Model& model, const TrainerState& state,
                     const Tokenizer* tokenizer);
// An upper bound on a checkpoint's bytes, without the tokenizer's files.
int64_t checkpoint_bytes(const Optimizer& optimizer, const Registry& registry);

// The newest checkpoint if path is a run's directory, else path itself: a checkpoint, a Hugging
// Face directory, a config.json or a --dump-state file. Throws if there is none.
std::string find_checkpoint(const std::string& path);

// What is wrong with a checkpoint, which is read completely; "" if nothing.
std::string checkpoint_damage(const std::string& path);
// Whether all of its tensors have checksums.
bool has_checksums(const std::string& path);

// The newest checkpoint of a run's directory; "" if there is no checkpoint or no directory.
std::string newest_checkpoint(const std::string& run);

Config checkpoint_config(const std::string& path);

// Reads the parameters. Throws, naming the difference, if they belong to another model.
void load_weights(Model& model, const std::string& path);

// Reads the parameters and moments, to resume training.
TrainerState load_checkpoint(Model& model, const std::string& path);
TrainerState read_trainer_state(const std::string& path);

// A model's tensor files, mapped into memory: a directory's model.safetensors, the shards named by
// its index, or a single file. The root of Hugging Face's names, "transformer." or "model.", may be
// missing, as in GPT-2's own file.
class WeightFiles {
  public:
    explicit WeightFiles(const std::string& path);

    // Throws, naming the tensors, if parameters are missing or have another shape or, unless
    // allow_extra, if there are tensors that Hugging Face's files do not usually have. A head
    // beside tied embeddings must equal them bit for bit.
    void check(const Config& config, const Registry& registry, bool allow_extra) const;

    bool have_checksums() const;

    // Reads the tensor prefix + p.name as float32, in memory's layout (not the file's). Throws if a
    // value is not finite.
    void read(const Param& p, const std::string& prefix, std::vector<float>& out) const;

  private:
    std::string name; // of the file or index, for errors
    std::vector<std::unique_ptr<Safetensors>> files;
    std::pair<const Safetensors*, const TensorView*> find(const std::string& tensor) const;
    void check_tied_head(const Registry& registry) const;
};

// Converts a parameter's values from memory's layout to the file's.
void to_file_layout(const Param& p, std::vector<float>& values);

// A parameter's buffer as a tensor to write; it is read from the model while the file is written.
TensorOut param_tensor(Model& model, Buffer buffer, const Param& param, const std::string& name);

} // namespace lns
