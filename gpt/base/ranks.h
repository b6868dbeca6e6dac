// Data parallelism: the processes that train one model together, each on its own part of the batch.
// One process when not launched by mpirun (or srun, …), and then every sum is the number itself.
//
// Every rank calls these in the same order. One that never comes ends them all (gpt/base/watch.h).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace lns {

class Watch;

// What must be the same on all ranks: names, as a sentence has them behind "rank 1 has", and
// values.
using Facts = std::vector<std::pair<std::string, std::string>>;

// "rank 1 has --lr 0.1 and rank 0 has 0.003", of all that differ; "" if nothing does. The first
// facts are rank 0's.
std::string differences(const std::vector<Facts>& of_ranks);

struct Ranks {
    int rank = 0, size = 1;
    int local_rank = 0, local_size = 1; // of those on this machine

    // Joins the launcher's processes. Throws if there are several and this build has no MPI.
    Ranks();
    ~Ranks();
    Ranks(const Ranks&) = delete;
    Ranks& operator=(const Ranks&) = delete;

    bool first() const { return rank == 0; }
    void sum(float* values, int64_t n) const; // in place, over all ranks
    void sum(double* values, int n) const;
    double sum(double value) const;
    void broadcast(void* data, int bytes) const; // of rank 0, to all
    bool any(bool value) const;                  // true on every rank if true on one
    void barrier() const;
    std::vector<std::string> gather(const std::string& mine) const; // of each rank, on every rank
    // Throws on every rank, and says what differs, unless all have the same facts.
    void compare(const Facts& mine) const;
    // Ends every rank's process at once, for an error that the others do not know of.
    [[noreturn]] void abort(int exit_code) const;

    // From rank 0: what to do when a rank is lost, "saved is …; go on with: …".
    void advise(const std::string& text) const;

    // Around work that takes every rank about as long each time, such as a step: one that takes far
    // longer than any before it hangs, and ends all ranks.
    struct Steady {
        Steady(const Ranks& ranks, const char* what);
        ~Steady();
        Steady(const Steady&) = delete;
        Steady& operator=(const Steady&) = delete;

      private:
        Watch* watch;
    };

  private:
    std::unique_ptr<Watch> watch; // null: one rank, or not watched
};

} // namespace lns
