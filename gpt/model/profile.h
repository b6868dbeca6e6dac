// Where the time of training steps goes: named parts, each with its own limit.
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
        double flops = 0, bytes = 0; // Cost, of all calls
    };
    std::vector<Part> parts; // in order of first use

    Part& part(const char* group, const std::string& name);
};

// A part of a pass and what one call of it costs.
struct Cost {
    const char *group, *name;
    double flops = 0; // of matmuls
    double bytes = 0; // read and written, each tensor once
};

// Adds its lifetime to a part of the profile; does nothing if that is null.
struct Timed {
    using Clock = std::chrono::steady_clock;

    Timed(Profile* profile, const Cost& cost)
        : profile(profile), cost(cost), start(profile ? Clock::now() : Clock::time_point()) {}
    ~Timed() {
        if (profile) record();
    }
    Timed(const Timed&) = delete;

    Profile* profile;
    Cost cost;
    Clock::time_point start;

  private:
    void record();
};

// The machine's peaks.
struct Limits {
    double flops = 0, bandwidth = 0; // FLOP/s, bytes/s
};

// A table of all parts: milliseconds a step, share of `seconds` (the wall time of all steps), rate,
// and the share of the limit, max(flops / peak, bytes / bandwidth), in the time taken.
std::string profile_table(const Profile& profile, int64_t steps, double seconds,
                          const Limits& limits);

} // namespace lns
