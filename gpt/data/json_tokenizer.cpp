#include "gpt/data/json_tokenizer.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <map>
#include <sstream>

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/json.h"
#include "gpt/base/random.h"
#include "gpt/data/added_tokens.h"
#include "gpt/data/decoder.h"
#include "gpt/data/normalizer.h"
#include "gpt/data/pre_tokenizer.h"
#include "gpt/data/token_model.h"
#include "gpt/data/tokenizer_files.h"

namespace lns {

namespace {

namespace fs = std::filesystem;
using json = nlohmann::json;

// GPT-2's original pair of files, as a tokenizer.json. path: becomes the vocabulary's.
json read_vocab_and_merges(const std::string& dir, const TokenizerConfig& config,
                           std::string& path) {
    const bool original = path_exists(dir + "/encoder.json");
    path = dir + (original ? "/encoder.json" : "/vocab.json");
    const std::string merges_path = dir + (original ? "/vocab.bpe" : "/merges.txt");
    for (const std::string& needed : {path, merges_path})
        if (!path_exists(needed))
            fail(needed, " is missing. GPT-2's tokenizer consists of encoder.json and vocab.bpe, "
                         "or of vocab.json and merges.txt");
    json vocab = parse_json(read_tokenizer_file(path), path);
    json merges = json::array();
    std::istringstream in(read_tokenizer_file(merges_path));
    std::string line;
    for (int number = 1; std::getline(in, line); number++) {
        if (!line.empty() && line.back() == '\r') line.pop_back();
        if (line.empty() || (number == 1 && line.rfind("#version", 0) == 0)) continue;
        const size_t gap = line.find(' ');
        if (gap == std::string::npos || gap == 0 || gap + 1 == line.size() ||
            line.find(' ', gap + 1) != std::string::npos)
            fail("line ", number, " of ", merges_path, " is ", quoted(line),
                 ", expected two tokens separated by a space. Fetch the file again");
        if (without_invalid_bytes(line) != line)
            fail("line ", number, " of ", merges_path, " is ", quoted(line),
                 ", which is not UTF-8. Fetch the file again");
        merges.push_back({line.substr(0, gap), line.substr(gap + 1)});
    }
    if (merges.empty()) fail(merges_path, " has no merges, expected about 50,000. Fetch it again");
    std::vector<AddedToken> added = config.added;
    const json& eot = field(vocab, "<|endoftext|>");
    if (!eot.is_null() && std::none_of(added.begin(), added.end(), [](const AddedToken& token) {
            return token.content == "<|endoftext|>";
        }))
        added.push_back({.id = token_id(eot, path, "<|endoftext|>"),
                         .content = "<|endoftext|>",
                         .special = true});
    // tokenizer.json says it by its post-processor.
    std::string around[2];
    for (const auto& [flag, role, name] : {std::tuple("add_bos_token", "bos_token", &around[0]),
                                           {"add_eos_token", "eos_token", &around[1]}}) {
        if (!config.flag(flag).value_or(false)) continue;
        *name = config.token(role).empty() ? "<|endoftext|>" : config.token(role);
        bool exists = vocab.contains(*name);
        for (const AddedToken& token : added) exists |= token.content == *name;
        if (!exists)
            fail(config.path, " says ", flag, ", but the vocabulary has no ", role, " ",
                 quoted(*name));
    }
    const bool prefix = config.flag("add_prefix_space").value_or(false);
    json document = byte_level_json(std::move(vocab), std::move(merges), added, prefix, true);
    document["post_processor"] = template_json(document, around[0], around[1]);
    return document;
}

// The tokens that the post-processor puts before and after a text; "" if there is none.
struct Template {
    std::string before, after;
};

void read_post_processor(const json& part, const std::string& path, Template& out) {
    const std::string type = type_of(part);
    if (part.is_null() || type == "ByteLevel") return;
    if (type == "Sequence") {
        for (const json& step : list_field(part, "processors", path))
            read_post_processor(step, path, out);
        return;
    }
    if (type == "RobertaProcessing" || type == "BertProcessing") {
        for (const auto& [key, token] : {std::pair("cls", &out.before), {"sep", &out.after}}) {
            const json& pair = list_field(part, key, path);
            if (pair.empty() || !pair[0].is_string())
                fail(path, ": ", key, " of ", type, " is ", quoted(pair), ", expected a token");
            *token = pair[0];
        }
        return;
    }
    const json& single = field(part, "single");
    if (type != "TemplateProcessing" || !single.is_array())
        unsupported(path, cat("its post-processor is ", description(part)));
    bool after = false;
    for (const json& piece : single) {
        after |= piece.contains("Sequence");
        const std::string token = text_of(field(field(piece, "SpecialToken"), "id"));
        if (token.empty()) continue;
        std::string& place = after ? out.after : out.before;
        if (!place.empty())
            unsupported(path, cat("its post-processor puts several tokens ",
                                  after ? "after" : "before", " a text"));
        place = token;
    }
}

// A quick hash of a short text.
uint64_t hash_of(std::string_view text) {
    constexpr uint64_t odd = 0x9E3779B97F4A7C15;
    uint64_t hash = text.size(), word;
    const char* at = text.data();
    size_t left = text.size();
    for (; left >= 8; at += 8, left -= 8) {
        std::memcpy(&word, at, 8);
        hash = (hash ^ word) * odd;
        hash ^= hash >> 32;
    }
    word = 0;
    for (size_t i = 0; i < left; i++) word = word << 8 | static_cast<unsigned char>(at[i]);
    hash = (hash ^ word) * odd;
    return hash ^ hash >> 32;
}

// Most words were seen before. One entry per hash; new ones replace old ones.
struct Cache {
    struct alignas(64) Entry {               // a cache line
        unsigned char length = 0, count = 0; // length 0: empty
        char text[30];
        int tokens[8];
    };
    static constexpr size_t size = 1 << 16;
    uint64_t serial = 0; // of the tokenizer
    std::vector<Entry> entries;
};

class JsonTokenizer : public Tokenizer {
  public:
    JsonTokenizer(const json& document, const std::string& path, const TokenizerConfig& config,
                  std::vector<TokenizerFile> files)
        : files(std::move(files)), normalizer(field(document, "normalizer"), path),
          pre_tokenizer(field(document, "pre_tokenizer"), path),
          decoder(field(document, "decoder"), path) {
        static std::atomic<uint64_t> count{0};
        serial = ++count;
        const json& model_spec = field(document, "model");
        vocabulary = read_vocabulary(model_spec, path);
        const std::vector<AddedToken> added = read_added_tokens(document, config);
        Template around;
        read_post_processor(field(document, "post_processor"), path, around);
        find_eot(config, around);
        identity.vocab_size = int(vocabulary.known.size());
        identity.kind = type_of(model_spec) == "Unigram"                   ? "unigram"
                        : gpt_rule() && gpt_rule()->rule == GptSplit::gpt2 ? "gpt2"
                                                                           : "bpe";
        read_texts();
        mark_settings(document, config, added);
        model = read_token_model(model_spec, pre_tokenizer.byte_level, vocabulary, identity.eot,
                                 identity.fingerprint);
        identity.fingerprint = model->fingerprint;
        splits_at_marks = model->splits_at_marks();
        find_bos_and_eos(around);
        if (config.text.empty()) write_config();
        find_cuts(added);
    }

    std::string decode(const int* tokens, size_t n, Specials specials) const override {
        std::string text;
        std::vector<std::string> names;
        for (size_t i = 0; i < n; i++) {
            if (!has(tokens[i])) fail_to_decode(tokens[i]);
            const size_t id = size_t(tokens[i]);
            if (vocabulary.special[id] && specials == Specials::ignored) continue;
            if (decoder.only_bytes())
                text += texts[id];
            else
                names.push_back(vocabulary.names[id]);
        }
        return decoder.only_bytes() ? text : decoder(std::move(names));
    }
    bool has(int token) const override {
        return token >= 0 && size_t(token) < vocabulary.known.size() &&
               vocabulary.known[size_t(token)];
    }
    TokenizerId id() const override { return identity; }
    size_t count_unencodable(std::string_view text) const override {
        return model->count_unencodable(text);
    }
    void save_files(const std::string& dir) const override { save_tokenizer_files(dir, files); }

    size_t safe_cut(std::string_view text) const override {
        if (exact_cuts) return gpt_rule()->safe_cut(text);
        for (size_t p = text.size(); p-- > 1;)
            if (may_cut(text, p)) return p;
        return 0;
    }

  protected:
    std::vector<int> tokens_of(std::string_view text, Specials specials,
                               bool continues) const override {
        static thread_local Cache cache;
        if (cache.serial != serial) {
            cache.entries.assign(Cache::size, {});
            cache.serial = serial;
        }
        std::vector<int> out;
        out.reserve(text.size() / 3 + 8);
        const bool spelled = specials == Specials::spelled;
        const PreTokenizer::Word word = [&](std::string_view whole) {
            encode_word(whole, cache, out);
        };
        raw_tokens.split(text, spelled, [&](std::string_view part, int id) {
            if (id >= 0) return out.push_back(id);
            const bool begins = part.data() == text.data();
            std::string made;
            if (!normalizer.empty()) part = made = normalizer(part, continues && begins);
            normalized_tokens.split(part, spelled, [&](std::string_view piece, int id) {
                if (id >= 0) return out.push_back(id);
                const bool first = begins && piece.data() == part.data();
                pre_tokenizer(piece, first, continues && first, word);
            });
        });
        return out;
    }

  private:
    std::vector<TokenizerFile> files;
    Normalizer normalizer;
    PreTokenizer pre_tokenizer;
    Decoder decoder;
    AddedTokens raw_tokens, normalized_tokens; // looked for before and after normalization
    Vocabulary vocabulary;                     // with added tokens
    std::vector<std::string> texts;            // by id, if tokens name bytes
    std::unique_ptr<TokenModel> model;
    bool splits_at_marks = false;
    TokenizerId identity;
    uint64_t serial;         // distinguishes cache entries of different tokenizers
    bool exact_cuts = false; // by gpt_rule()
    bool before_newline = false, before_word = false; // where samples allow cuts

    // The splitting rule, if nothing else changes or splits the text.
    const GptSplit* gpt_rule() const {
        return pre_tokenizer.byte_level && normalizer.empty() ? pre_tokenizer.only_rule() : nullptr;
    }
    void mark(const std::string& setting) {
        identity.fingerprint = fnv1a(setting, identity.fingerprint);
    }

    std::vector<AddedToken> read_added_tokens(const json& document, const TokenizerConfig& config) {
        const std::string& path = vocabulary.path;
        std::map<std::string, AddedToken> all;
        for (const json& entry : field(document, "added_tokens")) {
            const AddedToken token = added_token(entry, field(entry, "id"), path);
            all[token.content] = token;
        }
        for (const AddedToken& token : config.added) all.emplace(token.content, token);
        all.erase("");
        std::vector<AddedToken> raw, normalized, list;
        for (auto& [content, token] : all) {
            const int known = vocabulary.find(content);
            if (known < 0) vocabulary.add(token.id, content);
            if (known >= 0 && known != token.id)
                fail(path, " gives the token ", quoted(content), " the ids ", known, " and ",
                     token.id, ". The files do not belong together");
            token.special = config.is_special(token);
            vocabulary.special[size_t(token.id)] = token.special;
            list.push_back(token);
            if (token.normalized && !normalizer.empty()) {
                normalized.push_back(token);
                normalized.back().content = vocabulary.names[size_t(token.id)] =
                    normalizer(content); // which is also what it is decoded to
            } else {
                (token.normalized ? normalized : raw).push_back(token);
            }
        }
        raw_tokens = AddedTokens(raw);
        normalized_tokens = AddedTokens(normalized);
        return list;
    }

    void find_eot(const TokenizerConfig& config, const Template& around) {
        std::vector<std::string> names = {"<|endoftext|>", config.token("eos_token"), around.after};
        if (names[1].empty()) names.insert(names.end(), {"<|end_of_text|>", "</s>", "<eos>"});
        for (const std::string& name : names)
            if (identity.eot < 0) identity.eot = vocabulary.find(name);
        if (identity.eot >= 0) vocabulary.special[size_t(identity.eot)] = true;
    }

    // The tokens' texts and their hash: of the content, not the JSON, which has many forms.
    void read_texts() {
        uint64_t hash = fnv1a(identity.kind);
        texts.resize(vocabulary.names.size());
        for (size_t id = 0; id < texts.size(); id++) {
            if (!vocabulary.known[id]) continue;
            const std::string& name = vocabulary.names[id];
            if (!pre_tokenizer.byte_level || !bytes_of_name(name, texts[id])) texts[id] = name;
            const std::string& text = vocabulary.special[id] ? "" : texts[id];
            hash = fnv1a(cat(id, ' ', text.size(), ' ', text), hash);
        }
        identity.fingerprint = hash;
    }

    // Settings that differ from GPT-2's change the fingerprint.
    void mark_settings(const json& document, const TokenizerConfig& config,
                       const std::vector<AddedToken>& added) {
        const std::optional<bool> prefix = config.flag("add_prefix_space");
        if (prefix && pre_tokenizer.add_prefix_space && prefix != pre_tokenizer.add_prefix_space)
            fail(config.path, " says add_prefix_space ", *prefix ? "true" : "false", ", and ",
                 vocabulary.path, " says otherwise: make them agree");
        if (identity.kind == "gpt2") {
            if (pre_tokenizer.add_prefix_space.value_or(false)) mark("add_prefix_space");
            if (gpt_rule()->digits == GptSplit::each) mark("Digits, each");
            if (gpt_rule()->digits == GptSplit::runs) mark("Digits, in runs");
        } else {
            mark(field(document, "pre_tokenizer").dump());
            mark(field(document, "normalizer").dump());
        }
        for (const AddedToken& token : added)
            if (!token.special)
                mark(cat("added ", token.id, ' ', token.single_word, token.lstrip, token.rstrip,
                         token.normalized));
    }

    void find_bos_and_eos(const Template& around) {
        for (const auto& [name, id] :
             {std::pair(around.before, &bos), std::pair(around.after, &eos)}) {
            if (name.empty()) continue;
            *id = vocabulary.find(name);
            if (*id < 0)
                fail(vocabulary.path, " puts the token ", quoted(name),
                     " around a text, which is not in its vocabulary. Fetch it again");
        }
    }

    // tokenizer_config.json, for transformers.
    void write_config() {
        json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"clean_up_tokenization_spaces", false}};
        auto name = [&](const char* role, int id) {
            if (id >= 0) config[role] = vocabulary.names[size_t(id)];
        };
        name("bos_token", bos), name("eos_token", identity.eot), name("unk_token", model->unknown);
        files.push_back({"tokenizer_config.json", config.dump(2) + "\n"});
    }

    void encode_word(std::string_view word, Cache& cache, std::vector<int>& out) const {
        // Long texts may be one word to the pre-tokenizer, and many to the model.
        constexpr std::string_view mark = "\u2581";
        while (splits_at_marks) {
            size_t at = 0;
            while (word.substr(at).starts_with(mark)) at += mark.size();
            at = word.find(mark, at);
            if (at == word.npos) break;
            encode_piece(word.substr(0, at), cache, out);
            word.remove_prefix(at);
        }
        encode_piece(word, cache, out);
    }
    void encode_piece(std::string_view piece, Cache& cache, std::vector<int>& out) const {
        if (piece.size() > sizeof Cache::Entry::text) return model->encode(piece, out);
        Cache::Entry& entry = cache.entries[hash_of(piece) % Cache::size];
        if (entry.length == piece.size() &&
            std::memcmp(entry.text, piece.data(), piece.size()) == 0) {
            for (int k = 0; k < entry.count; k++) out.push_back(entry.tokens[k]);
            return;
        }
        const size_t before = out.size();
        model->encode(piece, out);
        if (out.size() - before > std::size(entry.tokens)) return;
        entry.length = static_cast<unsigned char>(piece.size());
        entry.count = static_cast<unsigned char>(out.size() - before);
        std::memcpy(entry.text, piece.data(), piece.size());
        std::copy(out.begin() + std::ptrdiff_t(before), out.end(), entry.tokens);
    }

    static bool is_word_byte(char c) {
        return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    }
    // Behind a word, before a newline or before a space and another word.
    bool may_cut(std::string_view text, size_t p) const {
        if (!is_word_byte(text[p - 1])) return false;
        if (text[p] == '\n') return before_newline;
        return before_word && text[p] == ' ' && p + 1 < text.size() && is_word_byte(text[p + 1]) &&
               (text[p + 1] > '9');
    }

    // Exact for GPT-2's and GPT-4's rules. Otherwise samples decide.
    void find_cuts(const std::vector<AddedToken>& added) {
        const bool splits = std::any_of(added.begin(), added.end(),
                                        [](const AddedToken& token) { return !token.special; });
        exact_cuts = gpt_rule() && !splits;
        if (exact_cuts) return;
        before_newline = before_word = true;
        std::vector<std::string> alphabet = {
            "a",      "b",          "Z",      "the",    "1",      "23",     ".",
            ",",      "'s",         "'",      "-",      "(",      "<",      ">",
            "|",      " ",          " ",      "  ",     "\n",     "\n\n",   "\t",
            "\r\n",   "\u00e9",     "\u0301", "\u4e2d", "\u3000", "\u2581", "\u0130",
            "\u00df", "\U0001F642", "\u200d", "\ufb01", "_"};
        for (size_t i = 0; i < added.size() && i < 64; i++)
            if (!added[i].special) alphabet.push_back(added[i].content);
        uint64_t drawn = 0;
        auto draw = [&](size_t most) {
            std::string text;
            for (uint32_t n = random_below(uint32_t(most + 1), 13, 0, drawn++); n > 0; n--)
                text += alphabet[random_below(uint32_t(alphabet.size()), 13, 0, drawn++)];
            return text;
        };
        for (int i = 0; i < 400 && (before_newline || before_word); i++) {
            bool& allowed = i % 2 ? before_word : before_newline;
            if (!allowed) continue;
            const std::string left = draw(8) + (i % 3 ? "word" : "7"),
                              right = (i % 2 ? " next" : "\n") + draw(8);
            std::vector<int> parts = encode(left);
            const std::vector<int> rest = encode_continuation(right);
            parts.insert(parts.end(), rest.begin(), rest.end());
            allowed = parts == encode(left + right);
        }
    }
};

} // namespace

json byte_level_json(json vocab, json merges, const std::vector<AddedToken>& added,
                     bool add_prefix_space, bool use_regex) {
    json tokens = json::array();
    for (const AddedToken& token : added)
        tokens.push_back({{"id", token.id},
                          {"content", token.content},
                          {"single_word", token.single_word},
                          {"lstrip", token.lstrip},
                          {"rstrip", token.rstrip},
                          {"normalized", token.normalized},
                          {"special", token.special}});
    std::sort(tokens.begin(), tokens.end(),
              [](const json& a, const json& b) { return a["id"] < b["id"]; });
    const json level = {{"type", "ByteLevel"},
                        {"add_prefix_space", add_prefix_space},
                        {"trim_offsets", true},
                        {"use_regex", use_regex}};
    return {{"version", "1.0"},
            {"truncation", nullptr},
            {"padding", nullptr},
            {"added_tokens", tokens},
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
              {"ignore_merges", false},
              {"vocab", std::move(vocab)},
              {"merges", std::move(merges)}}}};
}

json template_json(const json& document, const std::string& before, const std::string& after) {
    if (before.empty() && after.empty()) return nullptr;
    json specials = json::object(), single = json::array();
    auto put = [&](const std::string& name) {
        if (name.empty()) return;
        single.push_back({{"SpecialToken", {{"id", name}, {"type_id", 0}}}});
        json id = field(field(field(document, "model"), "vocab"), name.c_str());
        for (const json& token : field(document, "added_tokens"))
            if (token["content"] == name) id = token["id"];
        specials[name] = {
            {"id", name}, {"ids", json::array({id})}, {"tokens", json::array({name})}};
    };
    put(before);
    single.push_back({{"Sequence", {{"id", "A"}, {"type_id", 0}}}});
    put(after);
    json pair = single;
    pair.push_back({{"Sequence", {{"id", "B"}, {"type_id", 1}}}});
    return {{"type", "TemplateProcessing"},
            {"single", single},
            {"pair", pair},
            {"special_tokens", specials}};
}

std::unique_ptr<Tokenizer> make_json_tokenizer(const json& document, const std::string& path) {
    return std::make_unique<JsonTokenizer>(document, path, TokenizerConfig(),
                                           std::vector<TokenizerFile>());
}

std::unique_ptr<Tokenizer> load_json_tokenizer(const std::string& path) {
    const bool is_dir = is_directory_at(path);
    if (!is_dir && !path_exists(path))
        fail("there is no directory ", path,
             ", expected one with encoder.json and vocab.bpe, or vocab.json and merges.txt (of "
             "GPT-2)");
    const fs::path parent = fs::path(path).parent_path();
    const std::string dir = is_dir ? path : parent.empty() ? "." : parent.string();
    TokenizerConfig config;
    if (is_dir || fs::path(path).filename() == "tokenizer.json") config = TokenizerConfig(dir);
    std::string at = is_dir ? path + "/tokenizer.json" : path;
    json document;
    std::vector<TokenizerFile> files;
    if (path_exists(at)) {
        files.push_back({"tokenizer.json", read_tokenizer_file(at)});
        document = parse_json(files[0].content, at);
        if (!field(document, "model").is_object())
            fail(at, " is ", quoted(document), ", expected a tokenizer.json with a \"model\"",
                 document.is_object() && document.contains("vocab") && document.contains("config")
                     ? ". It looks like Mistral's tekken.json, which is not supported yet"
                     : "");
    } else {
        // Other classes use the same two files with another splitting rule.
        config.expect_class({"GPT2Tokenizer", "GPT2TokenizerFast"});
        document = read_vocab_and_merges(dir, config, at);
        files.push_back({"tokenizer.json", document.dump() + "\n"});
        if (config.text.empty()) {
            json own = {{"tokenizer_class", "GPT2Tokenizer"}, {"add_prefix_space", false}};
            if (document["model"]["vocab"].contains("<|endoftext|>"))
                for (const char* role : {"bos_token", "eos_token", "unk_token"})
                    own[role] = "<|endoftext|>";
            config.text = own.dump(2) + "\n";
        }
    }
    if (!config.text.empty()) files.push_back({"tokenizer_config.json", config.text});
    if (is_dir)
        for (const char* name : {"added_tokens.json", "special_tokens_map.json"})
            if (is_regular_file_at(dir + "/" + name))
                files.push_back({name, read_tokenizer_file(dir + "/" + name)});
    return std::make_unique<JsonTokenizer>(document, at, config, std::move(files));
}

} // namespace lns
