#include "gpt/ranks.h"

#include <algorithm>
#include <cstdlib>

#include "gpt/error.h"

#ifdef LNS_MPI
#include <mpi.h>
#endif

namespace lns {

namespace {

// What launchers tell the processes that they start: Open MPI, MPICH and Intel MPI, PMIx, Slurm.
// An interactive Slurm shell sets SLURM_NTASKS without being one of several processes, so a step's
// own variable is looked at instead.
int launched_size() {
    for (const char* name :
         {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"})
        if (const char* value = std::getenv(name)) return std::max(1, std::atoi(value));
    return std::getenv("PMIX_RANK") ? 2 : 1; // how many, PMIx does not say
}

} // namespace

#ifdef LNS_MPI

Ranks::Ranks() {
    if (launched_size() == 1) return;
    int provided = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Comm local; // of the ranks that share memory
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &local);
    MPI_Comm_rank(local, &local_rank);
    MPI_Comm_size(local, &local_size);
    MPI_Comm_free(&local);
}

namespace {
bool mpi_is_up() {
    int initialized = 0, finalized = 0;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    return initialized && !finalized;
}
} // namespace

Ranks::~Ranks() {
    if (mpi_is_up()) MPI_Finalize();
}

void Ranks::sum(float* values, int64_t n) const {
    const int64_t chunk = int64_t(1) << 28; // MPI counts are int
    for (int64_t i = 0; size > 1 && i < n; i += chunk)
        MPI_Allreduce(MPI_IN_PLACE, values + i, int(std::min(chunk, n - i)), MPI_FLOAT, MPI_SUM,
                      MPI_COMM_WORLD);
}

void Ranks::sum(double* values, int n) const {
    if (size > 1) MPI_Allreduce(MPI_IN_PLACE, values, n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
}

void Ranks::broadcast(void* data, int bytes) const {
    if (size > 1) MPI_Bcast(data, bytes, MPI_BYTE, 0, MPI_COMM_WORLD);
}

void Ranks::barrier() const {
    if (size > 1) MPI_Barrier(MPI_COMM_WORLD);
}

void Ranks::abort(int exit_code) const {
    if (size > 1 && mpi_is_up()) MPI_Abort(MPI_COMM_WORLD, exit_code);
    std::_Exit(exit_code);
}

#else

Ranks::Ranks() {
    if (launched_size() > 1)
        fail("this process is one of several that a launcher started together, but this build has "
             "no MPI: run `make deps train_gpt`, or start it without mpirun");
}
Ranks::~Ranks() {}
void Ranks::sum(float*, int64_t) const {}
void Ranks::sum(double*, int) const {}
void Ranks::broadcast(void*, int) const {}
void Ranks::barrier() const {}
void Ranks::abort(int exit_code) const { std::_Exit(exit_code); }

#endif

double Ranks::sum(double value) const {
    sum(&value, 1);
    return value;
}

bool Ranks::any(bool value) const { return sum(value ? 1.0 : 0.0) > 0; }

} // namespace lns
