#include "gpt/run/verify.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <optional>

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/json.h"
#include "gpt/base/terminal.h"
#include "gpt/data/paths.h"
#include "gpt/data/shard.h"
#include "gpt/run/checkpoint.h"
#include "gpt/run/rundir.h"

namespace lns {

namespace fs = std::filesystem;

namespace {

// Prints one line per finding.
struct Findings {
    int damaged = 0;

    void whole(const std::string& path, const std::string& details) {
        std::printf("%s: whole; %s\n", printable(path).c_str(), details.c_str());
    }
    void damage(const std::string& path, const std::string& sentence) {
        const bool named = sentence.starts_with(path); // as most do
        std::printf("DAMAGED: %s%s\n", named ? "" : printable(path + ": ").c_str(),
                    printable(sentence).c_str());
        damaged++;
    }
};

const char* without_checksums = "readable, but without checksums to compare with";

void verify_tensors(const std::string& path, Findings& found) {
    try {
        const Safetensors file(path);
        for (const TensorView& view : file.tensors()) file.check(view);
        found.whole(path, file.checksum()
                              ? cat("the checksums of ", file.tensors().size(), " tensors match")
                              : without_checksums);
    } catch (const Error& error) {
        found.damage(path, error.what());
    }
}

bool verify_checkpoint(const std::string& path, Findings& found) {
    const std::string damage = checkpoint_damage(path);
    if (!damage.empty())
        found.damage(path, damage);
    else
        found.whole(path, has_checksums(path) ? "all checksums match" : without_checksums);
    return damage.empty();
}

void verify_run(const std::string& path, Findings& found) {
    std::optional<std::string> newest_whole, newest;
    const auto checkpoints = checkpoints_in(path);
    for (auto checkpoint = checkpoints.rbegin(); checkpoint != checkpoints.rend(); ++checkpoint) {
        if (!newest) newest = checkpoint->second;
        if (verify_checkpoint(checkpoint->second, found) && !newest_whole)
            newest_whole = checkpoint->second;
    }
    const std::string log = path + "/log.jsonl";
    int64_t lines = 0, unreadable = 0;
    if (path_exists(log)) {
        const std::string text = read_file(log);
        for (size_t begin = 0, end; begin < text.size(); begin = end + 1, lines++) {
            end = std::min(text.find('\n', begin), text.size());
            try {
                parse_json({text.data() + begin, end - begin}, log);
            } catch (const Error&) {
                unreadable++;
            }
        }
        if (unreadable)
            found.damage(log, cat(unreadable, " of its ", lines, " lines cannot be read"));
        else
            found.whole(log, cat("all ", lines, " lines can be read"));
    }
    try {
        recorded_flags(path);
    } catch (const Error& error) {
        found.damage(path + "/run.json", error.what());
    }
    if (!newest)
        std::printf("%s has no checkpoint yet\n", printable(path).c_str());
    else if (!newest_whole)
        std::printf("no checkpoint in %s is whole\n", printable(path).c_str());
    else if (newest_whole != newest)
        std::printf("the newest whole checkpoint is %s. To resume from it, move the later ones out "
                    "of %s and start again with -y\n",
                    printable(*newest_whole).c_str(), printable(path).c_str());
}

void verify_shard(const std::string& path, Findings& found) {
    try {
        const Shard shard(path);
        shard.check_checksum();
        if (shard.id.vocab_size) shard.check_tokens(shard.id.vocab_size);
        found.whole(path, shard.has_checksum()
                              ? cat("the checksum of its ", shard.tokens, " tokens matches")
                              : without_checksums);
    } catch (const Error& error) {
        found.damage(path, error.what());
    }
}

void verify_path(const std::string& path, Findings& found) {
    if (is_directory_at(path)) {
        if (path_exists(path + "/config.json")) {
            verify_checkpoint(path, found);
            return;
        }
        if (path_exists(path + "/run.json") || !checkpoints_in(path).empty())
            return verify_run(path, found);
        std::vector<std::string> shards;
        for (const auto& entry : directory_entries(path))
            if (entry.path().extension() == ".bin") shards.push_back(entry.path().string());
        if (shards.empty()) fail(path, " holds no run, no checkpoint and no shard (*.bin)");
        std::sort(shards.begin(), shards.end());
        for (const std::string& shard : shards) verify_shard(shard, found);
        return;
    }
    for (const std::string& file : glob_paths(path)) {
        if (is_directory_at(file))
            verify_path(file, found);
        else if (file.ends_with(".safetensors"))
            verify_tensors(file, found);
        else
            verify_shard(file, found);
    }
}

} // namespace

int verify(const std::vector<std::string>& paths) {
    Findings found;
    for (const std::string& path : paths) verify_path(expand_home(path), found);
    return found.damaged ? 1 : 0;
}

} // namespace lns
