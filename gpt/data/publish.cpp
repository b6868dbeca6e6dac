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

bool exists_itself(const std::string& path) {
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

// A directory may still list what a killed publisher was just removing: then once more.
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

// The files of a folder under their own names in another; false if the file system has no links.
bool link_files(const std::string& from, const std::string& to) {
    make_directory(to);
    for (const auto& entry : directory_entries(from)) {
        const std::string target = to + "/" + entry.path().filename().string();
        if (link(entry.path().c_str(), target.c_str()) != 0) return false;
    }
    return true;
}

// `path`, a link or nothing, becomes what stands at `from`; of a folder by way of an exchange, so
// that the name is never without one.
void put_in_place(const std::string& from, const std::string& path) {
    if (fs::is_directory(fs::symlink_status(from)) && exists_itself(path)) {
        if (renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, path.c_str(), RENAME_EXCHANGE) == 0) return;
        remove_all(path);
    }
    rename_to(from, path);
}

} // namespace

bool is_link_to_nothing(const std::string& path) {
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
        tidy();
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
        tidy();
    } catch (const std::exception&) { // the next publisher tries again
    }
    unlink(at(name_ + ".lock").c_str());
    close(lock_);
}

// Only one process at a time may write under a prefix.
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
    } // whoever had it removed it
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
        if (file.rfind(start, 0) != 0 || file.size() < start.size() + 10) continue;
        const std::string number = file.substr(start.size(), file.size() - start.size() - 4);
        if (file.substr(file.size() - 4) == ".bin" && number.size() <= 18 &&
            number.find_first_not_of("0123456789") == std::string::npos)
            return true;
    }
    return false;
}

bool PublishedSet::is_through_switch(const std::string& file) const {
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
                 : folder                   ? "no directory"
                                            : "no regular file",
                 ", which is not replaced. Remove it, or choose another --out");
    }
}

// The name becomes a link through the switch. What it showed, if anything, is there already.
void PublishedSet::show_through_switch(const std::string& file) {
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
    check_names(); // they may have changed in the meantime
    sync_directory(new_dir());
    int gone = 0;
    for (const std::string& file : before)
        gone +=
            file != name_ + "_tokenizer" && !std::binary_search(after.begin(), after.end(), file);

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
        return gone;
    }
    for (const std::string& file : before) show_through_switch(file);
    for (const std::string& file : after)
        if (!exists_itself(at(file))) show_through_switch(file);
    sync_directory(folder_);

    const std::string next = at("." + name_ + ".set-link");
    if (symlink(new_target.c_str(), next.c_str()) != 0)
        fail("cannot make the link ", next, ": ", std::strerror(errno));
    rename_to(next, switch_path()); // from here on the names show the new set
    sync_directory(folder_);
    tidy();
    return gone;
}

void PublishedSet::rename_one_by_one(const std::vector<std::string>& files) {
    for (const std::string& file : members(folder_))
        if (!std::binary_search(files.begin(), files.end(), file)) remove_all(at(file));
    for (const std::string& file : files) put_in_place(new_dir() + "/" + file, at(file));
    remove_all(old_dir());
    remove_all(new_dir());
    sync_directory(folder_);
}

// The names become plain files of the set on show, and nothing else is left.
void PublishedSet::tidy() {
    if (is_link(switch_path())) {
        for (const std::string& file : members(folder_))
            if (is_through_switch(file) && is_link_to_nothing(at(file))) unlink(at(file).c_str());
        for (const std::string& file : members(switch_path()))
            if (is_through_switch(file) || !exists_itself(at(file)))
                put_in_place(switch_path() + "/" + file, at(file));
        sync_directory(folder_);
    }
    // The switch first: what it points to is only needed while a name is a link through it.
    for (const std::string& path :
         {switch_path(), at("." + name_ + ".set-link"), old_dir(), new_dir()})
        remove_all(path);
}

} // namespace lns
