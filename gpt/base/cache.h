// What is costly to find out and holds until the machine changes, remembered from one run to the
// next: keys and values, each one line of text, in a file of $LNS_CACHE, else of
// $XDG_CACHE_HOME/lns.cpp, else of ~/.cache/lns.cpp. With LNS_CACHE=none nothing is remembered.
// A file that cannot be read or written, or lines in it that are not ours, are as if not there.
#pragma once

#include <map>
#include <optional>
#include <string>

namespace lns {

class Cache {
  public:
    explicit Cache(const std::string& name); // of the file

    const std::string* find(const std::string& key) const; // null if there is none

    // The value that is remembered from now on: this one, or one that another process wrote
    // meanwhile, so that all processes go on with the same. None if nothing can be remembered.
    std::optional<std::string> settle(const std::string& key, const std::string& value);

    const std::string& path() const { return path_; } // "" if nothing shall be remembered

  private:
    std::string path_;
    std::map<std::string, std::string> entries_;
    void read();
};

} // namespace lns
