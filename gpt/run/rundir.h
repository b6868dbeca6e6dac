// A run is a directory: log.jsonl (one object a step), checkpoints step-000500, …, run.json (the
// exact commands that wrote it, with their builds) and lock (held while a process trains into it).
// Only one process of a run, rank 0, opens it.
#pragma once

#include "gpt/base/files.h"
#include "gpt/run/flags.h"

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lns {

class RunDirectory {
  public:
    // A new run. Throws where a run lies already, or another process holds the directory.
    static RunDirectory create(const std::string& path);
    // An earlier run, to be continued. The temporaries that a kill left are removed. held: what
    // lock() gave; without it, it is locked first.
    static RunDirectory resume(const std::string& path, Fd held = {});
    // Keeps other processes from training into path for as long as this lives. Throws if one does.
    static Fd lock(const std::string& path);

    const std::string& path() const { return path_; }

    // Adds an entry to run.json: this command line, quoted for a shell, the working directory, the
    // time, the host, the build, and whatever else the caller knows.
    void record(int argc, const char* const* argv,
                const std::map<std::string, std::string>& more = {}, const SavedFlags& flags = {});

    // Appends a line to log.jsonl, whole or not at all.
    void append(std::string_view json_line);
    // "" as long as the directory and its log stand where they were. If they were removed, renamed
    // or unmounted, they are made again, and this says so, or why they cannot be.
    std::string mend();
    // Drops the lines with "step" > step, as a resumed run is to write them again, and moves those
    // that are damaged to damaged_log(). How many these were.
    int64_t truncate_log_after(int64_t step);
    std::string damaged_log() const;

    // PATH/step-000500, to be written through AtomicDirectory. Throws if the directory is lost.
    std::string checkpoint_path(int64_t step) const;
    // All whole checkpoints, by step.
    std::vector<std::pair<int64_t, std::string>> checkpoints() const;
    // Removes all but the n newest; n <= 0 keeps all.
    void keep_last(int n);

  private:
    std::string path_;
    Fd lock_, log_;
    std::string lost_; // why the directory is no longer ours
    explicit RunDirectory(const std::string& path);
    void open_log();
};

// PREFIX, PREFIX-2, PREFIX-3, …: the first that does not exist yet.
std::string default_run_path(const std::string& prefix);

// All whole checkpoints in a run's directory, by step; none if there is no such directory.
std::vector<std::pair<int64_t, std::string>> checkpoints_in(const std::string& path);
// The step of a checkpoint named so ("step-000500"), or -1.
int64_t checkpoint_step(const std::string& name);

// The checkpoint that path names: path itself if it holds a config.json, else the last one of the
// run directory path.
std::string latest_checkpoint(const std::string& path);

// The flags that the run at path was last started with; none if it does not say.
SavedFlags recorded_flags(const std::string& path);

// The working directories that the run at path was started in, the newest first; none if nothing
// says. The run's relative paths began in one of them.
std::vector<std::string> start_directories(const std::string& path);

// The words as a POSIX shell reads them back.
std::string shell_quoted(int argc, const char* const* argv);

// "2025-06-01T13:05:09Z"
std::string iso_time();

} // namespace lns
