#include "gpt/data/text.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "gpt/base/error.h"
#include "gpt/base/files.h"

namespace lns {
namespace {

// "UTF-16LE", "UTF-32BE" etc., or nullptr: by the byte order mark, else by the positions of the
// zeros in ASCII characters.
const char* wide_encoding(std::string_view text) {
    auto starts = [&](std::string_view mark) { return text.substr(0, mark.size()) == mark; };
    if (starts(std::string_view("\xff\xfe\0\0", 4))) return "UTF-32LE";
    if (starts(std::string_view("\0\0\xfe\xff", 4))) return "UTF-32BE";
    if (starts("\xff\xfe")) return "UTF-16LE";
    if (starts("\xfe\xff")) return "UTF-16BE";
    const size_t n = std::min<size_t>(text.size(), 1 << 16) / 4 * 4;
    if (n < 4) return nullptr;
    size_t zeros[4] = {};
    for (size_t i = 0; i < n; i++) zeros[i % 4] += text[i] == 0;
    auto most = [&](int at) { return zeros[at] * 4 > n / 4 * 3; };
    auto few = [&](int at) { return zeros[at] * 4 < n / 4; };
    if (few(0) && most(1) && most(2) && most(3)) return "UTF-32LE";
    if (most(0) && most(1) && most(2) && few(3)) return "UTF-32BE";
    if (few(0) && most(1) && few(2) && most(3)) return "UTF-16LE";
    if (most(0) && few(1) && most(2) && few(3)) return "UTF-16BE";
    return nullptr;
}

} // namespace

std::string why_not_text(std::string_view text, const std::string& name,
                         const std::string& program) {
    auto starts = [&](std::string_view magic) { return text.substr(0, magic.size()) == magic; };
    if (is_lfs_pointer(text))
        return cat(name, " is a Git LFS pointer, not the text. Fetch the file: git lfs pull");
    const char* tool = starts("\x1f\x8b")                             ? "gzip"
                       : starts(std::string_view("\xfd\x37zXZ\0", 6)) ? "xz"
                       : starts("\x28\xb5\x2f\xfd")                   ? "zstd"
                       : starts("BZh")                                ? "bzip2"
                                                                      : nullptr;
    if (tool)
        return cat(name, " is compressed, expected text. Decompress it: ", tool, " -dc ", name,
                   " | ", program, " ...");
    int32_t magic = 0;
    if (text.size() >= 4) std::memcpy(&magic, text.data(), 4);
    if (magic == 20240520 || magic == 20240801)
        return cat(name, " is already a shard of tokens, expected text");
    if (const char* encoding = wide_encoding(text)) {
        const bool marked = starts("\xff\xfe") || starts("\xfe\xff") || starts({"\0\0\xfe\xff", 4});
        const std::string from =
            marked ? std::string(encoding, 6) : encoding; // iconv reads the mark
        return cat(name, " is text in ", encoding, ", expected UTF-8. Convert it: iconv -f ", from,
                   " -t UTF-8 ", name, " | ", program, " ...");
    }
    return "";
}

} // namespace lns
