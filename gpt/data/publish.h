// The output of data/tokenize, published as a set: PREFIX_train_000000.bin ...,
// PREFIX_val_000000.bin ..., their masks (PREFIX_train_000000.mask ...) and the folder
// PREFIX_tokenizer. Whenever the program is killed, the
// names refer to the complete old set or the complete new set.
//
// Renaming many files is not atomic, but replacing one symbolic link is. So during publishing the
// names are links through a switch. These hidden files are involved:
//   .NAME.set-new/     the new set, written here from the start
//   .NAME.set-old/     hard links to the files of the old set
//   .NAME.set          the switch: a link to one of the two
// First each name becomes a link through the switch to the old file, then the switch is changed to
// the new set, then each name becomes a plain file again. Names that the current set lacks are
// dangling links, which glob_paths ignores. The next publisher cleans up after a kill.
// On file systems without links the files are renamed one by one, and a kill may leave a mixture.
#pragma once

#include <string>
#include <vector>

namespace lns {

class PublishedSet {
  public:
    // Locks the prefix, cleans up after a killed publisher, and throws if a name of the set exists
    // and is not a plain file (the tokenizer: not a folder).
    explicit PublishedSet(const std::string& prefix);
    ~PublishedSet(); // without publish() the old set is unchanged
    PublishedSet(const PublishedSet&) = delete;
    PublishedSet& operator=(const PublishedSet&) = delete;

    // PREFIX_train_000000.bin, and where to write it before publishing.
    std::string path(const std::string& kind, size_t number) const;
    std::string new_path(const std::string& kind, size_t number) const;
    std::string new_tokenizer() const;

    // Replaces the old set. Returns the number of old shards without a successor.
    int publish();

  private:
    std::string folder_, name_; // PREFIX is folder_/name_
    int lock_ = -1;
    std::string at(const std::string& file) const { return folder_ + "/" + file; }
    std::string new_dir() const { return at("." + name_ + ".set-new"); }
    std::string old_dir() const { return at("." + name_ + ".set-old"); }
    std::string switch_path() const { return at("." + name_ + ".set"); }
    bool is_member(const std::string& file) const;
    bool is_switch_link(const std::string& file) const;
    std::vector<std::string> members(const std::string& dir) const;
    void take_lock();
    void check_names() const;
    void link_to_switch(const std::string& file);
    void rename_one_by_one(const std::vector<std::string>& files);
    void clean_up();
};

// Whether path is a link of a set being published whose current set lacks the file.
bool is_dangling_member(const std::string& path);

} // namespace lns
