// `train_gpt verify`: checks files for damage.
#pragma once

#include <string>
#include <vector>

namespace lns {

// Reads every path completely and prints a line per checkpoint and shard. A path is a run, a
// checkpoint or Hugging Face directory, a safetensors file, a shard, or a directory or pattern of
// shards. Returns the exit status: 1 if anything is damaged.
int verify(const std::vector<std::string>& paths);

} // namespace lns
