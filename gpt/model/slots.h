// Storage for one tensor per layer or junction: those that the backward pass needs have their own
// slots, the others share one.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

namespace lns {

// A: an array in host or device memory that converts to a pointer to its elements.
template <class A> struct Slots {
    A array;
    std::vector<int> slot; // of each tensor; −1: none
    std::vector<bool> own;
    int64_t stride = 0; // elements per slot

    // make(array, elements) allocates; kept(i): whether tensor i of n has its own slot; made(i):
    // whether it exists.
    template <class Make, class Kept, class Made>
    void layout(int n, int64_t elements, const Make& make, const Kept& kept, const Made& made) {
        int slots = 0, shared = -1;
        stride = elements;
        for (int i = 0; i < n; i++) {
            own.push_back(made(i) && kept(i));
            if (made(i) && !own[i] && shared < 0) shared = slots++;
            slot.push_back(!made(i) ? -1 : own[i] ? slots++ : shared);
        }
        make(array, slots * elements);
    }
    template <class Make, class Kept>
    void layout(int n, int64_t elements, const Make& make, const Kept& kept) {
        layout(n, elements, make, kept, [](int) { return true; });
    }
    bool keeps(int i) const { return own[i]; }
    auto operator[](int i) const { return array + slot[i] * stride; }
};

} // namespace lns
