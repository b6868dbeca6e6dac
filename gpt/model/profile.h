// Where the time of training steps goes, in named parts, each beside its own limit.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace lns {

struct Profile {
    struct Part {
        std::string name, group;
        int64_t calls = 0;
        double seconds = 0;
        double flops = 0; // of matrix products
        double bytes = 0; // read and written, each tensor counted once
    };
    std::vector<Part> parts; // in the order of first use

    Part& part(const char* group, const std::string& name);
};

// Books the time until its end on a part of the profile; does nothing if that is null.
struct Timed {
    using Clock = std::chrono::steady_clock;

    Timed(Profile* profile, const char* group, const char* name, double flops, double bytes)
        : profile(profile), group(group), name(name), flops(flops), bytes(bytes),
          start(profile ? Clock::now() : Clock::time_point()) {}
    ~Timed() {
        if (profile) book();
    }
    Timed(const Timed&) = delete;

    Profile* profile;
    const char *group, *name;
    double flops, bytes;
    Clock::time_point start;

  private:
    void book();
};

// What the machine could do at most.
struct Limits {
    double flops = 0, bandwidth = 0; // a second
};

// A table of all parts: milliseconds a step, share of `seconds` (the wall time of all steps), rate,
// and the share of the limit, max(flops / peak, bytes / bandwidth), in the time taken.
std::string profile_table(const Profile& profile, int64_t steps, double seconds,
                          const Limits& limits);

} // namespace lns
