// A run's directory: log.jsonl (one object per step), checkpoints step-000500, …, run.json (the
// commands and builds that wrote it) and lock (held while a process trains into it). Only rank 0
// opens it.
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
    // Starts a new run. Throws if path holds a run, or another process has locked it.
    static RunDirectory create(const std::string& path);
    // Continues a run. Removes temporary files of killed processes. held: the result of lock(), if
    // it was called before.
    static RunDirectory resume(const std::string& path, Fd held = {});
    // Locks path until the descriptor is closed. Throws if another process has locked it.
    static Fd lock(const std::string& path);

    const std::string& path() const { return path_; }

    // Adds an entry to run.json: the shell-quoted command line, working directory, time, host,
    // build, and the fields in `more`; stores `flags` unless empty.
    void record(int argc, const char* const* argv,
                const std::map<std::string, std::string>& more = {}, const SavedFlags& flags = {});

    // Appends a line to log.jsonl, whole or not at all.
    void append(std::string_view json_line);
    // Recreates the directory and its log if they were removed, renamed or unmounted. Returns "" if
    // nothing was wrong, else a sentence about what was done or why it failed.
    std::string recreate_if_lost();
    // Drops lines with "step" > step, which a resumed run rewrites, and moves damaged lines to
    // damaged_log(). Returns the number of damaged lines.
    int64_t truncate_log_after(int64_t step);
    std::string damaged_log() const;

    // PATH/step-000500, for an AtomicDirectory. Throws if the directory is lost.
    std::string checkpoint_path(int64_t step) const;
    // All checkpoints, by step.
    std::vector<std::pair<int64_t, std::string>> checkpoints() const;
    // Removes all but the n newest checkpoints; n <= 0 keeps all.
    void keep_last(int n);

  private:
    std::string path_;
    Fd lock_, log_;
    std::string lost_; // why the directory cannot be used; "" if it can
    explicit RunDirectory(const std::string& path);
    void open_log();
};

// The first of PREFIX, PREFIX-2, PREFIX-3, … that does not exist.
std::string default_run_path(const std::string& prefix);

// All checkpoints in a run's directory, by step; none if there is no such directory.
std::vector<std::pair<int64_t, std::string>> checkpoints_in(const std::string& path);
// The step in a checkpoint's name ("step-000500"), or -1.
int64_t checkpoint_step(const std::string& name);

// path itself if it holds a config.json, else the newest checkpoint of the run directory path.
std::string latest_checkpoint(const std::string& path);

// The flags of the run's last start; empty if not recorded.
SavedFlags recorded_flags(const std::string& path);

// The working directories of the run's starts, newest first, to resolve its relative paths; none if
// not recorded.
std::vector<std::string> start_directories(const std::string& path);

// The command line quoted for a POSIX shell.
std::string shell_quoted(int argc, const char* const* argv);

// "2025-06-01T13:05:09Z"
std::string iso_time();

} // namespace lns
