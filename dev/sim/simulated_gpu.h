// What test_gpt asks of the GPU that it runs on, if it is the simulated one.
#pragma once

#include <cstdint>
#include <functional>

namespace lns {

struct SimulatedGpu {
    // Runs body in every order of threads that the simulator has.
    void (*in_every_order)(const std::function<void()>& body);
    // Whether streams do their work as late as possible, or at once.
    void (*set_late_streams)(bool late);
    uint64_t (*bytes_to_host)(); // of all copies so far
};
// Null where the GPU is real; dev/sim/runtime.cpp has the other one.
const SimulatedGpu* simulated_gpu();

} // namespace lns
