// Data parallelism: the processes that train one model together, each on its own part of the batch.
// One process when not launched by mpirun (or srun, …), and then every sum is the number itself.
//
// Every rank calls these in the same order, or all wait for ever.
#pragma once

#include <cstdint>

namespace lns {

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
    // Ends every rank's process at once, for an error that the others do not know of.
    [[noreturn]] void abort(int exit_code) const;
};

} // namespace lns
