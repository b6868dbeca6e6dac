// What the simulator's host side shares: device memory, and the work of streams.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "dev/sim/cuda_runtime.h"

namespace lns::sim {

int architecture(); // 80, 90, …: LNS_SIM_ARCH

// A piece of work of a stream, which is run when its turn comes.
struct Work {
    std::string what; // "cudaMemsetAsync"; empty: the kernel's name
    const void* kernel = nullptr;
    std::function<void()> run;
};
// Runs it, keeps it for later or records it in the graph that the stream captures.
cudaError_t enqueue(cudaStream_t stream, Work work);

// When work is done: at once, or, with LNS_SIM_STREAMS=late, not before something waits for it.
bool late_streams();
void set_late_streams(bool late);
struct LateStreams { // while it lives
    LateStreams() { set_late_streams(true); }
    ~LateStreams() { set_late_streams(false); }
};

// Whether bytes are all inside of one piece of device memory (or of host memory that the device can
// reach); and throws where they are not.
bool on_device(const void* at, size_t bytes);
void check_device_range(const std::string& what, const void* at, size_t bytes);

struct Allocated {
    size_t bytes = 0; // of device memory
    int pieces = 0;
};
Allocated allocated();

// Of all copies from the device's memory to the host's so far.
uint64_t bytes_to_host();

} // namespace lns::sim
