// A set of byte strings with values, searched by prefix.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lns {

class Trie {
  public:
    Trie() = default;
    // Of equal keys, the last counts. Empty keys are ignored.
    explicit Trie(std::vector<std::pair<std::string, int>> entries) {
        std::stable_sort(entries.begin(), entries.end(),
                         [](const auto& a, const auto& b) { return a.first < b.first; });
        struct Range {
            size_t begin, end, depth; // entries that share `depth` bytes
        };
        std::vector<Range> ranges = {{0, entries.size(), 0}}; // of each node
        nodes.resize(1);
        for (size_t n = 0; n < nodes.size(); n++) {
            auto [at, end, depth] = ranges[n];
            for (; at < end && entries[at].first.size() == depth; at++)
                if (depth > 0) nodes[n].value = entries[at].second;
            nodes[n].first = uint32_t(nodes.size());
            while (at < end) {
                const char byte = entries[at].first[depth];
                const size_t begin = at;
                while (at < end && entries[at].first[depth] == byte) at++;
                nodes.push_back({.byte = static_cast<unsigned char>(byte)});
                ranges.push_back({begin, at, depth + 1});
                nodes[n].children++;
            }
        }
        for (uint32_t k = 0; k < nodes[0].children; k++)
            starts[nodes[nodes[0].first + k].byte] = nodes[0].first + k;
    }

    // Calls found(length, value) for each key with which the text begins, shortest first.
    template <class Found> void each_prefix(std::string_view text, const Found& found) const {
        if (text.empty()) return;
        uint32_t node = starts[static_cast<unsigned char>(text[0])];
        for (size_t length = 1; node; length++) {
            if (nodes[node].value >= 0) found(length, nodes[node].value);
            if (length == text.size()) return;
            node = child(node, static_cast<unsigned char>(text[length]));
        }
    }
    // Whether a key begins with this byte.
    bool starts_with(char byte) const { return starts[static_cast<unsigned char>(byte)] != 0; }
    bool empty() const { return nodes.size() < 2; }

  private:
    struct Node {
        int value = -1;
        uint32_t first = 0; // child; they are sorted by byte
        uint16_t children = 0;
        unsigned char byte = 0;
    };
    std::vector<Node> nodes;
    std::array<uint32_t, 256> starts = {}; // the root's children by byte, 0: none

    uint32_t child(uint32_t node, unsigned char byte) const { // 0: none
        uint32_t begin = nodes[node].first, end = begin + nodes[node].children;
        while (end - begin > 8) {
            const uint32_t middle = (begin + end) / 2;
            (nodes[middle].byte <= byte ? begin : end) = middle;
        }
        for (; begin < end; begin++)
            if (nodes[begin].byte == byte) return begin;
        return 0;
    }
};

} // namespace lns
