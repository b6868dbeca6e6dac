#include "dev/sim/parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>

namespace lns::sim {

namespace {

// Threads that sleep until there is work. The caller works too, and waits only for helpers that
// have woken up: in a forked process, which has none, for nobody.
struct Helpers {
    std::mutex mutex;
    std::condition_variable wake, done;
    const std::function<void(int64_t)>* work = nullptr;
    int64_t n = 0;
    std::atomic<int64_t> next = 0;
    int at_work = 0;
    uint64_t job = 0;

    Helpers() {
        const char* variable = std::getenv("LNS_SIM_THREADS");
        const int threads =
            variable ? std::atoi(variable) : int(std::thread::hardware_concurrency());
        for (int i = 1; i < threads; i++) std::thread([this] { help(); }).detach();
    }

    void do_work(const std::function<void(int64_t)>& f, int64_t count) {
        for (int64_t i = next++; i < count; i = next++) f(i);
    }

    void help() {
        uint64_t seen = 0;
        std::unique_lock lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return job != seen; });
            seen = job;
            if (!work) continue;
            at_work++;
            const std::function<void(int64_t)>& f = *work; // the caller may reset `work`
            const int64_t count = n;
            lock.unlock();
            do_work(f, count);
            lock.lock();
            if (--at_work == 0) done.notify_one();
        }
    }

    void run(int64_t count, const std::function<void(int64_t)>& f) {
        {
            const std::lock_guard lock(mutex);
            work = &f, n = count, next = 0, job++;
        }
        wake.notify_all();
        do_work(f, count);
        std::unique_lock lock(mutex);
        work = nullptr;
        done.wait(lock, [&] { return at_work == 0; });
    }
};

} // namespace

void parallel_for(int64_t n, const std::function<void(int64_t)>& work) {
    static auto* helpers = new Helpers; // never destroyed: its threads wait for ever
    static std::mutex one_at_a_time;
    static thread_local bool inside = false;
    if (n <= 1 || inside || !one_at_a_time.try_lock()) {
        for (int64_t i = 0; i < n; i++) work(i);
        return;
    }
    inside = true;
    helpers->run(n, work);
    inside = false;
    one_at_a_time.unlock();
}

} // namespace lns::sim
