// The threads of a simulated GPU, each a fiber. The blocks of a grid are spread over the host's
// threads; the threads of a block share one of those and take turns, each running until it must
// wait for others. The stand-ins for CUDA's headers and the wrappers of instructions are built on
// this; tests choose the order in which threads run.
//
// An error in a kernel is a thrown lns::Error that names the kernel, the block and the thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "dev/sim/vector_types.h"
#include "gpt/base/error.h"

// Of the current thread.
extern thread_local constinit uint3 threadIdx, blockIdx;
extern thread_local constinit dim3 blockDim, gridDim;

namespace lns::sim {

const int warp_size = 32, max_threads = 1024; // of a block

// ---------------------------------------------------------------------------------------------
// Waiting for other threads. If no thread of the block can continue, an error says what each waits
// for.

// A line of the kernel.
struct Site {
    const char* file;
    int line;
    bool operator==(const Site& other) const { return file == other.file && line == other.line; }
};
// As a default argument: the caller's line.
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
}

// Lanes that execute one instruction together: operands[i] is what lane i passed, null if it does
// not participate.
struct Lanes {
    uint32_t mask;
    void** operands;
};

// Waits until every lane of `mask` of this warp has made the same call (name, line and mask). The
// last to arrive calls act(lanes) for all of them.
void meet(const char* name, Site where, uint32_t mask, void* operands, void (*act)(const Lanes&));

// The same for the 128 threads of a warpgroup: operands[0 … 127].
void meet_warpgroup(const char* name, Site where, void* operands, void (*act)(void** operands));

// The block's barriers 0 to 15. Waits until `threads` threads have arrived; returns how many passed
// a true `predicate`. Barrier 0 is __syncthreads, where all must be in the same line. `arrive`
// counts without waiting.
int barrier(const char* name, Site where, int id, int threads, bool predicate = false);
void arrive(const char* name, Site where, int id, int threads);

// Lets the others run until none of them can continue.
void wait_round(const char* name, Site where);
void condition_met();

// Waits until ready(), polled whenever no other thread can continue. If ready() fulfils what others
// wait for, it must call condition_met().
template <class Ready> void wait_until(const char* name, Site where, Ready ready) {
    while (!ready()) wait_round(name, where);
    condition_met();
}

// ---------------------------------------------------------------------------------------------
// The current thread, its block, and shared memory

bool in_kernel();
int thread_rank(); // in its block, x running fastest: warp thread_rank() / 32
int block_threads();

// Throws an Error that names the kernel, block and thread.
[[noreturn]] void fail_in_kernel(const std::string& sentence);

// The n-th array of this block's shared memory, aligned to `alignment` bytes and filled with 0xFF.
// Modulo 1,024 its address is what it would be without the red zones between arrays.
void* take_shared(int n, size_t bytes);
size_t shared_left(size_t taken); // of the launch's bytes

// 32-bit addresses of shared memory: offsets from its beginning, which is aligned to 1,024.
uint32_t shared_offset(const void* pointer); // fails if it is not in this block's shared memory
unsigned char* shared_pointer(uint32_t offset);
bool in_shared(const void* pointer);

const unsigned char poison_byte = 0xFF; // fills uninitialized memory: NaN in bf16 and float
void poison(void* at, size_t bytes);

// cp.async of this thread: the bytes arrive only when they are waited for; until then the
// destination is poisoned.
void copy_later(void* shared, const void* global, int bytes, bool valid);
void copy_commit();
void copy_wait(int but_last_groups);

// An object of each block, constructed on first use: the state of the wrappers (mbarriers, pending
// copies).
void* block_object(const void* key, std::shared_ptr<void> (*make)());
template <class T> T& block_state() {
    static const char key = 0;
    return *static_cast<T*>(block_object(&key, [] { return std::shared_ptr<void>(new T()); }));
}

// d (m, n) += a (m, k) · b (k, n), row-major, k in ascending order. For the wrappers of tensor
// instructions.
void multiply_add(float* d, const float* a, const float* b, int m, int n, int k);

// ---------------------------------------------------------------------------------------------
// The order in which threads and blocks run. A correct kernel gives the same bits in every order.

enum class Direction { forward, reversed, shuffled };
struct Order {
    Direction direction = Direction::forward;
    uint64_t seed = 0; // of shuffled
};

// From LNS_SIM_ORDER (forward, reversed, shuffled:SEED) unless set, in the same words or as a
// value.
Order order();
void set_order(Order order);
void set_order(const std::string& name);
std::string name_of(Order order);
std::vector<Order> every_order(int shuffles = 2);

// Calls body() in every order, and restores the previous one.
template <class Body> void in_every_order(Body body, int shuffles = 2) {
    const Order before = order();
    struct Back {
        Order order;
        ~Back() { set_order(order); }
    } back{before};
    for (const Order& each : every_order(shuffles)) {
        set_order(each);
        body();
    }
}

// ---------------------------------------------------------------------------------------------
// Launches

struct Launch {
    const void* kernel;
    dim3 grid, block;
    size_t shared;
    std::function<void()> thread; // the kernel, as one thread runs it
};
void run(const Launch& launch);

std::string kernel_name(const void* kernel);

} // namespace lns::sim
