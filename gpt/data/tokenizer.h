// From text to tokens and back: bytes, GPT-2's byte-level BPE, SentencePiece.
//
// Easy to get wrong:
// - encode never gives end-of-text, whatever the text says: "<|endoftext|>" in a text is 13
//   characters. End-of-text stands between documents and is added by who knows them.
// - A text that is not valid UTF-8 is no error. bytes and gpt2 give it back to the byte: gpt2
//   treats each byte that is no part of a valid character as a symbol of its own for the splitting
//   rule (so a text splits as if U+FFFD stood there) and encodes the byte itself.
// - A byte-level vocabulary may lack bytes, as SmolLM2's. As in Hugging Face's tokenizers such a
//   byte becomes the model's unk_token, or nothing if it has none; without_token counts them.
// - A prompt and a document begin with `bos` where tokenizer_config.json says add_bos_token; encode
//   does not add it.
// - SentencePiece normalizes: what its model folds (NFKC, runs of spaces, spaces at the ends) is
//   not given back, U+2581 comes back as a space, invalid UTF-8 as U+FFFD, and a character that is
//   neither in the vocabulary nor covered by byte pieces as " \u2047 ". Models that fold nothing
//   and have byte pieces (LLaMA's) give back every valid text that has no U+2581.
#pragma once

#include "gpt/data/shard.h"

#include <memory>
#include <string_view>

namespace lns {

// All functions may be called from many threads at once.
struct Tokenizer {
    virtual ~Tokenizer() = default;
    virtual std::vector<int> encode(std::string_view text) const = 0;
    // The exact bytes of the tokens. End-of-text and other special tokens decode to nothing.
    virtual std::string decode(const int* tokens, size_t n) const = 0;
    std::string decode(const std::vector<int>& tokens) const {
        return decode(tokens.data(), tokens.size());
    }
    // Whether decode knows the token: a vocabulary may have gaps, a model more tokens.
    virtual bool has(int token) const = 0;
    virtual TokenizerId id() const = 0;
    int vocab_size() const { return id().vocab_size; }
    int eot() const { return id().eot; }
    // What tokenizer_config.json's add_bos_token puts before a text; -1: nothing.
    int bos = -1;
    // bos, if any, and the text.
    std::vector<int> encode_prompt(std::string_view text) const;
    // How many bytes of the text have no token.
    virtual size_t without_token(std::string_view) const { return 0; }
    // Writes its files into dir (made if missing) under Hugging Face names, for load_tokenizer.
    virtual void save(const std::string& dir) const = 0;

    // For texts that come in parts. The last p in the text such that, whatever follows the text,
    // encode(all) = encode(text[0, p)) + encode_rest(text[p, ..) + what follows). 0: there is none.
    virtual size_t safe_cut(std::string_view text) const = 0;
    // encode for a part that continues a text.
    virtual std::vector<int> encode_rest(std::string_view text) const { return encode(text); }
};

// spec: `bytes`; `gpt2:DIR`, where DIR holds encoder.json and vocab.bpe, or vocab.json and
// merges.txt; a SentencePiece FILE.model; a tokenizer.json; or a directory of Hugging Face or that
// save() wrote. Beside files of these names a tokenizer_config.json is followed.
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& spec);

// Whether a tokenizer's files lie in the directory, of a kind that load_tokenizer knows or not.
bool has_tokenizer(const std::string& dir);

} // namespace lns
