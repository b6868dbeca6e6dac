// Data parallelism: processes (ranks) that train one model, each on its part of the batch. Without
// mpirun (or srun, …) there is one rank, and every sum is its own value.
//
// All ranks must call the collectives in the same order. If one hangs, all end (gpt/base/watch.h).
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gpt/base/error.h"

namespace lns {

class Watch;

// Names and values that must agree on all ranks. A name follows "rank 1 has" in messages.
using Facts = std::vector<std::pair<std::string, std::string>>;

// "rank 1 has --lr 0.1 and rank 0 has 0.003" for each difference, "" if there is none. facts[r] are
// those of rank r.
std::string differences(const std::vector<Facts>& facts);

struct Ranks {
    int rank = 0, size = 1;
    int local_rank = 0, local_size = 1; // among the ranks on this machine

    // Joins the launcher's processes. Throws if there are several and this build has no MPI.
    Ranks();
    ~Ranks();
    Ranks(const Ranks&) = delete;
    Ranks& operator=(const Ranks&) = delete;

    bool first() const { return rank == 0; }
    void sum(float* values, int64_t n) const; // in place
    void sum(double* values, int n) const;
    double sum(double value) const;
    void broadcast(void* data, int bytes) const; // from rank 0
    bool any(bool value) const;                  // true on every rank if true on one
    void barrier() const;
    std::vector<std::string> gather(const std::string& mine) const; // all ranks', by rank
    // Throws the differences on every rank unless all have the same facts.
    void compare(const Facts& mine) const;
    // Ends all ranks' processes at once, after an error on this rank only.
    [[noreturn]] void abort(int exit_code) const;

    // On rank 0: sets the advice for when a rank is lost, such as "saved is …; continue with: …".
    void set_advice(const std::string& text) const;

    // Encloses work that takes about the same time on every call, such as a step. If it takes far
    // longer than ever before, a rank hangs, and all ranks end.
    struct TimedSection {
        TimedSection(const Ranks& ranks, const char* what);
        ~TimedSection();
        TimedSection(const TimedSection&) = delete;
        TimedSection& operator=(const TimedSection&) = delete;

      private:
        Watch* watch;
    };

  private:
    std::unique_ptr<Watch> watch; // null if there is one rank or LNS_RANK_TIMEOUT is 0
};

// Thrown by all ranks at the same place.
struct SharedError : Error {
    using Error::Error;
};

// The first error of work that may fail on one rank while the others go on.
struct CaughtError {
    std::exception_ptr error;

    // Does nothing after an error.
    template <class Work> void run(const Work& work) {
        if (error) return;
        try {
            work();
        } catch (...) {
            error = std::current_exception();
        }
    }
    // Throws on every rank if one has an error.
    void share(const Ranks& ranks) const;
};

} // namespace lns
