// `train_gpt verify`: whether files are as they were written.
#pragma once

#include <string>
#include <vector>

namespace lns {

// Checks each path, reading all of it, and prints a line for each checkpoint and shard: a run's
// directory, a checkpoint or Hugging Face directory, a safetensors file, shards, a directory or a
// pattern of them. Returns the exit status: 1 if anything is damaged.
int verify(const std::vector<std::string>& paths);

} // namespace lns
