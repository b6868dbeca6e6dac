#include "gpt/model/profile.h"

#include <algorithm>

#include "gpt/base/error.h"
#include "gpt/base/terminal.h"

namespace lns {

Profile::Part& Profile::part(const char* group, const std::string& name) {
    for (Part& part : parts)
        if (part.name == name && part.group == group) return part;
    parts.push_back({name, group});
    return parts.back();
}

void Timed::record() {
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    Profile::Part& part = profile->part(cost.group, cost.name);
    part.calls++;
    part.seconds += seconds, part.flops += cost.flops, part.bytes += cost.bytes;
}

std::string profile_table(const Profile& profile, int64_t steps, double seconds,
                          const Limits& limits) {
    std::vector<Profile::Part> parts = profile.parts;
    std::stable_sort(parts.begin(), parts.end(),
                     [](const auto& a, const auto& b) { return a.seconds > b.seconds; });
    double recorded = 0;
    for (const Profile::Part& part : parts) recorded += part.seconds;
    parts.push_back({"everything else", "", 0, seconds - recorded, 0, 0});

    Table table;
    table.headers = {"part", "", "calls", "ms a step", "share", "GFLOP/s", "GB/s", "of its limit"};
    const double n = double(std::max<int64_t>(steps, 1));
    for (const Profile::Part& p : parts) {
        const double by_flops = limits.flops > 0 ? p.flops / limits.flops : 0;
        const double by_bytes = limits.bandwidth > 0 ? p.bytes / limits.bandwidth : 0;
        const double limit = std::max(by_flops, by_bytes);
        auto number = [&](const char* format, double value) {
            return value > 0 && p.seconds > 0 ? format_number(format, value) : std::string();
        };
        table.rows.push_back(
            {p.name, p.group, p.calls ? format_number("%.4g", double(p.calls) / n) : "",
             format_number("%.2f", 1e3 * p.seconds / n),
             format_number("%.1f%%", 100 * p.seconds / seconds),
             number("%.0f", p.flops / p.seconds / 1e9), number("%.1f", p.bytes / p.seconds / 1e9),
             limit > 0 && p.seconds > 0
                 ? format_number("%3.0f%%", 100 * limit / p.seconds) +
                       (by_flops >= by_bytes ? " of peak FLOPs" : " of bandwidth")
                 : ""});
    }
    return table.text() + format_number("%.2f ms a step; ", 1e3 * seconds / n) +
           format_number("the parts cover %.1f%% of it\n", 100 * recorded / seconds);
}

} // namespace lns
