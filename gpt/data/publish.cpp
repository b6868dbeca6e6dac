#include "gpt/data/publish.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "gpt/base/error.h"
#include "gpt/base/files.h"

namespace lns {

namespace fs = std::filesystem;

namespace {

bool is_link(const std::string& path) {
    std::error_code error;
    return fs::is_symlink(fs::symlink_status(path, error));
}

bool exists_nofollow(const std::string& path) {
    std::error_code error;
    return fs::exists(fs::symlink_status(path, error));
}

void rename_to(const std::string& from, const std::string& to) {
    if (rename(from.c_str(), to.c_str()) != 0)
        fail("cannot rename ", from, " to ", to, ": ", std::strerror(errno));
}

void make_directory(const std::string& path) {
    if (mkdir(path.c_str(), 0777) != 0)
        fail("cannot make the directory ", path, ": ", std::strerror(errno),
             ". Choose a place that can be written with --out");
}

// Retries: a directory may still list what a killed publisher was removing.
void remove_all(const std::string& path) {
    std::error_code error;
    for (int tries = 0; tries < 3; tries++) {
        fs::remove_all(path, error);
        if (!error) return;
    }
    fail("cannot remove ", path, ": ", error.message());
}

void sync_directory(const std::string& path) {
    const Fd directory(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (directory) fsync(directory.fd); // some file systems cannot
}

// Hard-links the files of a folder into a new one; false if the file system has no links.
bool link_files(const std::string& from, const std::string& to) {
    make_directory(to);
    for (const auto& entry : directory_entries(from)) {
        const std::string target = to + "/" + entry.path().filename().string();
        if (link(entry.path().c_str(), target.c_str()) != 0) return false;
    }
    return true;
}

// Moves `from` to `path`, which is a link or absent. Folders are exchanged, so that the name always
// exists.
void move_to(const std::string& from, const std::string& path) {
    if (fs::is_directory(fs::symlink_status(from)) && exists_nofollow(path)) {
        if (renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, path.c_str(), RENAME_EXCHANGE) == 0) return;
        remove_all(path);
    }
    rename_to(from, path);
}

} // namespace

bool is_dangling_member(const std::string& path) {
    std::error_code error;
    const std::string target = fs::read_symlink(path, error).string();
    return !error && target.rfind('.', 0) == 0 && target.find(".set/") != std::string::npos &&
           access(path.c_str(), F_OK) != 0;
}

PublishedSet::PublishedSet(const std::string& prefix) {
    const fs::path path(prefix);
    folder_ = path.has_parent_path() ? path.parent_path().string() : ".";
    name_ = path.filename().string();
    take_lock();
    try {
        clean_up();
        check_names();
        make_directory(new_dir());
    } catch (...) {
        unlink(at(name_ + ".lock").c_str());
        close(lock_);
        throw;
    }
}

PublishedSet::~PublishedSet() {
    try {
        clean_up();
    } catch (const std::exception&) { // the next publisher cleans up
    }
    unlink(at(name_ + ".lock").c_str());
    close(lock_);
}

// Only one process at a time may publish a prefix.
void PublishedSet::take_lock() {
    const std::string path = at(name_ + ".lock");
    while (true) {
        lock_ = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
        if (lock_ < 0)
            fail("cannot write ", path, ": ",
                 errno == ELOOP ? "it is a symbolic link" : std::strerror(errno),
                 ". Choose a place that can be written with --out");
        struct stat held, named;
        const bool taken = flock(lock_, LOCK_EX | LOCK_NB) == 0;
        const bool same = fstat(lock_, &held) == 0 && stat(path.c_str(), &named) == 0 &&
                          held.st_ino == named.st_ino && held.st_dev == named.st_dev;
        if (taken && same) return;
        close(lock_);
        if (!taken)
            fail("another tokenize is writing ", at(name_),
                 "_*. Wait for it, or choose another "
                 "--out");
    } // the previous owner removed the file
}

std::string PublishedSet::path(const std::string& kind, size_t number) const {
    char file[32];
    std::snprintf(file, sizeof file, "_%06zu.bin", number);
    return (folder_ == "." ? "" : folder_ + "/") + name_ + "_" + kind + file;
}

std::string PublishedSet::new_path(const std::string& kind, size_t number) const {
    return new_dir() + "/" + fs::path(path(kind, number)).filename().string();
}

std::string PublishedSet::new_tokenizer() const { return new_dir() + "/" + name_ + "_tokenizer"; }

bool PublishedSet::is_member(const std::string& file) const {
    if (file == name_ + "_tokenizer") return true;
    for (const std::string& start : {name_ + "_train_", name_ + "_val_"}) {
        const std::string end = file.ends_with(".mask") ? ".mask" : ".bin";
        if (!file.starts_with(start) || !file.ends_with(end) ||
            file.size() < start.size() + 6 + end.size())
            continue;
        const std::string number =
            file.substr(start.size(), file.size() - start.size() - end.size());
        if (number.size() <= 18 && number.find_first_not_of("0123456789") == std::string::npos)
            return true;
    }
    return false;
}

bool PublishedSet::is_switch_link(const std::string& file) const {
    std::error_code error;
    return fs::read_symlink(at(file), error).string() == "." + name_ + ".set/" + file;
}

std::vector<std::string> PublishedSet::members(const std::string& dir) const {
    std::vector<std::string> found;
    for (const auto& entry : directory_entries(dir))
        if (std::string file = entry.path().filename().string(); is_member(file))
            found.push_back(file);
    std::sort(found.begin(), found.end());
    return found;
}

void PublishedSet::check_names() const {
    for (const std::string& file : members(folder_)) {
        const fs::file_status status = fs::symlink_status(at(file));
        const bool folder = file == name_ + "_tokenizer";
        if (folder ? !fs::is_directory(status) : !fs::is_regular_file(status))
            fail(at(file), " is ",
                 fs::is_symlink(status)     ? "a symbolic link"
                 : fs::is_directory(status) ? "a directory"
                 : folder                   ? "not a directory"
                                            : "not a regular file",
                 ", and is not replaced. Remove it, or choose another --out");
    }
}

// Makes the name a link through the switch, which already has the file, if any.
void PublishedSet::link_to_switch(const std::string& file) {
    const std::string link = at("." + name_ + ".set-link"), target = "." + name_ + ".set/" + file;
    if (symlink(target.c_str(), link.c_str()) != 0)
        fail("cannot make the link ", link, ": ", std::strerror(errno));
    if (!fs::is_directory(fs::symlink_status(at(file)))) return rename_to(link, at(file));
    if (renameat2(AT_FDCWD, link.c_str(), AT_FDCWD, at(file).c_str(), RENAME_EXCHANGE) != 0) {
        remove_all(at(file));
        return rename_to(link, at(file));
    }
    remove_all(link);
}

int PublishedSet::publish() {
    const std::vector<std::string> before = members(folder_), after = members(new_dir());
    check_names(); // again: they may have changed meanwhile
    sync_directory(new_dir());
    int removed = 0;
    for (const std::string& file : before)
        removed += file.ends_with(".bin") && !std::binary_search(after.begin(), after.end(), file);

    bool links = true;
    make_directory(old_dir());
    for (const std::string& file : before) {
        const std::string from = at(file), to = old_dir() + "/" + file;
        links = links && (is_directory_at(from) ? link_files(from, to)
                                                : link(from.c_str(), to.c_str()) == 0);
    }
    const std::string old_target = "." + name_ + ".set-old", new_target = "." + name_ + ".set-new";
    links = links && symlink(old_target.c_str(), switch_path().c_str()) == 0;
    if (!links) {
        rename_one_by_one(after);
        return removed;
    }
    for (const std::string& file : before) link_to_switch(file);
    for (const std::string& file : after)
        if (!exists_nofollow(at(file))) link_to_switch(file);
    sync_directory(folder_);

    const std::string next = at("." + name_ + ".set-link");
    if (symlink(new_target.c_str(), next.c_str()) != 0)
        fail("cannot make the link ", next, ": ", std::strerror(errno));
    rename_to(next, switch_path()); // now the names refer to the new set
    sync_directory(folder_);
    clean_up();
    return removed;
}

void PublishedSet::rename_one_by_one(const std::vector<std::string>& files) {
    for (const std::string& file : members(folder_))
        if (!std::binary_search(files.begin(), files.end(), file)) remove_all(at(file));
    for (const std::string& file : files) move_to(new_dir() + "/" + file, at(file));
    remove_all(old_dir());
    remove_all(new_dir());
    sync_directory(folder_);
}

// Makes the names plain files of the current set, and removes everything else.
void PublishedSet::clean_up() {
    if (is_link(switch_path())) {
        for (const std::string& file : members(folder_))
            if (is_switch_link(file) && is_dangling_member(at(file))) unlink(at(file).c_str());
        for (const std::string& file : members(switch_path()))
            if (is_switch_link(file) || !exists_nofollow(at(file)))
                move_to(switch_path() + "/" + file, at(file));
        sync_directory(folder_);
    }
    // The switch first: its targets are only needed while names are links through it.
    for (const std::string& path :
         {switch_path(), at("." + name_ + ".set-link"), old_dir(), new_dir()})
        remove_all(path);
}

} // namespace lns
