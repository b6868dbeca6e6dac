// A fiber: a stack and the point where it was suspended. By Boost.Context if available, else by
// ucontext, where every switch is a system call.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>

#ifdef LNS_BOOST_CONTEXT
#include <boost/context/detail/fcontext.hpp>
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define LNS_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LNS_ASAN
#endif
#endif

#ifdef LNS_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#endif

#include "gpt/base/error.h"

namespace lns::sim {

struct Fiber {
    static const size_t stack_bytes = 256 * 1024;

    char* stack = nullptr; // its lowest address; null for a host thread's own
    const void* bottom = nullptr;
    size_t size = 0; // as AddressSanitizer knows them
    void* fake_stack = nullptr;
    void (*entry)(void*) = nullptr;
    void* argument = nullptr;
#ifdef LNS_BOOST_CONTEXT
    boost::context::detail::fcontext_t context = nullptr;
#else
    ucontext_t context = {};
#endif

    Fiber() = default;
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
    ~Fiber() {
        if (stack) munmap(stack, stack_bytes);
    }

    // The page below the stack is a guard page.
    void allocate() {
        void* mapped = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) fail("the simulator has no memory for another thread's stack");
        stack = static_cast<char*>(mapped);
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        mprotect(stack, page, PROT_NONE);
        bottom = stack + page, size = stack_bytes - page;
    }

    // The next switch to it starts f(x). Stacks of one size would compete for the same sets of the
    // cache: `color` shifts their tops.
    void prepare(void (*f)(void*), void* x, int color) {
        entry = f, argument = x;
        const size_t offset = size_t(color) * 832 % 16384 / 64 * 64;
#ifdef LNS_BOOST_CONTEXT
        context = boost::context::detail::make_fcontext(stack + stack_bytes - offset, size - offset,
                                                        &Fiber::enter);
#else
        getcontext(&context);
        context.uc_stack.ss_sp = const_cast<void*>(bottom);
        context.uc_stack.ss_size = size - offset;
        context.uc_link = nullptr;
        makecontext(&context, &Fiber::enter, 0);
#endif
    }

    // Runs `to` until something switches back here. `ends`: nothing will.
    static void change(Fiber& from, Fiber& to, bool ends = false) {
        source = &from, target = &to;
#ifdef LNS_ASAN
        __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.bottom, to.size);
#else
        (void)ends;
#endif
#ifdef LNS_BOOST_CONTEXT
        const auto arrived = boost::context::detail::jump_fcontext(to.context, nullptr);
        source->context = arrived.fctx;
#else
        swapcontext(&from.context, &to.context);
#endif
        finish(from.fake_stack);
    }

    // Clears the marks that AddressSanitizer left on its frames.
    void unmark() { ASAN_UNPOISON_MEMORY_REGION(bottom, size); }

  private:
    // Of the latest switch on this host thread.
    static inline constinit thread_local Fiber *source = nullptr, *target = nullptr;

#ifdef LNS_BOOST_CONTEXT
    static void enter(boost::context::detail::transfer_t arrived) {
        source->context = arrived.fctx;
#else
    static void enter() {
#endif
        finish(nullptr);
        target->entry(target->argument);
    }

    // The first switch away from a host thread's own stack reports its bounds.
    static void finish([[maybe_unused]] void* fake_stack) {
#ifdef LNS_ASAN
        const void* bottom = nullptr;
        size_t size = 0;
        __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
        if (!source->stack) source->bottom = bottom, source->size = size;
#endif
    }
};

} // namespace lns::sim
