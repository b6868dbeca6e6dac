#include "dev/sim/nccl.h"

#include <random>
#include <vector>

#include "dev/sim/cuda_bf16.h"
#include "dev/sim/runtime.h"

#ifdef LNS_MPI
#include <mpi.h>
#endif

struct ncclComm {
    int ranks, rank;
};

namespace {

size_t size_of(ncclDataType_t type) {
    switch (type) {
    case ncclInt8:
    case ncclUint8:
        return 1;
    case ncclFloat16:
    case ncclBfloat16:
        return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
        return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
        return 8;
    }
    return 0;
}

#ifdef LNS_MPI
bool mpi_is_up() {
    int initialized = 0, finalized = 0;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    return initialized && !finalized;
}

// MPI counts are int.
template <class T> void sum(T* values, size_t n, MPI_Datatype type) {
    const size_t chunk = size_t(1) << 28;
    for (size_t i = 0; i < n; i += chunk)
        MPI_Allreduce(MPI_IN_PLACE, values + i, int(std::min(chunk, n - i)), type, MPI_SUM,
                      MPI_COMM_WORLD);
}
#endif

void reduce(void* values, size_t n, ncclDataType_t type, [[maybe_unused]] int ranks, float scale) {
    if (type == ncclFloat64) {
        auto* x = static_cast<double*>(values);
#ifdef LNS_MPI
        if (ranks > 1) sum(x, n, MPI_DOUBLE);
#endif
        for (size_t i = 0; i < n; i++) x[i] *= double(scale);
        return;
    }
    auto* as_float = static_cast<float*>(values);
    auto* as_bf16 = static_cast<__nv_bfloat16*>(values);
    std::vector<float> wide;
    if (type == ncclBfloat16) {
        wide.assign(as_bf16, as_bf16 + n);
        as_float = wide.data();
    }
#ifdef LNS_MPI
    if (ranks > 1) sum(as_float, n, MPI_FLOAT);
#endif
    for (size_t i = 0; i < n; i++) as_float[i] *= scale;
    if (type == ncclBfloat16)
        for (size_t i = 0; i < n; i++) as_bf16[i] = __nv_bfloat16(wide[i]);
}

ncclResult_t status_of(cudaError_t error) { return error ? ncclUnhandledCudaError : ncclSuccess; }

} // namespace

ncclResult_t ncclGetVersion(int* version) {
    *version = NCCL_MAJOR * 10000 + NCCL_MINOR * 100;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    std::random_device random;
    for (char& c : id->internal) c = char(random());
    return ncclSuccess;
}

// All ranks must have the same id.
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, [[maybe_unused]] ncclUniqueId id,
                              int rank) {
    if (ranks < 1 || rank < 0 || rank >= ranks) return ncclInvalidArgument;
    if (ranks > 1) {
#ifdef LNS_MPI
        int size = 0;
        if (!mpi_is_up()) return ncclSystemError;
        MPI_Comm_size(MPI_COMM_WORLD, &size);
        if (size != ranks) return ncclInvalidUsage;
        ncclUniqueId first = id;
        MPI_Bcast(first.internal, NCCL_UNIQUE_ID_BYTES, MPI_CHAR, 0, MPI_COMM_WORLD);
        int differs = std::memcmp(first.internal, id.internal, NCCL_UNIQUE_ID_BYTES) != 0;
        MPI_Allreduce(MPI_IN_PLACE, &differs, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
        if (differs)
            lns::fail("ncclCommInitRank: the ranks have different ids; rank 0's must be sent to "
                      "all");
#else
        return ncclInvalidUsage;
#endif
    }
    *comm = new ncclComm{ranks, rank};
    return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    delete comm;
    return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) { return ncclCommDestroy(comm); }
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) {
    *error = ncclSuccess;
    return ncclSuccess;
}
ncclResult_t ncclGroupStart() { return ncclSuccess; }
ncclResult_t ncclGroupEnd() { return ncclSuccess; }

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type,
                           ncclRedOp_t operation, ncclComm_t comm, cudaStream_t stream) {
    if (!comm || (operation != ncclSum && operation != ncclAvg) ||
        (type != ncclFloat32 && type != ncclFloat64 && type != ncclBfloat16))
        return ncclInvalidArgument;
    const size_t bytes = count * size_of(type);
    lns::sim::check_device_range("ncclAllReduce, from", from, bytes);
    lns::sim::check_device_range("ncclAllReduce, to", to, bytes);
    const float scale = operation == ncclAvg ? 1.0f / float(comm->ranks) : 1.0f;
    const int ranks = comm->ranks;
    return status_of(lns::sim::enqueue(stream, {"ncclAllReduce", nullptr, [=] {
                                                    if (to != from) std::memcpy(to, from, bytes);
                                                    reduce(to, count, type, ranks, scale);
                                                }}));
}

ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
    if (!comm || root < 0 || root >= comm->ranks) return ncclInvalidArgument;
    const size_t bytes = count * size_of(type);
    lns::sim::check_device_range("ncclBroadcast, to", to, bytes);
    const bool sends = comm->rank == root;
    if (sends) lns::sim::check_device_range("ncclBroadcast, from", from, bytes);
    return status_of(lns::sim::enqueue(
        stream, {"ncclBroadcast", nullptr, [=] {
                     if (sends && to != from) std::memcpy(to, from, bytes);
#ifdef LNS_MPI
                     const size_t chunk = size_t(1) << 30;
                     for (size_t i = 0; comm->ranks > 1 && i < bytes; i += chunk)
                         MPI_Bcast(static_cast<char*>(to) + i, int(std::min(chunk, bytes - i)),
                                   MPI_CHAR, root, MPI_COMM_WORLD);
#endif
                 }}));
}

const char* ncclGetErrorString(ncclResult_t result) {
    switch (result) {
    case ncclSuccess:
        return "no error";
    case ncclUnhandledCudaError:
        return "unhandled cuda error";
    case ncclSystemError:
        return "unhandled system error";
    case ncclInternalError:
        return "internal error";
    case ncclInvalidArgument:
        return "invalid argument";
    case ncclInvalidUsage:
        return "invalid usage";
    case ncclRemoteError:
        return "remote process exited or there was a network error";
    case ncclInProgress:
        return "NCCL operation in progress";
    }
    return "unknown result code";
}
const char* ncclGetLastError(ncclComm_t) { return ""; }
