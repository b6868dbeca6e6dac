// Sums over the ranks that train one model together, each on a GPU of its own: by NCCL, or without
// it through the host, which waits.
#pragma once

#include <type_traits>
#include <vector>

#ifdef LNS_NCCL
#include <nccl.h>
#endif

#include "gpt/base/ranks.h"
#include "gpt/cuda/cuda.h"

namespace lns::cuda {

struct Communicator {
    const Ranks* ranks = nullptr;
#ifdef LNS_NCCL
    ncclComm_t nccl = nullptr;

    static void check(ncclResult_t result, const char* what) {
        if (result != ncclSuccess)
            fail(what, " failed: ", ncclGetErrorString(result),
                 "; NCCL_DEBUG=INFO in the environment explains");
    }
    void join(const Ranks& all) {
        ranks = &all;
        if (all.size == 1) return;
        ncclUniqueId id = {};
        if (all.first()) check(ncclGetUniqueId(&id), "ncclGetUniqueId");
        all.broadcast(&id, sizeof id);
        check(ncclCommInitRank(&nccl, all.size, id, all.rank), "ncclCommInitRank");
    }
    ~Communicator() {
        if (nccl) ncclCommDestroy(nccl);
    }
    template <class X> void sum(X* x, int64_t n, cudaStream_t stream) const {
        if (ranks->size == 1) return;
        const ncclDataType_t type = std::is_same_v<X, double>  ? ncclDouble
                                    : std::is_same_v<X, float> ? ncclFloat
                                                               : ncclBfloat16;
        check(ncclAllReduce(x, x, size_t(n), type, ncclSum, nccl, stream), "ncclAllReduce");
    }
#else
    void join(const Ranks& all) { ranks = &all; }
    template <class X> void sum(X* x, int64_t n, cudaStream_t stream) const {
        if (ranks->size == 1) return;
        std::vector<X> values(static_cast<size_t>(n));
        CUDA(cudaMemcpyAsync(values.data(), x, values.size() * sizeof(X), cudaMemcpyDeviceToHost,
                             stream));
        CUDA(cudaStreamSynchronize(stream));
        if constexpr (std::is_same_v<X, double>) {
            ranks->sum(values.data(), int(n));
        } else {
            std::vector<float> floats(values.begin(), values.end());
            ranks->sum(floats.data(), n);
            for (int64_t i = 0; i < n; i++) values[i] = X(floats[i]);
        }
        CUDA(cudaMemcpyAsync(x, values.data(), values.size() * sizeof(X), cudaMemcpyHostToDevice,
                             stream));
        CUDA(cudaStreamSynchronize(stream));
    }
#endif
};

} // namespace lns::cuda
