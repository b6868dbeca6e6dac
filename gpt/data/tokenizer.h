// From text to tokens and back: bytes, Hugging Face's tokenizer.json, GPT-2's files, SentencePiece.
//
// Easy to get wrong:
// - encode never returns special tokens, such as end-of-text, unless it is asked to:
//   "<|endoftext|>" in a text is 13 characters. The caller puts end-of-text between documents.
// - Invalid UTF-8 is not an error. bytes and byte-level vocabularies preserve it: splitting rules
//   treat each invalid byte as a symbol, and the byte itself is encoded.
// - A byte-level vocabulary may lack bytes, such as SmolLM2's. As in Hugging Face's tokenizers such
//   a byte becomes the model's unk_token, or nothing if it has none; count_unencodable counts them.
// - Prompts and documents begin with `bos` if tokenizer.json's post-processor says so or, where it
//   has none, add_bos_token in tokenizer_config.json, as in transformers 5; encode does not add it.
// - SentencePiece normalizes. What its model folds (NFKC, runs of spaces, spaces at the ends) is
//   lost, U+2581 decodes to a space, invalid UTF-8 to U+FFFD, and a character neither in the
//   vocabulary nor covered by byte pieces to " \u2047 ". Models that fold nothing and have byte
//   pieces (LLaMA's) preserve every valid text without U+2581.
#pragma once

#include "gpt/data/shard.h"

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace lns {

// spelled: the name of a special token, such as "<|im_start|>", in a text stands for the token, and
// the token is decoded to it. ignored: the name is text like any other, and the token is decoded to
// nothing.
enum class Specials { ignored, spelled };

// Thread-safe.
struct Tokenizer {
    virtual ~Tokenizer() = default;
    std::vector<int> encode(std::string_view text, Specials specials = Specials::ignored) const {
        return tokens_of(text, specials, false);
    }
    // encode for a part that continues a text.
    std::vector<int> encode_continuation(std::string_view text,
                                         Specials specials = Specials::ignored) const {
        return tokens_of(text, specials, true);
    }
    // The exact bytes of the tokens.
    virtual std::string decode(const int* tokens, size_t n,
                               Specials specials = Specials::ignored) const = 0;
    std::string decode(const std::vector<int>& tokens,
                       Specials specials = Specials::ignored) const {
        return decode(tokens.data(), tokens.size(), specials);
    }
    // Whether decode knows the token: a vocabulary may have gaps, and a model may have more tokens.
    virtual bool has(int token) const = 0;
    virtual TokenizerId id() const = 0;
    int vocab_size() const { return id().vocab_size; }
    int eot() const { return id().eot; }
    // The tokens that belong before and after a text; -1 if none.
    int bos = -1, eos = -1;
    // The chat template in its folder, in Jinja (gpt/data/chat.h); "" if there is none.
    std::string chat_template;
    // The tokens of the text, after bos if there is one.
    std::vector<int> encode_prompt(std::string_view text) const;
    // The number of bytes of the text that have no token.
    virtual size_t count_unencodable(std::string_view) const { return 0; }
    // Writes its files and the chat template to dir (created if missing) under Hugging Face names,
    // for load_tokenizer.
    void save(const std::string& dir) const;
    // For other programs: a tokenizer.json that gives the same tokens, for a tokenizer that has
    // none among its files; "" if there is none.
    virtual std::string as_tokenizer_json() const { return ""; }

    // For encoding in parts: the last p such that, whatever follows the text, encode(all) =
    // encode(text[0, p)) + encode_continuation(text[p, ..) + the following); 0 if there is none.
    virtual size_t safe_cut(std::string_view text) const = 0;

  protected:
    virtual void save_files(const std::string& dir) const = 0;
    virtual std::vector<int> tokens_of(std::string_view text, Specials specials,
                                       bool continues) const = 0;
    [[noreturn]] void fail_to_decode(int token) const;
};

// spec: `bytes`; `gpt2:DIR`, where DIR has encoder.json and vocab.bpe, or vocab.json and
// merges.txt; a SentencePiece FILE.model; a tokenizer.json; or a directory from Hugging Face or
// save(). A tokenizer_config.json in the same directory is respected.
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& spec);

// Whether the directory has a tokenizer's files, even of a kind that is not supported.
bool has_tokenizer(const std::string& dir);

} // namespace lns
