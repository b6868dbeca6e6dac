// Shared by the simulator's host side: device memory, and the work of streams.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "dev/sim/cuda_runtime.h"

namespace lns::sim {

int architecture(); // 80, 90, …: LNS_SIM_ARCH

// A piece of work of a stream.
struct Work {
    std::string what; // "cudaMemsetAsync"; empty: the kernel's name
    const void* kernel = nullptr;
    std::function<void()> run;
};
// Runs it, queues it, or records it in the graph that the stream captures.
cudaError_t enqueue(cudaStream_t stream, Work work);

// When work is done: at once, or, with LNS_SIM_STREAMS=late, not before something waits for it.
bool late_streams();
void set_late_streams(bool late);
struct LateStreams { // while it lives
    LateStreams() { set_late_streams(true); }
    ~LateStreams() { set_late_streams(false); }
};

// Throws unless the bytes are inside one allocation of device memory, or of host memory that the
// device can reach.
bool on_device(const void* at, size_t bytes);
void check_device_range(const std::string& what, const void* at, size_t bytes);

struct Allocated {
    size_t bytes = 0; // of device memory
    int pieces = 0;
};
Allocated allocated();

// The bytes of all copies from the device to the host so far.
uint64_t bytes_to_host();

} // namespace lns::sim
