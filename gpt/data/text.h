// What a file that should be text may be instead.
#pragma once

#include <string>
#include <string_view>

namespace lns {

// Whether a file is what `git clone` leaves in place of a large file where Git LFS is missing.
bool is_lfs_pointer(std::string_view text);

// Why what begins like this is surely no text in UTF-8 or another encoding of single bytes, and how
// to make it one: a sentence that begins with the file's name. "" if it may be text. `program` is
// what reads it, as in "data/tokenize".
std::string why_not_text(std::string_view start, const std::string& name,
                         const std::string& program);

} // namespace lns
