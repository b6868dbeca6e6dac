// A persistent cache of facts about the machine that are expensive to measure. Keys and values are
// single lines of text, in a file in $LNS_CACHE, else $XDG_CACHE_HOME/lns.cpp, else
// ~/.cache/lns.cpp. LNS_CACHE=none disables it. Inaccessible files and invalid lines are ignored.
#pragma once

#include <map>
#include <optional>
#include <string>

namespace lns {

class Cache {
  public:
    explicit Cache(const std::string& file_name);

    const std::string* find(const std::string& key) const; // null if absent

    // Stores the value unless another process has stored one, and returns the stored one, so that
    // all processes use the same. nullopt if the file cannot be written.
    std::optional<std::string> find_or_insert(const std::string& key, const std::string& value);

    const std::string& path() const { return path_; } // "" if disabled

  private:
    std::string path_;
    std::map<std::string, std::string> entries_;
    void read();
};

} // namespace lns
