// Memory of the GPU and streams, released by their destructors.
#pragma once

#include <memory>

#include "gpt/cuda/cuda.h"

namespace lns::cuda {

// Zeroed memory of the GPU.
template <class X> struct Array {
    Array() = default;
    explicit Array(int64_t n) : size(n) {
        if (n == 0) return;
        X* memory = nullptr;
        CUDA(cudaMalloc(reinterpret_cast<void**>(&memory), size_t(n) * sizeof(X)));
        data.reset(memory);
        // On the default stream, for which neither our own streams nor this call wait.
        CUDA(cudaMemset(memory, 0, size_t(n) * sizeof(X)));
        CUDA(cudaStreamSynchronize(nullptr));
    }
    operator X*() const { return data.get(); }
    X* begin() const { return data.get(); }
    template <class Y> Y* as() const { return reinterpret_cast<Y*>(data.get()); }
    // Copies `size` elements from the host, and waits for them.
    void upload(const X* values) const {
        CUDA(cudaMemcpy(data.get(), values, size_t(size) * sizeof(X), cudaMemcpyHostToDevice));
        CUDA(cudaStreamSynchronize(nullptr)); // a copy from pageable memory may return early
    }

    struct Free {
        void operator()(X* p) const { cudaFree(p); }
    };
    std::unique_ptr<X, Free> data;
    int64_t size = 0;
};

// Page-locked memory of the host, from and to which the GPU copies asynchronously.
template <class X> struct Pinned {
    Pinned() = default;
    explicit Pinned(int64_t n) : size(n) {
        X* memory = nullptr;
        CUDA(cudaMallocHost(reinterpret_cast<void**>(&memory), size_t(n) * sizeof(X)));
        data.reset(memory);
    }
    operator X*() const { return data.get(); }

    struct Free {
        void operator()(X* p) const { cudaFreeHost(p); }
    };
    std::unique_ptr<X, Free> data;
    int64_t size = 0;
};

struct OwnStream {
    cudaStream_t stream = nullptr;
    OwnStream() { CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
    ~OwnStream() { cudaStreamDestroy(stream); }
    OwnStream(const OwnStream&) = delete;
    operator cudaStream_t() const { return stream; }
    void wait() const { CUDA(cudaStreamSynchronize(stream)); }
};

// Two events with the time between them.
struct StopWatch {
    cudaEvent_t begin = nullptr, end = nullptr;

    StopWatch() {
        CUDA(cudaEventCreate(&begin));
        CUDA(cudaEventCreate(&end));
    }
    StopWatch(const StopWatch&) = delete;
    ~StopWatch() { cudaEventDestroy(begin), cudaEventDestroy(end); }

    // Milliseconds that the stream takes for what `enqueue` gives it; waits for it.
    template <class Enqueue> float time(cudaStream_t stream, const Enqueue& enqueue) const {
        float milliseconds = 0;
        CUDA(cudaEventRecord(begin, stream));
        enqueue();
        CUDA(cudaEventRecord(end, stream));
        CUDA(cudaEventSynchronize(end));
        CUDA(cudaEventElapsedTime(&milliseconds, begin, end));
        return milliseconds;
    }
};

} // namespace lns::cuda
