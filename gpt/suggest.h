// "did you mean": the known names nearest to an unknown one.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace lns {

// Levenshtein distance: the fewest insertions, deletions and substitutions from a to b.
inline int edit_distance(const std::string& a, const std::string& b) {
    std::vector<int> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); j++) row[j] = int(j);
    for (size_t i = 1; i <= a.size(); i++) {
        int diagonal = row[0];
        row[0] = int(i);
        for (size_t j = 1; j <= b.size(); j++) {
            int substitute = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = std::min({row[j] + 1, row[j - 1] + 1, substitute});
        }
    }
    return row[b.size()];
}

// " Did you mean 'x' or 'y'?" for names that are near, else "".
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
