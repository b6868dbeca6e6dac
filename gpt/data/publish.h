// The files of one data/tokenize, published as a set: PREFIX_train_000000.bin ...,
// PREFIX_val_000000.bin ... and the folder PREFIX_tokenizer. Whenever the program is killed, its
// names show the old set whole or the new set whole.
//
// Renaming many files takes many steps, switching one symbolic link takes one. So while a set is
// published its names are links through PREFIX's switch (hidden files beside them):
//   .NAME.set-new/     the new set; here it is written from the start
//   .NAME.set-old/     hard links to the files of the old one
//   .NAME.set          the switch: a link to one of the two
// First each name becomes a link through the switch to the old file, then the switch goes over to
// the new set, then each name becomes a plain file again. Names that the set on show lacks are
// links to nothing; glob_paths leaves them out. What a kill leaves is tidied by the next publisher.
// On file systems without links the files are renamed one by one, and a kill may leave some of
// both.
#pragma once

#include <string>
#include <vector>

namespace lns {

class PublishedSet {
  public:
    // Takes the prefix's lock, tidies what a killed publisher left, and throws unless each of the
    // set's names is free or has a plain file (the tokenizer: a folder) that may be replaced.
    explicit PublishedSet(const std::string& prefix);
    ~PublishedSet(); // without publish() the old set stays as it is
    PublishedSet(const PublishedSet&) = delete;
    PublishedSet& operator=(const PublishedSet&) = delete;

    // PREFIX_train_000000.bin, and where it is to be written until it is published.
    std::string path(const std::string& kind, size_t number) const;
    std::string new_path(const std::string& kind, size_t number) const;
    std::string new_tokenizer() const;

    // Replaces the old set by what was written. Returns how many old shards have no successor.
    int publish();

  private:
    std::string folder_, name_; // of the prefix
    int lock_ = -1;
    std::string at(const std::string& file) const { return folder_ + "/" + file; }
    std::string new_dir() const { return at("." + name_ + ".set-new"); }
    std::string old_dir() const { return at("." + name_ + ".set-old"); }
    std::string switch_path() const { return at("." + name_ + ".set"); }
    bool is_member(const std::string& file) const;
    bool is_through_switch(const std::string& file) const;
    std::vector<std::string> members(const std::string& dir) const;
    void take_lock();
    void check_names() const;
    void show_through_switch(const std::string& file);
    void rename_one_by_one(const std::vector<std::string>& files);
    void tidy();
};

// Whether path is a name of a set that is being published, and the set on show lacks it.
bool is_link_to_nothing(const std::string& path);

} // namespace lns
