#include "gpt/data/charsmap.h"

#include "gpt/data/protobuf.h"

#include <cstring>

#include "gpt/base/error.h"

namespace lns {
namespace {

// A unit of the trie. The next byte is added to its index by exclusive or with the offset.
constexpr uint32_t is_value = 1u << 31, has_value = 1u << 8;
size_t offset_of(uint32_t unit) { return size_t(unit >> 10) << ((unit & 1u << 9) >> 6); }

std::string table_fault(std::string_view table) {
    if (table.empty()) return "";
    uint32_t trie_bytes = 0;
    if (table.size() <= sizeof trie_bytes) return "it is truncated";
    std::memcpy(&trie_bytes, table.data(), sizeof trie_bytes);
    table.remove_prefix(sizeof trie_bytes);
    if (trie_bytes % 4 != 0 || trie_bytes == 0 || trie_bytes >= table.size())
        return "its trie is longer than the table";
    std::vector<uint32_t> units(trie_bytes / 4);
    std::memcpy(units.data(), table.data(), trie_bytes);
    const std::string_view strings = table.substr(trie_bytes);
    if (strings.back() != '\0') return "its last string is not terminated";

    for (size_t i = 0; i < units.size(); i++) {
        const uint32_t unit = units[i];
        if (i > 0 && (unit & is_value)) continue; // not a node
        const size_t children = i ^ offset_of(unit);
        if ((children | 255) >= units.size()) return "its trie points beyond its end";
        if ((unit & has_value) && (units[children] & ~is_value) >= strings.size())
            return "its trie points beyond the last string";
    }
    return "";
}

} // namespace

Charsmap::Charsmap(std::string_view table, const std::string& where) {
    const std::string fault = table.empty() ? "it is empty" : table_fault(table);
    if (!fault.empty()) fail(where, " has a damaged table of normalizations: ", fault);
    uint32_t trie_bytes;
    std::memcpy(&trie_bytes, table.data(), sizeof trie_bytes);
    units.resize(trie_bytes / 4);
    std::memcpy(units.data(), table.data() + sizeof trie_bytes, trie_bytes);
    strings = table.substr(sizeof trie_bytes + trie_bytes);
}

bool Charsmap::find(std::string_view text, std::string_view& replacement) const {
    size_t node = offset_of(units[0]);
    for (char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte == 0) return false;
        node ^= byte;
        const uint32_t unit = units[node];
        if ((unit & (is_value | 0xff)) != byte) return false;
        node ^= offset_of(unit);
        if (!(unit & has_value)) continue;
        replacement = strings.c_str() + (units[node] & ~is_value);
        return true;
    }
    return false;
}

std::string charsmap_fault(std::string_view model) {
    constexpr uint64_t normalizer = 3, denormalizer = 5, precompiled_charsmap = 2;
    std::string fault;
    each_field(model, [&](uint64_t number, std::string_view spec, uint64_t) {
        if (number != normalizer && number != denormalizer) return;
        each_field(spec, [&](uint64_t field, std::string_view table, uint64_t) {
            if (field == precompiled_charsmap && fault.empty()) fault = table_fault(table);
        });
    });
    return fault;
}

} // namespace lns
