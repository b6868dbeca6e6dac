#include "gpt/data/token_model.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <queue>

#include "gpt/base/error.h"
#include "gpt/base/json.h"
#include "gpt/base/random.h"
#include "gpt/data/pre_tokenizer.h"
#include "gpt/data/tokenizer_files.h"
#include "gpt/data/trie.h"
#include "gpt/data/unicode.h"

namespace lns {

using json = nlohmann::json;

void Vocabulary::add(int id, const std::string& name) {
    if (size_t(id) >= known.size()) {
        known.resize(size_t(id) + 1);
        special.resize(known.size());
        names.resize(known.size());
    }
    if (known[size_t(id)]) fail(path, " gives two tokens the id ", id, ". Fetch it again");
    known[size_t(id)] = true;
    names[size_t(id)] = name;
    ids[name] = id;
}

int Vocabulary::find(const std::string& name) const {
    const auto found = ids.find(name);
    return found == ids.end() ? -1 : found->second;
}

namespace {

constexpr std::string_view mark = "\u2581"; // SentencePiece's space

// The tokens <0x00> to <0xFF>, -1 where the vocabulary lacks one.
std::array<int, 256> byte_tokens(const Vocabulary& vocabulary) {
    std::array<int, 256> ids;
    for (size_t b = 0; b < 256; b++) {
        const char* digits = "0123456789ABCDEF";
        ids[b] = vocabulary.find({'<', '0', 'x', digits[b >> 4], digits[b & 15], '>'});
    }
    return ids;
}

// BPE

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

std::vector<std::pair<std::string, std::string>> parse_merges(const json& merges,
                                                              const std::string& path) {
    std::vector<std::pair<std::string, std::string>> out;
    for (const json& merge : merges) {
        // Before 2024 merges were written as one string.
        const std::string text = text_of(merge);
        const size_t gap = text.find(' ');
        if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string())
            out.emplace_back(merge[0], merge[1]);
        else if (gap != text.npos && gap > 0 && gap + 1 < text.size() &&
                 text.find(' ', gap + 1) == text.npos)
            out.emplace_back(text.substr(0, gap), text.substr(gap + 1));
        else
            fail(path, " has the merge ", quoted(merge), ", expected two tokens. Fetch it again");
    }
    return out;
}

class BytePairs : public TokenModel {
  public:
    BytePairs(const json& model, bool byte_level, const Vocabulary& vocabulary, int eot,
              uint64_t hash)
        : byte_level(byte_level) {
        fingerprint = hash;
        const std::string& path = vocabulary.path;
        for (const char* setting : {"continuing_subword_prefix", "end_of_word_suffix"})
            if (const json& value = field(model, setting); !value.is_null() && value != "")
                unsupported(path, cat("its model has ", setting, " ", quoted(value)));
        if (const json& dropout = field(model, "dropout"); !dropout.is_null() && dropout != 0)
            unsupported(path, cat("its model has dropout ", quoted(dropout)));
        byte_fallback = bool_field(model, "byte_fallback", false, path);
        ignore_merges = bool_field(model, "ignore_merges", false, path);
        fuse_unknown = bool_field(model, "fuse_unk", false, path);
        if (const std::string name = text_of(field(model, "unk_token")); !name.empty()) {
            unknown = vocabulary.find(name);
            if (unknown < 0)
                fail(path, " has the unk_token ", quoted(name),
                     ", which is not in its vocabulary. Fetch it again");
            if (unknown == eot) unknown = -1;
        }
        byte_ids = byte_level ? name_tokens(vocabulary) : byte_tokens(vocabulary);
        if (byte_level && lacks_all())
            fail(path, " has no token for any byte, so it is not like GPT-2's. Fetch it again");
        if (!byte_level) read_characters(vocabulary);
        if (ignore_merges)
            for (const auto& [name, id] : vocabulary.ids) {
                std::string word = name;
                if (!vocabulary.special[size_t(id)] && (!byte_level || bytes_of_name(name, word)))
                    whole[word] = id;
            }
        const bool lacks = std::count(byte_ids.begin(), byte_ids.end(), -1) > 0;
        if ((lacks || !byte_level) && unknown >= 0)
            mark_setting(cat("unknown ", unknown, fuse_unknown ? " fused" : ""));
        if (ignore_merges) mark_setting("ignore_merges");
        if (byte_fallback) mark_setting("byte_fallback");
        read_merges(list_field(model, "merges", path), vocabulary);
    }

    void encode(std::string_view word, std::vector<int>& out) const override {
        if (ignore_merges)
            if (const auto found = whole.find(std::string(word)); found != whole.end())
                return out.push_back(found->second);
        word.size() <= max_short ? merge_short(word, out) : merge_long(word, out);
    }

    size_t count_unencodable(std::string_view text) const override {
        if (!byte_level) return 0;
        return size_t(std::count_if(text.begin(), text.end(), [&](char c) {
            return byte_ids[static_cast<unsigned char>(c)] < 0;
        }));
    }

    bool splits_at_marks() const override { return marks_begin_words; }

  private:
    bool byte_level, byte_fallback = false, ignore_merges = false;
    bool fuse_unknown = false;      // adjacent ones become one
    std::array<int, 256> byte_ids;  // -1: no token
    std::vector<int> character_ids; // by code; -1: no token
    bool marks_begin_words = false;
    std::unordered_map<std::string, int> whole; // words that are tokens
    Merges merges;

    void mark_setting(const std::string& setting) { fingerprint = fnv1a(setting, fingerprint); }

    static std::array<int, 256> name_tokens(const Vocabulary& vocabulary) {
        std::array<int, 256> ids;
        for (size_t b = 0; b < 256; b++)
            ids[b] = vocabulary.find(byte_name(static_cast<unsigned char>(b)));
        return ids;
    }
    bool lacks_all() const { return std::count(byte_ids.begin(), byte_ids.end(), -1) == 256; }

    void read_characters(const Vocabulary& vocabulary) {
        character_ids.assign(0x110000, -1);
        marks_begin_words = vocabulary.find(std::string(mark)) >= 0;
        for (const auto& [name, id] : vocabulary.ids) {
            if (name.empty()) continue;
            const Character c = character_at(name, 0);
            if (c.code != Character::invalid && c.length == name.size()) character_ids[c.code] = id;
            for (size_t at = 0; (at = name.find(mark, at + 1)) != name.npos;)
                if (!name.substr(0, at).ends_with(mark)) marks_begin_words = false;
        }
    }

    void read_merges(const json& list, const Vocabulary& vocabulary) {
        const std::string& path = vocabulary.path;
        const auto pairs = parse_merges(list, path);
        merges.reserve(pairs.size() + 1);
        uint32_t rank = 0;
        for (const auto& [left, right] : pairs) {
            int id[3], k = 0;
            for (const std::string& name : {left, right, left + right})
                if ((id[k++] = vocabulary.find(name)) < 0)
                    fail(path, " has no token ", quoted(name), ", which the merge ",
                         quoted(left + " " + right), " needs. The two do not belong together");
            Merges::Entry& entry = merges.entries[merges.slot(Merges::pair_of(id[0], id[1]))];
            if (entry.pair != UINT64_MAX)
                fail("the merges of ", path, " repeat ", quoted(left + " " + right),
                     ". Fetch the files again");
            entry = {Merges::pair_of(id[0], id[1]), rank++, id[2]};
            mark_setting("\n"), mark_setting(left + " " + right);
        }
    }

    // Calls put for the token of each symbol (a byte, a character, or the bytes of one), if it has
    // one. An unknown one waits, as another may be fused with it.
    template <class Put> void symbols(std::string_view word, Put put) const {
        bool waits = false;
        for (size_t i = 0; i < word.size();) {
            int id;
            size_t length = 1;
            if (byte_level) {
                id = byte_ids[static_cast<unsigned char>(word[i])];
            } else {
                const Character c = character_at(word, i);
                length = c.length;
                id = c.code == Character::invalid ? -1 : character_ids[c.code];
            }
            const std::string_view bytes = word.substr(i, length);
            i += length;
            if (id >= 0) {
                if (std::exchange(waits, false)) put(unknown);
                put(id);
            } else if (!byte_level && byte_fallback && have_tokens(bytes)) {
                for (char c : bytes) put(byte_ids[static_cast<unsigned char>(c)]);
            } else if (unknown >= 0) {
                if (waits && !fuse_unknown) put(unknown);
                waits = true;
            }
        }
        if (waits) put(unknown);
    }
    bool have_tokens(std::string_view bytes) const {
        return std::all_of(bytes.begin(), bytes.end(),
                           [&](char c) { return byte_ids[static_cast<unsigned char>(c)] >= 0; });
    }

    // Merges the pair of lowest rank, leftmost first, until there is none. Searches linearly: most
    // pieces are words.
    void merge_short(std::string_view piece, std::vector<int>& out) const {
        constexpr uint32_t none = UINT32_MAX;
        int id[max_short], merged[max_short];
        uint32_t rank[max_short]; // of the pair (i, i+1)
        size_t n = 0;
        symbols(piece, [&](int token) { id[n++] = token; });
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
        symbols(piece, [&](int token) {
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
};

// Unigram

// The number as serde_json reads its shortest decimal form: the digits, rounded, divided by a power
// of ten, rounded again. The last bit decides between segmentations of equal score.
double as_serde_reads(double x) {
    char text[40] = "";
    std::to_chars(text, text + sizeof text - 1, std::abs(x), std::chars_format::scientific);
    uint64_t digits = 0;
    int exponent = 0;
    const char* at = text;
    for (bool fraction = false; *at && *at != 'e'; at++) {
        if (*at == '.') {
            fraction = true;
        } else {
            digits = digits * 10 + uint64_t(*at - '0');
            exponent -= fraction;
        }
    }
    if (*at == 'e') exponent += std::atoi(at + 1);
    if (exponent < -300 || exponent > 0) return x; // written in another way
    return std::copysign(double(digits) / std::pow(10.0, -exponent), x);
}

// The segmentation of highest total score (Kudo, arXiv 1804.10959, by the algorithm of Viterbi).
class Unigram : public TokenModel {
  public:
    Unigram(const json& model, const Vocabulary& vocabulary, uint64_t hash)
        : byte_fallback(bool_field(model, "byte_fallback", false, vocabulary.path)),
          byte_ids(byte_tokens(vocabulary)) {
        fingerprint = hash;
        std::vector<std::pair<std::string, int>> entries;
        for (const json& entry : model["vocab"]) {
            entries.emplace_back(entry[0].get<std::string>(), int(scores.size()));
            scores.push_back(as_serde_reads(entry[1].get<double>()));
            fingerprint = fnv1a(cat(std::hexfloat, scores.back(), ' '), fingerprint);
        }
        trie = Trie(std::move(entries));
        unknown_score = *std::min_element(scores.begin(), scores.end()) - 10;
        if (const json& id = field(model, "unk_id"); !id.is_null()) {
            if (!id.is_number_integer() || id < 0 || id >= int64_t(scores.size()))
                fail(vocabulary.path, " has the unk_id ", quoted(id), ", expected one of its ",
                     scores.size(), " tokens");
            unknown = id.get<int>();
        }
        fingerprint =
            fnv1a(cat("unknown ", unknown, byte_fallback ? " byte_fallback" : ""), fingerprint);
    }

    void encode(std::string_view word, std::vector<int>& out) const override {
        struct Best { // of the segmentations that end here
            int token;
            double score;
            size_t begin; // of its last token
        };
        constexpr size_t none = SIZE_MAX;
        std::vector<Best> best(word.size() + 1, {0, 0, none});
        auto offer = [&](size_t begin, size_t end, int token, double score) {
            const double total = score + best[begin].score;
            if (best[end].begin == none || total > best[end].score)
                best[end] = {token, total, begin};
        };
        for (size_t i = 0; i < word.size();) {
            const size_t length = character_at(word, i).length;
            bool single = false;
            trie.each_prefix(word.substr(i), [&](size_t n, int token) {
                offer(i, i + n, token, scores[size_t(token)]);
                single |= n == length;
            });
            if (!single) offer(i, i + length, -1, unknown_score);
            i += length;
        }
        struct Piece {
            size_t begin, end;
            int token; // -1: unknown
        };
        std::vector<Piece> pieces; // last first
        for (size_t end = word.size(); end > 0;) {
            const auto [token, score, begin] = best[end];
            const bool is_unknown = token < 0 || token == unknown;
            if (is_unknown && !pieces.empty() && pieces.back().token < 0)
                pieces.back().begin = begin; // adjacent ones are fused
            else
                pieces.push_back({begin, end, is_unknown ? -1 : token});
            end = begin;
        }
        for (size_t k = pieces.size(); k-- > 0;) {
            const Piece& piece = pieces[k];
            if (piece.token >= 0)
                out.push_back(piece.token);
            else
                put_unknown(word.substr(piece.begin, piece.end - piece.begin), out);
        }
    }

  private:
    Trie trie;
    std::vector<double> scores;
    double unknown_score;
    bool byte_fallback;
    std::array<int, 256> byte_ids;

    void put_unknown(std::string_view text, std::vector<int>& out) const {
        int token = -1;
        trie.each_prefix(text, [&](size_t n, int id) {
            if (n == text.size()) token = id;
        });
        const bool bytes = byte_fallback && std::all_of(text.begin(), text.end(), [&](char c) {
                               return byte_ids[static_cast<unsigned char>(c)] >= 0;
                           });
        if (token >= 0)
            out.push_back(token);
        else if (bytes)
            for (char c : text) out.push_back(byte_ids[static_cast<unsigned char>(c)]);
        else if (unknown >= 0)
            out.push_back(unknown);
    }
};

} // namespace

namespace {

bool is_bpe(const json& model) {
    // Files from before 2020 have no type.
    return type_of(model) == "BPE" || (type_of(model).empty() && model.contains("merges"));
}

} // namespace

Vocabulary read_vocabulary(const json& model, const std::string& path) {
    Vocabulary vocabulary = {path, {}, {}, {}, {}};
    const json& vocab = field(model, "vocab");
    if (is_bpe(model)) {
        if (!vocab.is_object())
            fail(path, " is not a JSON object of tokens and their ids. Fetch it again");
        for (const auto& [name, id] : vocab.items()) vocabulary.add(token_id(id, path, name), name);
        return vocabulary;
    }
    if (type_of(model) != "Unigram")
        unsupported(path, cat("its model is of type ", quoted(field(model, "type")),
                              ", expected BPE or Unigram"));
    for (const json& entry : list_field(model, "vocab", path)) {
        if (!entry.is_array() || entry.size() != 2 || !entry[0].is_string() ||
            !entry[1].is_number())
            fail(path, " has the token ", quoted(entry),
                 ", expected a text and its score. Fetch it again");
        vocabulary.add(int(vocabulary.names.size()), entry[0]);
    }
    if (vocab.empty()) fail(path, " has an empty vocabulary. Fetch it again");
    return vocabulary;
}

std::unique_ptr<TokenModel> read_token_model(const json& model, bool byte_level,
                                             const Vocabulary& vocabulary, int eot,
                                             uint64_t fingerprint) {
    if (is_bpe(model))
        return std::make_unique<BytePairs>(model, byte_level, vocabulary, eot, fingerprint);
    if (byte_level) unsupported(vocabulary.path, "its model is Unigram behind ByteLevel");
    return std::make_unique<Unigram>(model, vocabulary, fingerprint);
}

} // namespace lns
