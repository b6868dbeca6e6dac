#include "gpt/data/tokenizer.h"

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/json.h"
#include "gpt/base/random.h"
#include "gpt/data/charsmap.h"
#include "gpt/data/tokenizer_files.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <queue>
#include <sstream>
#include <unordered_map>

#ifdef LNS_PCRE2
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#endif
#ifdef LNS_SENTENCEPIECE
#include <sentencepiece_processor.h>
#endif

namespace lns {

namespace {

namespace fs = std::filesystem;
using json = nlohmann::json;

// Writes a tokenizer's files to dir, and removes those of other kinds.
void save_files(const std::string& dir, const std::vector<std::array<std::string, 2>>& files) {
    std::error_code error;
    fs::create_directories(dir, error);
    if (error) fail("cannot make the directory ", dir, ": ", error.message());
    for (const char* name :
         {"tokenizer.model", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe",
          "tokenizer.json", "tokenizer_config.json", "added_tokens.json"})
        if (std::none_of(files.begin(), files.end(), [&](auto& file) { return file[0] == name; }))
            fs::remove(fs::path(dir) / name, error);
    for (const auto& [name, bytes] : files) write_file_atomic(dir + "/" + name, bytes);
}

[[noreturn]] void bad_token(int token, const TokenizerId& id) {
    fail("token ", token, " cannot be decoded: the ", id.kind, " tokenizer has 0 to ",
         id.vocab_size - 1);
}

// GPT-2's files represent a byte by a printable character: itself if printable in Latin-1, else
// U+0100 and up, in order (bytes_to_unicode in openai/gpt-2, src/encoder.py).
std::array<uint32_t, 256> byte_names() {
    std::array<uint32_t, 256> name_of;
    uint32_t next = 0x100;
    for (uint32_t b = 0; b < 256; b++) {
        bool printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
        name_of[b] = printable ? b : next++;
    }
    return name_of;
}

// Bytes

// tokenizer.json for Hugging Face: a byte-level BPE without merges.
json bytes_as_hugging_face() {
    json vocab;
    const std::array<uint32_t, 256> names = byte_names();
    for (int b = 0; b < 256; b++) {
        const uint32_t c = names[size_t(b)]; // below U+0800
        vocab[c < 0x80 ? std::string(1, char(c))
                       : std::string{char(0xC0 | c >> 6), char(0x80 | (c & 63))}] = b;
    }
    const char* eot = "<|endoftext|>";
    vocab[eot] = 256;
    const json level = {{"type", "ByteLevel"},
                        {"add_prefix_space", false},
                        {"trim_offsets", true},
                        {"use_regex", false}};
    return {{"version", "1.0"},
            {"truncation", nullptr},
            {"padding", nullptr},
            {"added_tokens",
             {{{"id", 256},
               {"content", eot},
               {"single_word", false},
               {"lstrip", false},
               {"rstrip", false},
               {"normalized", false},
               {"special", true}}}},
            {"normalizer", nullptr},
            {"pre_tokenizer", level},
            {"post_processor", nullptr},
            {"decoder", level},
            {"model",
             {{"type", "BPE"},
              {"dropout", nullptr},
              {"unk_token", nullptr},
              {"continuing_subword_prefix", nullptr},
              {"end_of_word_suffix", nullptr},
              {"fuse_unk", false},
              {"byte_fallback", false},
              {"vocab", vocab},
              {"merges", json::array()}}}};
}

struct Bytes : Tokenizer {
    std::vector<int> encode(std::string_view text) const override {
        std::vector<int> tokens(text.size());
        for (size_t i = 0; i < text.size(); i++) tokens[i] = static_cast<unsigned char>(text[i]);
        return tokens;
    }
    std::string decode(const int* tokens, size_t n) const override {
        std::string text;
        for (size_t i = 0; i < n; i++) {
            if (tokens[i] < 0 || tokens[i] > 256) bad_token(tokens[i], id());
            if (tokens[i] < 256) text += char(tokens[i]);
        }
        return text;
    }
    bool has(int token) const override { return token >= 0 && token <= 256; }
    TokenizerId id() const override {
        return {"bytes", 257, 256, fnv1a("bytes, then end-of-text")};
    }
    void save(const std::string& dir) const override {
        const char* eot = "<|endoftext|>";
        json config = {{"kind", "bytes"},
                       {"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"bos_token", eot},
                       {"eos_token", eot},
                       {"clean_up_tokenization_spaces", false}};
        save_files(dir, {{"tokenizer.json", bytes_as_hugging_face().dump(1) + "\n"},
                         {"tokenizer_config.json", config.dump(2) + "\n"}});
    }
    size_t safe_cut(std::string_view text) const override { return text.size(); }
};

#ifdef LNS_PCRE2

// UTF-8

struct Character {
    uint32_t code; // invalid: no valid character starts here, length is 1
    uint32_t length;
    static constexpr uint32_t invalid = 0xffffffff;
};

// The character at text[i], by Unicode's table 3-7: no overlong forms, no surrogates.
Character character_at(std::string_view text, size_t i) {
    auto byte = [&](size_t k) -> uint32_t {
        return k < text.size() ? static_cast<unsigned char>(text[k]) : 0;
    };
    uint32_t lead = byte(i);
    if (lead < 0x80) return {lead, 1};
    uint32_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if (lead < 0xc2 || lead > 0xf4) return {Character::invalid, 1};
    uint32_t code = lead & (0xff >> (length + 1));
    for (uint32_t k = 1; k < length; k++) {
        if ((byte(i + k) & 0xc0) != 0x80) return {Character::invalid, 1};
        code = code << 6 | (byte(i + k) & 0x3f);
    }
    bool overlong = code < (length == 3 ? 0x800u : length == 4 ? 0x10000u : 0x80u);
    if (overlong || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
        return {Character::invalid, 1};
    return {code, length};
}

void append_utf8(std::string& out, uint32_t code) {
    if (code < 0x80) {
        out += char(code);
    } else if (code < 0x800) {
        out += char(0xc0 | code >> 6);
        out += char(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
        out += char(0xe0 | code >> 12);
        out += char(0x80 | (code >> 6 & 0x3f));
        out += char(0x80 | (code & 0x3f));
    } else {
        out += char(0xf0 | code >> 18);
        out += char(0x80 | (code >> 12 & 0x3f));
        out += char(0x80 | (code >> 6 & 0x3f));
        out += char(0x80 | (code & 0x3f));
    }
}

// GPT-2

// GPT-2 splits a text into pieces, which are encoded independently, by this rule (openai/gpt-2,
// src/encoder.py), whose alternatives are tried from left to right:
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// It depends only on four classes of characters, so PCRE2 fills a table of classes once, and
// next_piece applies the rule to the table.
enum Class : unsigned char { other, letter, number, space };

std::vector<Class> classify_unicode() {
    std::string all;
    for (uint32_t code = 0; code < 0x110000; code++)
        if (code < 0xd800 || code >= 0xe000) append_utf8(all, code);
    // \s is Unicode's White_Space, as in the original. PCRE2's \s adds U+180E.
    const char* pattern = R"((\p{L}+)|(\p{N}+)|[\x09-\x0d\x20\x85\xa0\x{1680}\x{2000}-\x{200a})"
                          R"(\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]+)";
    int error;
    PCRE2_SIZE where;
    pcre2_code* code = pcre2_compile(PCRE2_SPTR(pattern), PCRE2_ZERO_TERMINATED, PCRE2_UTF, &error,
                                     &where, nullptr);
    if (!code) {
        PCRE2_UCHAR message[256] = "";
        pcre2_get_error_message(error, message, sizeof message);
        fail("this PCRE2 cannot classify Unicode characters (", message,
             "). Install one built with Unicode support, such as Debian's libpcre2-dev");
    }
    pcre2_jit_compile(code, PCRE2_JIT_COMPLETE); // optional
    pcre2_match_data* match = pcre2_match_data_create_from_pattern(code, nullptr);
    std::vector<Class> table(0x110000, other);
    for (size_t at = 0; at < all.size();) {
        int groups = pcre2_match(code, PCRE2_SPTR(all.data()), all.size(), at, PCRE2_NO_UTF_CHECK,
                                 match, nullptr);
        if (groups < 0) break; // no match
        const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match);
        Class found = groups == 2 ? letter : groups == 3 ? number : space;
        for (at = range[0]; at < range[1];) {
            Character c = character_at(all, at);
            table[c.code] = found;
            at += c.length;
        }
    }
    pcre2_match_data_free(match);
    pcre2_code_free(code);
    return table;
}

const std::vector<Class>& unicode_classes() {
    static const std::vector<Class> table = classify_unicode();
    return table;
}

struct Splitter {
    const Class* table = unicode_classes().data();
    Digits digits = Digits::in_runs_with_spaces;

    Class at(std::string_view text, size_t i, size_t& length) const {
        unsigned char byte = static_cast<unsigned char>(text[i]);
        if (byte < 0x80) {
            length = 1;
            return table[byte];
        }
        Character c = character_at(text, i);
        length = c.length;
        return c.code == Character::invalid ? other : table[c.code];
    }

    // The end of the segment that starts at i < text.size(). Digits first splits a text into
    // segments (digits, one by one or in runs, and the text between), each then split on its own.
    size_t segment_end(std::string_view text, size_t i) const {
        if (digits == Digits::in_runs_with_spaces) return text.size();
        size_t length;
        const bool first = at(text, i, length) == number;
        for (i += length; i < text.size(); i += length)
            if ((at(text, i, length) == number) != first || (first && digits == Digits::each))
                break;
        return i;
    }

    // The end of the piece that starts at i < text.size().
    size_t next_piece(std::string_view text, size_t i) const {
        if (text[i] == '\'') {
            std::string_view rest = text.substr(i + 1, 2);
            char first = rest.empty() ? 0 : rest[0];
            if (first == 's' || first == 't' || first == 'm' || first == 'd') return i + 2;
            if (rest == "re" || rest == "ve" || rest == "ll") return i + 3;
        }
        size_t length, end = i;
        Class kind = at(text, i, length);
        if (text[i] == ' ' && i + 1 < text.size()) {
            size_t next_length;
            Class next = at(text, i + 1, next_length);
            if (next != space) kind = next, length = next_length, end++;
        }
        size_t last = end; // start of the run's last character
        while (true) {
            last = end;
            end += length;
            if (end == text.size()) return end;
            if (at(text, end, length) != kind) break;
        }
        // The last of several spaces belongs to the piece that follows.
        return kind == space && last > i ? last : end;
    }

    // See Tokenizer::safe_cut. Only a leading space and a contraction mix classes in a piece. So a
    // piece ends between two characters of different classes, unless the first is a space (which
    // may begin the next piece) or both may be a contraction. Digits only adds ends.
    size_t safe_cut(std::string_view text) const {
        for (size_t p = text.size(); p-- > 1;) {
            unsigned char byte = static_cast<unsigned char>(text[p]);
            if (byte >= 0x80 && byte < 0xc0) continue; // may be inside a character
            size_t length;
            Class next = at(text, p, length);
            if (byte >= 0xc0 && length == 1) continue; // following text may complete it
            Class previous = other;                    // if no valid character ends at p
            for (size_t back = 1; back <= std::min<size_t>(p, 4); back++) {
                Class kind = at(text, p - back, length);
                bool continuation = (static_cast<unsigned char>(text[p - back]) & 0xc0) == 0x80;
                if (length == back && !continuation) previous = kind;
                if (!continuation) break;
            }
            if (previous == space || previous == next) continue;
            if (previous == other && next == letter) continue;
            return p;
        }
        return 0;
    }
};

struct ByteNames {
    std::array<uint32_t, 256> name_of = byte_names();
    std::unordered_map<uint32_t, unsigned char> byte_of;
    ByteNames() {
        for (size_t b = 0; b < 256; b++) byte_of[name_of[b]] = static_cast<unsigned char>(b);
    }
    // False if a character of the name represents no byte.
    bool bytes(std::string_view name, std::string& out) const {
        out.clear();
        for (size_t i = 0; i < name.size();) {
            Character c = character_at(name, i);
            auto found = byte_of.find(c.code);
            if (found == byte_of.end()) return false;
            out += char(found->second);
            i += c.length;
        }
        return true;
    }
};

// An open hash table from a pair of tokens to the rank and the result of their merge.
struct Merges {
    struct Entry {
        uint64_t pair = UINT64_MAX;
        uint32_t rank = 0;
        int id = 0;
    };
    std::vector<Entry> entries;
    uint64_t mask = 0;

    void reserve(size_t n) {
        size_t size = 16;
        while (size < 3 * n) size *= 2;
        entries.assign(size, {});
        mask = size - 1;
    }
    static uint64_t pair_of(int a, int b) { return uint64_t(uint32_t(a)) << 32 | uint32_t(b); }
    size_t slot(uint64_t pair) const {
        size_t s = (pair * 0x9E3779B97F4A7C15 >> 20) & mask;
        while (entries[s].pair != pair && entries[s].pair != UINT64_MAX) s = (s + 1) & mask;
        return s;
    }
    const Entry* find(int a, int b) const {
        const Entry& entry = entries[slot(pair_of(a, b))];
        return entry.pair == UINT64_MAX ? nullptr : &entry;
    }
};

// GPT-2's original pair of files.
BytePairs read_vocab_and_merges(const std::string& dir,
                                std::vector<std::array<std::string, 2>>& files) {
    const bool original = path_exists(dir + "/encoder.json");
    BytePairs pairs;
    pairs.path = dir + (original ? "/encoder.json" : "/vocab.json");
    const std::string path = dir + (original ? "/vocab.bpe" : "/merges.txt");
    for (const std::string& needed : {pairs.path, path})
        if (!path_exists(needed))
            fail(needed, " is missing. GPT-2's tokenizer consists of encoder.json and vocab.bpe, "
                         "or of vocab.json and merges.txt");
    files = {{"vocab.json", read_tokenizer_file(pairs.path)},
             {"merges.txt", read_tokenizer_file(path)}};
    pairs.vocab = parse_json(files[0][1], pairs.path);
    std::istringstream in(files[1][1]);
    std::string line;
    for (int number = 1; std::getline(in, line); number++) {
        if (!line.empty() && line.back() == '\r') line.pop_back();
        if (line.empty() || (number == 1 && line.rfind("#version", 0) == 0)) continue;
        size_t gap = line.find(' ');
        if (gap == std::string::npos || gap == 0 || gap + 1 == line.size() ||
            line.find(' ', gap + 1) != std::string::npos)
            fail("line ", number, " of ", path, " is ", quoted(line),
                 ", expected two tokens separated by a space. Fetch the file again");
        pairs.merges.emplace_back(line.substr(0, gap), line.substr(gap + 1));
    }
    if (pairs.merges.empty()) fail(path, " has no merges, expected about 50,000. Fetch it again");
    return pairs;
}

struct Gpt2 : Tokenizer {
    std::vector<std::array<std::string, 2>> files; // names and contents as read, for save
    std::vector<std::string> bytes_of;             // by id; "" for special tokens and gaps
    std::vector<bool> known;
    std::array<int, 256> byte_ids; // -1: no token
    int unknown = -1;              // for bytes without a token; -1 drops them
    bool fuse_unknown = false;     // adjacent ones become one
    bool add_prefix_space = false; // to a text that does not begin with a space
    Merges merges;
    TokenizerId identity;
    Splitter splitter;
    uint64_t serial; // distinguishes cache entries of different tokenizers

    // From a directory or a tokenizer.json, which has precedence over other files.
    explicit Gpt2(const std::string& path) {
        static std::atomic<uint64_t> count{0};
        serial = ++count;
        const bool is_dir = is_directory_at(path);
        if (!is_dir && !path_exists(path))
            fail("there is no directory ", path,
                 ", expected one with encoder.json and vocab.bpe, or "
                 "vocab.json and merges.txt (of GPT-2)");
        const std::string dir = is_dir ? path : fs::path(path).parent_path().string();
        const bool has_config = is_dir || fs::path(path).filename() == "tokenizer.json";
        TokenizerConfig config;
        if (has_config) config = TokenizerConfig(dir.empty() ? "." : dir);
        const std::string tokenizer_json = is_dir ? path + "/tokenizer.json" : path;
        BytePairs pairs;
        if (path_exists(tokenizer_json)) {
            config.expect_class({"GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast",
                                 "TokenizersBackend"});
            files = {{"tokenizer.json", read_tokenizer_file(tokenizer_json)}};
            pairs = read_tokenizer_json(files[0][1], tokenizer_json);
        } else {
            // Other classes use the same two files with another splitting rule.
            config.expect_class({"GPT2Tokenizer", "GPT2TokenizerFast"});
            pairs = read_vocab_and_merges(dir, files);
        }
        ByteNames names;
        read_vocab(pairs, config, names);
        read_settings(pairs, config);
        read_merges(pairs);
        ids.clear();
        if (config.text.empty()) config.text = own_config();
        files.push_back({"tokenizer_config.json", config.text});
        if (const std::string added = dir + "/added_tokens.json"; is_dir && path_exists(added))
            files.push_back({"added_tokens.json", read_tokenizer_file(added)});
    }

    std::unordered_map<std::string, int> ids; // by name; only during construction

    void add(int id, const std::string& name, const std::string& path) {
        if (size_t(id) >= known.size()) known.resize(size_t(id) + 1), bytes_of.resize(known.size());
        if (known[size_t(id)]) fail(path, " gives two tokens the id ", id, ". Fetch it again");
        known[size_t(id)] = true;
        ids[name] = id;
    }
    int find(const std::string& name) const {
        auto found = ids.find(name);
        return found == ids.end() ? -1 : found->second;
    }

    void read_vocab(const BytePairs& pairs, const TokenizerConfig& config, const ByteNames& names) {
        const std::string& path = pairs.path;
        if (!pairs.vocab.is_object())
            fail(path, " is not a JSON object of tokens and their ids. Fetch it again");
        std::vector<AddedToken> added = pairs.added;
        added.insert(added.end(), config.added.begin(), config.added.end());
        std::unordered_map<std::string, int> specials = {{"<|endoftext|>", -1}};
        for (const AddedToken& token : added) {
            if (!config.is_special(token))
                fail(path, " is not supported yet: texts are split at its added token ",
                     quoted(token.content), ", which is not special");
            specials[token.content] = token.id;
        }
        constexpr int64_t most = 1 << 24;
        for (const auto& [name, value] : pairs.vocab.items()) {
            if (!value.is_number_integer() || value < 0 || value >= most)
                fail(path, " gives the token ", quoted(name), " the id ", quoted(value),
                     ", expected a number of 0 to ", most - 1, ". Fetch it again");
            const int id = value.get<int>();
            add(id, name, path);
            if (!specials.count(name) && !names.bytes(name, bytes_of[size_t(id)]))
                fail(path, " has the token ", quoted(name),
                     ", which has a character that names no byte, so it is not like GPT-2's. Fetch "
                     "it again");
        }
        for (const auto& [name, id] : specials) {
            if (id < 0) continue;
            if (find(name) < 0) add(id, name, path);
            if (find(name) != id)
                fail(path, " gives the token ", quoted(name), " the ids ", find(name), " and ", id,
                     ". The files do not belong together");
        }
        identity.kind = "gpt2";
        identity.vocab_size = int(known.size());
        identity.eot = find("<|endoftext|>");
        if (const int id = find(config.token("eos_token")); identity.eot < 0 && id >= 0)
            identity.eot = id, bytes_of[size_t(id)].clear();
        // Hash the content, not the JSON, which has many forms.
        uint64_t hash = fnv1a("gpt2");
        for (size_t id = 0; id < known.size(); id++)
            if (known[id]) hash = fnv1a(cat(id, ' ', bytes_of[id].size(), ' ', bytes_of[id]), hash);
        identity.fingerprint = hash;
        // SmolLM2 lacks the bytes that never occur in UTF-8.
        for (uint32_t b = 0; b < 256; b++) {
            std::string name;
            append_utf8(name, names.name_of[b]);
            byte_ids[b] = find(name);
        }
        if (std::all_of(byte_ids.begin(), byte_ids.end(), [](int id) { return id < 0; }))
            fail(path, " has no token for any byte, so it is not like GPT-2's. Fetch it again");
    }

    // Settings that differ from GPT-2's change the fingerprint.
    void read_settings(const BytePairs& pairs, const TokenizerConfig& config) {
        auto mark = [&](const std::string& setting) {
            identity.fingerprint = fnv1a(setting, identity.fingerprint);
        };
        const std::optional<bool> prefix = config.flag("add_prefix_space");
        if (prefix && pairs.add_prefix_space && prefix != pairs.add_prefix_space)
            fail(config.path, " says add_prefix_space ", *prefix ? "true" : "false", ", and ",
                 pairs.path, " says otherwise: make them agree");
        add_prefix_space = prefix.value_or(pairs.add_prefix_space.value_or(false));
        splitter.digits = pairs.digits;
        if (add_prefix_space) mark("add_prefix_space");
        if (splitter.digits == Digits::each) mark("Digits, each");
        if (splitter.digits == Digits::runs) mark("Digits, in runs");

        if (!pairs.unknown.empty()) {
            unknown = find(pairs.unknown);
            if (unknown < 0)
                fail(pairs.path, " has the unk_token ", quoted(pairs.unknown),
                     ", which is not in its vocabulary. Fetch it again");
            if (unknown == identity.eot) unknown = -1; // encode never returns end-of-text
        }
        fuse_unknown = pairs.fuse_unknown;
        const bool lacks = std::count(byte_ids.begin(), byte_ids.end(), -1) > 0;
        if (lacks && unknown >= 0) mark(cat("unknown ", unknown, fuse_unknown ? " fused" : ""));

        const std::string bos_token =
            !pairs.prefix_token.empty() ? pairs.prefix_token : config.token("bos_token");
        if (!config.flag("add_bos_token").value_or(!pairs.prefix_token.empty())) return;
        bos = find(bos_token.empty() ? "<|endoftext|>" : bos_token);
        if (bos < 0)
            fail(config.path, " says add_bos_token, but the vocabulary has no bos_token ",
                 quoted(bos_token));
    }

    void read_merges(const BytePairs& pairs) {
        merges.reserve(pairs.merges.size() + 1);
        uint32_t rank = 0;
        for (const auto& [left, right] : pairs.merges) {
            int id[3], k = 0;
            for (const std::string& name : {left, right, left + right})
                if ((id[k++] = find(name)) < 0)
                    fail(pairs.path, " has no token ", quoted(name), ", which the merge ",
                         quoted(left + " " + right), " needs. The two do not belong together");
            Merges::Entry& entry = merges.entries[merges.slot(Merges::pair_of(id[0], id[1]))];
            if (entry.pair != UINT64_MAX)
                fail("the merges of ", pairs.path, " repeat ", quoted(left + " " + right),
                     ". Fetch the files again");
            entry = {Merges::pair_of(id[0], id[1]), rank++, id[2]};
            identity.fingerprint = fnv1a(left + " " + right, fnv1a("\n", identity.fingerprint));
        }
    }

    std::string own_config() const {
        const char* eot = "<|endoftext|>";
        json config = {{"tokenizer_class", "GPT2Tokenizer"},
                       {"add_prefix_space", add_prefix_space}};
        if (identity.eot >= 0)
            for (const char* role : {"bos_token", "eos_token", "unk_token"}) config[role] = eot;
        return config.dump(2) + "\n";
    }

    // Calls put for the token of each byte, if it has one.
    template <class Put> void single_bytes(std::string_view piece, Put put) const {
        bool last_unknown = false;
        for (char c : piece) {
            const int id = byte_ids[static_cast<unsigned char>(c)];
            if (id >= 0)
                put(id);
            else if (unknown >= 0 && !(fuse_unknown && last_unknown))
                put(unknown);
            last_unknown = id < 0;
        }
    }

    // Merges the pair of lowest rank, leftmost first, until there is none. Searches linearly: most
    // pieces are words.
    void merge_short(std::string_view piece, std::vector<int>& out) const {
        constexpr uint32_t none = UINT32_MAX;
        int id[max_short], merged[max_short];
        uint32_t rank[max_short]; // of the pair (i, i+1)
        size_t n = 0;
        single_bytes(piece, [&](int token) { id[n++] = token; });
        if (n == 0) return;
        auto look_up = [&](size_t i) {
            const Merges::Entry* entry = i + 1 < n ? merges.find(id[i], id[i + 1]) : nullptr;
            rank[i] = entry ? entry->rank : none;
            merged[i] = entry ? entry->id : 0;
        };
        for (size_t i = 0; i < n; i++) look_up(i);
        while (true) {
            size_t best = 0;
            for (size_t i = 1; i < n; i++)
                if (rank[i] < rank[best]) best = i;
            if (rank[best] == none) break;
            id[best] = merged[best];
            n--;
            for (size_t i = best + 1; i < n; i++)
                id[i] = id[i + 1], rank[i] = rank[i + 1], merged[i] = merged[i + 1];
            look_up(best);
            if (best > 0) look_up(best - 1);
        }
        out.insert(out.end(), id, id + n);
    }

    // The same with a heap and a linked list, in O(n log n).
    void merge_long(std::string_view piece, std::vector<int>& out) const {
        struct Node {
            int id;
            uint32_t previous, next;
            uint32_t rank; // of the pair (this, next)
        };
        constexpr uint32_t none = UINT32_MAX;
        std::vector<Node> nodes;
        nodes.reserve(piece.size());
        single_bytes(piece, [&](int token) {
            const uint32_t i = uint32_t(nodes.size());
            nodes.push_back({token, i ? i - 1 : none, i + 1, none});
        });
        if (nodes.empty()) return;
        nodes.back().next = none;
        const uint32_t n = uint32_t(nodes.size());
        std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> heap; // rank, node
        auto look_up = [&](uint32_t i) {
            Node& node = nodes[i];
            const Merges::Entry* entry =
                node.next != none ? merges.find(node.id, nodes[node.next].id) : nullptr;
            node.rank = entry ? entry->rank : none;
            if (entry) heap.push(uint64_t(entry->rank) << 32 | i);
        };
        for (uint32_t i = 0; i < n; i++) look_up(i);
        while (!heap.empty()) {
            uint64_t top = heap.top();
            heap.pop();
            uint32_t i = uint32_t(top);
            if (nodes[i].rank != top >> 32) continue; // the pair no longer exists
            uint32_t merged = nodes[i].next;
            nodes[i].id = merges.find(nodes[i].id, nodes[merged].id)->id;
            nodes[i].next = nodes[merged].next;
            nodes[merged].rank = none;
            if (nodes[i].next != none) nodes[nodes[i].next].previous = i;
            look_up(i);
            if (nodes[i].previous != none) look_up(nodes[i].previous);
        }
        for (uint32_t i = 0; i != none; i = nodes[i].next) out.push_back(nodes[i].id);
    }

    static constexpr size_t max_short = 64;

    // Most pieces are words seen before. One entry per hash; new ones replace old ones.
    struct Cache {
        struct Entry {
            unsigned char length = 0, count = 0; // length 0: empty
            char text[30];
            int tokens[8];
        };
        static constexpr size_t size = 1 << 15;
        uint64_t serial = 0;
        std::vector<Entry> entries;
    };

    std::vector<int> encode(std::string_view text) const override {
        if (!add_prefix_space || text.empty() || text[0] == ' ') return encode_continuation(text);
        return encode_continuation(" " + std::string(text));
    }
    std::vector<int> encode_continuation(std::string_view text) const override {
        static thread_local Cache cache;
        if (cache.serial != serial) {
            cache.entries.assign(Cache::size, {});
            cache.serial = serial;
        }
        std::vector<int> out;
        out.reserve(text.size() / 3 + 8);
        for (size_t i = 0; i < text.size();) {
            const size_t segment = splitter.segment_end(text, i);
            const std::string_view until = text.substr(0, segment);
            while (i < segment) {
                const size_t end = splitter.next_piece(until, i);
                encode_piece(text.substr(i, end - i), cache, out);
                i = end;
            }
        }
        return out;
    }
    void encode_piece(std::string_view piece, Cache& cache, std::vector<int>& out) const {
        if (piece.size() > max_short) return merge_long(piece, out);
        if (piece.size() > sizeof Cache::Entry::text) return merge_short(piece, out);
        uint64_t hash = std::hash<std::string_view>()(piece);
        Cache::Entry& entry = cache.entries[hash % Cache::size];
        if (entry.length == piece.size() &&
            std::memcmp(entry.text, piece.data(), piece.size()) == 0) {
            out.insert(out.end(), entry.tokens, entry.tokens + entry.count);
            return;
        }
        size_t before = out.size();
        merge_short(piece, out);
        if (out.size() - before > std::size(entry.tokens)) return;
        entry.length = static_cast<unsigned char>(piece.size());
        entry.count = static_cast<unsigned char>(out.size() - before);
        std::memcpy(entry.text, piece.data(), piece.size());
        std::copy(out.begin() + std::ptrdiff_t(before), out.end(), entry.tokens);
    }
    size_t count_unencodable(std::string_view text) const override {
        return size_t(std::count_if(text.begin(), text.end(), [&](char c) {
            return byte_ids[static_cast<unsigned char>(c)] < 0;
        }));
    }

    std::string decode(const int* tokens, size_t n) const override {
        std::string text;
        for (size_t i = 0; i < n; i++) {
            if (!has(tokens[i])) bad_token(tokens[i], identity);
            text += bytes_of[size_t(tokens[i])];
        }
        return text;
    }
    bool has(int token) const override {
        return token >= 0 && size_t(token) < known.size() && known[size_t(token)];
    }
    TokenizerId id() const override { return identity; }
    void save(const std::string& dir) const override { save_files(dir, files); }
    size_t safe_cut(std::string_view text) const override { return splitter.safe_cut(text); }
};

#endif

#ifdef LNS_SENTENCEPIECE

// SentencePiece

struct SentencePiece : Tokenizer {
    std::string model; // the file's content
    sentencepiece::SentencePieceProcessor processor;
    // The model for parts that continue a text: with or without the space before a text, whichever
    // passes newlines_stand_alone.
    sentencepiece::SentencePieceProcessor rest;
    bool cuttable = false;   // texts may be cut before newlines
    bool after_space = true; // also before newlines that follow other space
    TokenizerId identity;

    std::string config_file; // tokenizer_config.json as read, or ""

    explicit SentencePiece(const std::string& path) : model(read_tokenizer_file(path)) {
        const char* advice = "expected a SentencePiece model. Fetch it again";
        if (model.empty()) fail(path, " is empty, ", advice);
        if (is_tiktoken(model))
            fail(path, " is not supported yet: it is a tiktoken vocabulary (as LLaMA 3's), ",
                 "expected a SentencePiece model");
        // Before the library reads it.
        if (const std::string fault = charsmap_fault(model); !fault.empty())
            fail(path, " is damaged (its table of normalizations: ", fault, "), ", advice);
        sentencepiece::util::Status status;
        try {
            status = processor.LoadFromSerializedProto(model);
        } catch (const std::exception& error) { // from its tries: a piece that begins with a 0
            fail(path, " is damaged or not a tokenizer (", error.what(), "), ", advice);
        }
        if (!status.ok())
            fail(path, " is damaged or not a tokenizer (", status.ToString(), "), ", advice);
        identity = {"sentencepiece", processor.GetPieceSize(), processor.eos_id(), fnv1a(model)};
        const fs::path file(path);
        const fs::path dir = file.has_parent_path() ? file.parent_path() : ".";
        std::string settings; // to append to the model
        if (file.filename() == "tokenizer.model") settings = read_config(dir.string());

        // An appended protocol buffer is merged: here field 3 (normalizer_spec) with field 3
        // (add_dummy_prefix) false, then true (sentencepiece_model.proto).
        for (bool prefix : {false, true}) {
            std::string edited = model + settings + prefix_setting(prefix);
            if (!rest.LoadFromSerializedProto(edited).ok()) break;
            if ((cuttable = newlines_stand_alone())) break;
        }
    }

    static std::string prefix_setting(bool prefix) { return {'\x1a', '\x02', '\x18', prefix}; }

    // Applies tokenizer_config.json. Returns the settings to append to the model.
    std::string read_config(const std::string& dir) {
        const TokenizerConfig config(dir);
        config.expect_class({"LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer",
                             "CodeLlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast",
                             "T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast"});
        config_file = config.text;
        for (const AddedToken& token : config.added) {
            if (token.id < processor.GetPieceSize() &&
                processor.IdToPiece(token.id) == token.content)
                continue;
            if (!config.is_special(token))
                fail(config.path, " is not supported yet: texts are split at its added token ",
                     quoted(token.content), ", which is not special");
        }
        const std::string name = config.tokenizer_class();
        const bool by_default = name.find("Llama") != name.npos || name.find("Gemma") == 0;
        if (config.flag("add_bos_token").value_or(by_default)) {
            const std::string token = config.token("bos_token");
            bos = token.empty() ? processor.bos_id() : processor.PieceToId(token);
            if (bos < 0 || (!token.empty() && processor.IdToPiece(bos) != token))
                fail(config.path, " says add_bos_token, but the model has no bos_token ",
                     quoted(token));
        }
        const std::optional<bool> prefix = config.flag("add_prefix_space");
        if (!prefix) return "";
        const std::string text = "a b";
        const std::vector<int> own = encode_with(processor, text);
        std::string setting = prefix_setting(*prefix);
        if (!processor.LoadFromSerializedProto(model + setting).ok())
            fail(config.path, " says add_prefix_space, which this model cannot change");
        if (encode_with(processor, text) == own) return "";
        identity.fingerprint =
            fnv1a(*prefix ? "add_prefix_space" : "no prefix space", identity.fingerprint);
        return setting;
    }

    // Lines of LLaMA 3's and OpenAI's vocabularies are a token in base64 and its rank.
    static bool is_tiktoken(const std::string& file) {
        const std::string line = file.substr(0, std::min(file.find('\n'), size_t(1000)));
        const size_t gap = line.find(' ');
        const char* base64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=";
        return gap != line.npos && gap >= 4 && gap % 4 == 0 &&
               line.find_first_not_of(base64) == gap && gap + 1 < line.size() &&
               line.find_first_not_of("0123456789\r", gap + 1) == line.npos;
    }

    // Whether a text cut before a newline encodes to the same tokens: no piece spans one (or the
    // space that it becomes), and samples confirm it.
    bool newlines_stand_alone() {
        const std::string mark = "\u2581"; // a space
        bool runs = false;                 // some pieces begin with several spaces
        for (int id = 0; id < identity.vocab_size; id++) {
            const std::string& piece = processor.IdToPiece(id);
            if (piece.size() > 1 && piece.find('\n') != std::string::npos) return false;
            size_t start = 0;
            while (piece.compare(start, mark.size(), mark) == 0) start += mark.size();
            if (piece.find(mark, start) != std::string::npos) return false;
            runs |= start > mark.size();
        }
        after_space = !runs || encode_with(processor, "a\nb") != encode_with(processor, "a b");
        const std::string samples[][2] = {{"a", "\nb"},       {"Hello there.", "\nGeneral 12"},
                                          {"x1,", "\n\ny\n"}, {"\u00e9", "\n  \u00df"},
                                          {"end", "\n"},      {"end", "\n'tis"},
                                          {"a  ", "\n  b"},   {"a\n", "\n"},
                                          {" \t", "\n\tb"}};
        for (const auto& [left, right] : samples) {
            if (!may_cut(left + right, left.size())) continue;
            std::vector<int> parts = encode_with(processor, left),
                             second = encode_with(rest, right);
            parts.insert(parts.end(), second.begin(), second.end());
            if (parts != encode_with(processor, left + right)) return false;
        }
        return true;
    }

    static std::vector<int> encode_with(const sentencepiece::SentencePieceProcessor& with,
                                        std::string_view text) {
        std::vector<int> tokens;
        auto status = with.Encode({text.data(), text.size()}, &tokens);
        if (!status.ok()) fail("SentencePiece cannot encode a text: ", status.ToString());
        return tokens;
    }

    std::vector<int> encode(std::string_view text) const override {
        return encode_lines(processor, text);
    }
    std::vector<int> encode_continuation(std::string_view text) const override {
        return encode_lines(cuttable ? rest : processor, text);
    }

    // SentencePiece takes more than linear time, so long texts are encoded in parts.
    std::vector<int> encode_lines(const sentencepiece::SentencePieceProcessor& first,
                                  std::string_view text) const {
        constexpr size_t part = 4096;
        std::vector<int> tokens;
        const auto* with = &first;
        while (cuttable && text.size() > part) {
            size_t cut = part;
            while (cut < text.size() && !may_cut(text, cut)) cut++;
            if (cut == text.size()) break;
            std::vector<int> more = encode_with(*with, text.substr(0, cut));
            tokens.insert(tokens.end(), more.begin(), more.end());
            text.remove_prefix(cut);
            with = &rest;
        }
        if (tokens.empty()) return encode_with(*with, text);
        std::vector<int> more = encode_with(*with, text);
        tokens.insert(tokens.end(), more.begin(), more.end());
        return tokens;
    }

    // Whether only space stands between U+2581 and p. U+2581 is a space too, but is not folded with
    // adjacent ones: it is dropped at the end of a text and kept inside. Any character outside
    // ASCII counts as space, since a model may turn it into one.
    static bool after_mark(std::string_view text, size_t p) {
        auto may_be_space = [](char c) { return c < 0 || c <= ' ' || c == '\x7f'; };
        const std::string_view mark = "\u2581";
        for (; p > 0 && may_be_space(text[p - 1]); p--)
            if (text.substr(0, p).ends_with(mark)) return true;
        return false;
    }
    bool may_cut(std::string_view text, size_t p) const {
        return text[p] == '\n' && (after_space || static_cast<unsigned char>(text[p - 1]) > ' ') &&
               !after_mark(text, p);
    }
    size_t safe_cut(std::string_view text) const override {
        if (cuttable)
            for (size_t p = text.size(); p-- > 1;)
                if (may_cut(text, p)) return p;
        return 0;
    }

    std::string decode(const int* tokens, size_t n) const override {
        for (size_t i = 0; i < n; i++)
            if (tokens[i] < 0 || tokens[i] >= identity.vocab_size) bad_token(tokens[i], identity);
        std::string text;
        auto status = processor.Decode(std::vector<int>(tokens, tokens + n), &text);
        if (!status.ok()) fail("SentencePiece cannot decode: ", status.ToString());
        return text;
    }
    bool has(int token) const override { return token >= 0 && token < identity.vocab_size; }
    TokenizerId id() const override { return identity; }
    void save(const std::string& dir) const override {
        if (!config_file.empty())
            return save_files(dir,
                              {{"tokenizer.model", model}, {"tokenizer_config.json", config_file}});
        json config = {{"add_bos_token", false}, {"add_eos_token", false}};
        if (processor.PieceToId("<0x0A>") != processor.unk_id())
            config["tokenizer_class"] = "LlamaTokenizer";
        const int special[] = {processor.bos_id(), processor.eos_id(), processor.unk_id()};
        const char* roles[] = {"bos_token", "eos_token", "unk_token"};
        for (int i = 0; i < 3; i++)
            if (special[i] >= 0) config[roles[i]] = processor.IdToPiece(special[i]);
        save_files(dir,
                   {{"tokenizer.model", model}, {"tokenizer_config.json", config.dump(2) + "\n"}});
    }
};

#endif

std::unique_ptr<Tokenizer> load_gpt2(const std::string& path) {
#ifdef LNS_PCRE2
    return std::make_unique<Gpt2>(path);
#else
    fail("the tokenizer of ", path,
         " is GPT-2's, which needs PCRE2, but this build has none. "
         "Install libpcre2-dev (or run `make deps`) and rebuild");
#endif
}

std::unique_ptr<Tokenizer> load_sentencepiece(const std::string& path) {
#ifdef LNS_SENTENCEPIECE
    return std::make_unique<SentencePiece>(path);
#else
    fail("the tokenizer ", path,
         " is SentencePiece's, but this build has no SentencePiece. Install "
         "libsentencepiece-dev (or run `make deps`) and rebuild");
#endif
}

std::unique_ptr<Tokenizer> load_json(const std::string& path) {
    const json tokenizer = parse_json(read_tokenizer_file(path), path);
    if (tokenizer.is_object() &&
        tokenizer.value("model", json()) == bytes_as_hugging_face()["model"])
        return std::make_unique<Bytes>();
    return load_gpt2(path);
}

bool has_kind_bytes(const std::string& dir) {
    const std::string path = dir + "/tokenizer_config.json";
    if (!path_exists(path)) return false;
    const json config = parse_json(read_tokenizer_file(path), path);
    return config.is_object() && config.value("kind", json()) == "bytes";
}

std::unique_ptr<Tokenizer> load_directory(const std::string& dir) {
    auto has = [&](const char* name) { return path_exists(fs::path(dir) / name); };
    if (has("tokenizer.model")) return load_sentencepiece(dir + "/tokenizer.model");
    if (has_kind_bytes(dir)) return std::make_unique<Bytes>();
    if (has("vocab.json") || has("encoder.json")) return load_gpt2(dir);
    if (has("tokenizer.json")) return load_json(dir + "/tokenizer.json");
    for (auto [name, kind] : {std::pair{"vocab.txt", "WordPiece"}, {"tekken.json", "Mistral's"}})
        if (has(name))
            fail("the tokenizer of ", dir, " is not supported yet: it is ", kind, " (", name, ")");
    if (has("spiece.model"))
        fail("the directory ", dir,
             " has its tokenizer in spiece.model: name that file, as in "
             "--tokenizer ",
             dir, "/spiece.model");
    fail("the directory ", dir,
         " has no tokenizer: expected tokenizer.model, tokenizer.json, vocab.json and merges.txt, "
         "or what a run saved");
}

} // namespace

bool has_tokenizer(const std::string& dir) {
    for (const char* name : {"tokenizer.model", "tokenizer.json", "vocab.json", "encoder.json",
                             "vocab.txt", "spiece.model", "tekken.json"})
        if (path_exists(dir + "/" + name)) return true;
    return has_kind_bytes(dir);
}

std::vector<int> Tokenizer::encode_prompt(std::string_view text) const {
    std::vector<int> tokens = encode(text);
    if (bos >= 0) tokens.insert(tokens.begin(), bos);
    return tokens;
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& spec) {
    if (spec == "bytes") return std::make_unique<Bytes>();
    if (spec.rfind("gpt2:", 0) == 0) return load_gpt2(spec.substr(5));
    if (is_directory_at(spec)) return load_directory(spec);
    auto ends = [&](std::string_view end) {
        return spec.size() > end.size() && spec.substr(spec.size() - end.size()) == end;
    };
    if (path_exists(spec) && ends(".json")) return load_json(spec);
    if (path_exists(spec) || ends(".model")) return load_sentencepiece(spec);
    fail("there is no tokenizer '", spec,
         "'. Expected bytes, gpt2:DIR (with encoder.json and vocab.bpe, or vocab.json and "
         "merges.txt), a SentencePiece FILE.model, a tokenizer.json, or a directory with one");
}

} // namespace lns
