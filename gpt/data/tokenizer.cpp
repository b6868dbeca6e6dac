#include "gpt/data/tokenizer.h"

#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/json.h"
#include "gpt/base/random.h"
#include "gpt/data/added_tokens.h"
#include "gpt/data/charsmap.h"
#include "gpt/data/json_tokenizer.h"
#include "gpt/data/pre_tokenizer.h"
#include "gpt/data/sentencepiece_json.h"
#include "gpt/data/tokenizer_files.h"

#include <filesystem>

#ifdef LNS_SENTENCEPIECE
#include <sentencepiece_processor.h>
#endif

namespace lns {

namespace {

namespace fs = std::filesystem;
using json = nlohmann::json;

// Bytes

const char* const eot_name = "<|endoftext|>";

// tokenizer.json for Hugging Face: a byte-level BPE without merges.
json bytes_as_hugging_face() {
    json vocab;
    for (int b = 0; b < 256; b++) vocab[byte_name(static_cast<unsigned char>(b))] = b;
    vocab[eot_name] = 256;
    return byte_level_json(vocab, json::array(),
                           {{.id = 256, .content = eot_name, .special = true}}, false, false);
}

struct Bytes : Tokenizer {
    const AddedTokens eot_token{{{.id = 256, .content = eot_name, .special = true}}};

    std::vector<int> tokens_of(std::string_view text, Specials specials, bool) const override {
        std::vector<int> tokens;
        tokens.reserve(text.size());
        eot_token.split(text, specials == Specials::spelled, [&](std::string_view part, int id) {
            if (id >= 0) return tokens.push_back(id);
            for (char c : part) tokens.push_back(static_cast<unsigned char>(c));
        });
        return tokens;
    }
    std::string decode(const int* tokens, size_t n, Specials specials) const override {
        std::string text;
        for (size_t i = 0; i < n; i++) {
            if (!has(tokens[i])) fail_to_decode(tokens[i]);
            if (tokens[i] < 256)
                text += char(tokens[i]);
            else if (specials == Specials::spelled)
                text += eot_name;
        }
        return text;
    }
    bool has(int token) const override { return token >= 0 && token <= 256; }
    TokenizerId id() const override {
        return {"bytes", 257, 256, fnv1a("bytes, then end-of-text")};
    }
    void save_files(const std::string& dir) const override {
        json config = {{"kind", "bytes"},
                       {"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"bos_token", eot_name},
                       {"eos_token", eot_name},
                       {"clean_up_tokenization_spaces", false}};
        save_tokenizer_files(dir, {{"tokenizer.json", bytes_as_hugging_face().dump(1) + "\n"},
                                   {"tokenizer_config.json", config.dump(2) + "\n"}});
    }
    size_t safe_cut(std::string_view text) const override { return text.size(); }
};

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
    std::string settings;    // to append to the model
    AddedTokens special;     // control pieces and special added tokens

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
        std::vector<AddedToken> control;
        for (int token = 0; token < identity.vocab_size; token++)
            if (processor.IsControl(token) || processor.IsUnknown(token))
                control.push_back(
                    {.id = token, .content = processor.IdToPiece(token), .special = true});
        special = AddedTokens(control);
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

    // Texts in two parts.
    static const std::vector<std::pair<std::string, std::string>>& samples() {
        static const std::vector<std::pair<std::string, std::string>> all = {
            {"a", "\nb"},       {"Hello there.", "\nGeneral 12"},
            {"x1,", "\n\ny\n"}, {"\u00e9", "\n  \u00df"},
            {"end", "\n"},      {"end", "\n'tis"},
            {"a  ", "\n  b"},   {"a\n", "\n"},
            {" \t", "\n\tb"}};
        return all;
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
        for (const auto& [left, right] : samples()) {
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

    std::vector<int> tokens_of(std::string_view text, Specials specials,
                               bool continues) const override {
        std::vector<int> tokens;
        special.split(text, specials == Specials::spelled, [&](std::string_view part, int id) {
            if (id >= 0) return tokens.push_back(id);
            const bool rests = continues && cuttable && part.data() == text.data();
            const std::vector<int> more = encode_lines(rests ? rest : processor, part);
            tokens.insert(tokens.end(), more.begin(), more.end());
        });
        return tokens;
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

    std::string decode(const int* tokens, size_t n, Specials specials) const override {
        std::string text, part;
        std::vector<int> ordinary;
        auto flush = [&] {
            auto status = processor.Decode(ordinary, &part);
            if (!status.ok()) fail("SentencePiece cannot decode: ", status.ToString());
            text += part;
            ordinary.clear();
        };
        for (size_t i = 0; i < n; i++) {
            if (!has(tokens[i])) fail_to_decode(tokens[i]);
            if (specials == Specials::spelled &&
                (processor.IsControl(tokens[i]) || processor.IsUnknown(tokens[i]))) {
                flush();
                text += processor.IdToPiece(tokens[i]);
            } else {
                ordinary.push_back(tokens[i]);
            }
        }
        flush();
        return text;
    }
    bool has(int token) const override { return token >= 0 && token < identity.vocab_size; }
    TokenizerId id() const override { return identity; }
    std::string as_tokenizer_json() const override {
        json document = sentencepiece_as_json(model + settings);
        if (document.is_null()) return "";
        document["post_processor"] =
            template_json(document, bos < 0 ? "" : processor.IdToPiece(bos), "");
        try {
            const auto other = make_json_tokenizer(document, "tokenizer.json");
            for (const auto& [text, more] : samples())
                for (const std::string& whole :
                     {text, more, text + more, "  " + text + "  \u00e9 1"})
                    if (other->encode(whole) != encode(whole)) return "";
        } catch (const Error&) {
            return ""; // PCRE2 or utf8proc is missing
        }
        return document.dump() + "\n";
    }
    void save_files(const std::string& dir) const override {
        if (!config_file.empty())
            return save_tokenizer_files(
                dir, {{"tokenizer.model", model}, {"tokenizer_config.json", config_file}});
        json config = {{"add_bos_token", false}, {"add_eos_token", false}};
        if (processor.PieceToId("<0x0A>") != processor.unk_id())
            config["tokenizer_class"] = "LlamaTokenizer";
        const int special[] = {processor.bos_id(), processor.eos_id(), processor.unk_id()};
        const char* roles[] = {"bos_token", "eos_token", "unk_token"};
        for (int i = 0; i < 3; i++)
            if (special[i] >= 0) config[roles[i]] = processor.IdToPiece(special[i]);
        save_tokenizer_files(
            dir, {{"tokenizer.model", model}, {"tokenizer_config.json", config.dump(2) + "\n"}});
    }
};

#endif

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
    // What Bytes writes for other programs.
    if (std::error_code error; fs::file_size(path, error) < 50'000) {
        const json document = parse_json(read_tokenizer_file(path), path);
        const json &model = field(document, "model"), own = bytes_as_hugging_face()["model"];
        if (field(model, "vocab") == own["vocab"] && field(model, "merges") == own["merges"])
            return std::make_unique<Bytes>();
    }
    return load_json_tokenizer(path);
}

// Files of ours say what they are, beside a tokenizer.json for others.
bool has_kind(const std::string& dir, const char* kind) {
    const std::string path = dir + "/tokenizer_config.json";
    if (!path_exists(path)) return false;
    const json config = parse_json(read_tokenizer_file(path), path);
    return config.is_object() && config.value("kind", json()) == kind;
}

std::unique_ptr<Tokenizer> load_directory(const std::string& dir) {
    auto has = [&](const char* name) { return path_exists(fs::path(dir) / name); };
    if (has_kind(dir, "bytes")) return std::make_unique<Bytes>();
    if (has("tokenizer.model") && has_kind(dir, "sentencepiece"))
        return load_sentencepiece(dir + "/tokenizer.model");
    if (has("tokenizer.json")) return load_json_tokenizer(dir); // as transformers prefers
    if (has("tokenizer.model")) return load_sentencepiece(dir + "/tokenizer.model");
    if (has("vocab.json") || has("encoder.json")) return load_json_tokenizer(dir);
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
    return has_kind(dir, "bytes");
}

void Tokenizer::fail_to_decode(int token) const {
    fail("token ", token, " cannot be decoded: the ", id().kind, " tokenizer has 0 to ",
         vocab_size() - 1);
}

std::vector<int> Tokenizer::encode_prompt(std::string_view text) const {
    std::vector<int> tokens = encode(text);
    if (bos >= 0) tokens.insert(tokens.begin(), bos);
    return tokens;
}

void Tokenizer::save(const std::string& dir) const {
    save_files(dir);
    if (!chat_template.empty()) write_file_atomic(dir + "/chat_template.jinja", chat_template);
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& spec) {
    if (spec == "bytes") return std::make_unique<Bytes>();
    if (spec.rfind("gpt2:", 0) == 0) return load_json_tokenizer(spec.substr(5));
    if (is_directory_at(spec)) {
        std::unique_ptr<Tokenizer> tokenizer = load_directory(spec);
        tokenizer->chat_template = chat_template_in(spec);
        return tokenizer;
    }
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
