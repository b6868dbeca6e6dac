// "Did you mean": the known names nearest to an unknown one.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace lns {

// The number of insertions, deletions, substitutions and swaps of neighbours from a to b.
inline int edit_distance(const std::string& a, const std::string& b) {
    std::vector<std::vector<int>> d(a.size() + 1, std::vector<int>(b.size() + 1));
    for (size_t i = 0; i <= a.size(); i++)
        for (size_t j = 0; j <= b.size(); j++) {
            if (i == 0 || j == 0) {
                d[i][j] = int(i + j);
                continue;
            }
            d[i][j] = std::min(
                {d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
        }
    return d[a.size()][b.size()];
}

// " Did you mean 'x' or 'y'?", or "" if no known name is near.
inline std::string did_you_mean(const std::string& name, const std::vector<std::string>& known) {
    std::vector<std::pair<int, std::string>> near;
    for (const std::string& candidate : known) {
        int distance = edit_distance(name, candidate);
        bool part = name.size() >= 3 && candidate.find(name) != std::string::npos;
        if (part || distance <= 1 + int(name.size()) / 4) near.push_back({distance, candidate});
    }
    std::sort(near.begin(), near.end());
    if (near.size() > 3) near.resize(3);
    std::string text;
    for (size_t i = 0; i < near.size(); i++) {
        text += i == 0 ? " Did you mean '" : i + 1 == near.size() ? "' or '" : "', '";
        text += near[i].second;
    }
    return text.empty() ? "" : text + "'?";
}

// "a, b, c"
inline std::string join(const std::vector<std::string>& names, const char* separator = ", ") {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : separator) + name;
    return text;
}

} // namespace lns
