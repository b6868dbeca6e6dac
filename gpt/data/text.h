// Recognizes files that are not text.
#pragma once

#include <string>
#include <string_view>

namespace lns {

// Why a file that begins like this is not text in UTF-8 or a single-byte encoding, and how to
// convert it: a sentence that begins with the file's name. "" if it may be text. `program` is the
// reader, such as "data/tokenize".
std::string why_not_text(std::string_view start, const std::string& name,
                         const std::string& program);

} // namespace lns
