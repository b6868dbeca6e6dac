#include "gpt/data/sentencepiece_json.h"

#include <algorithm>
#include <bit>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "gpt/data/protobuf.h"
#include "gpt/data/unicode.h"

namespace lns {

using json = nlohmann::json;

namespace {

// Field numbers and defaults are those of sentencepiece_model.proto.
struct Piece {
    std::string text;
    float score = 0;
    enum Type : uint64_t { normal = 1, unknown, control, user_defined, unused, byte } type = normal;
};
struct Model {
    std::vector<Piece> pieces;
    bool bpe = false, byte_fallback = false, suffix = false;
    bool dummy_prefix = true, remove_extra_spaces = true, escape_spaces = true;
    bool charsmap = false;
};

Model read_model(std::string_view data) {
    Model model;
    each_field(data, [&](uint64_t part, std::string_view bytes, uint64_t) {
        Piece piece;
        each_field(bytes, [&](uint64_t field, std::string_view text, uint64_t value) {
            switch (part * 100 + field) {
            case 101:
                piece.text = text;
                break;
            case 102:
                piece.score = std::bit_cast<float>(uint32_t(value));
                break;
            case 103:
                piece.type = Piece::Type(value);
                break;
            case 203:
                model.bpe = value == 2;
                break;
            case 224:
                model.suffix = value;
                break;
            case 235:
                model.byte_fallback = value;
                break;
            case 302:
                model.charsmap = !text.empty();
                break;
            case 303:
                model.dummy_prefix = value;
                break;
            case 304:
                model.remove_extra_spaces = value;
                break;
            case 305:
                model.escape_spaces = value;
                break;
            }
        });
        if (part == 1) model.pieces.push_back(piece);
    });
    return model;
}

// Each piece is the merge of any two others, in order of their scores.
json merges_of(const Model& model) {
    std::map<std::string_view, size_t> ids;
    for (size_t id = 0; id < model.pieces.size(); id++)
        if (model.pieces[id].type == Piece::normal) ids[model.pieces[id].text] = id;
    std::vector<std::tuple<float, size_t, size_t, size_t>> merges; // −score, ids: whole, parts
    for (const auto& [text, id] : ids)
        for (size_t i = character_at(text, 0).length; i < text.size();
             i += character_at(text, i).length) {
            const auto left = ids.find(text.substr(0, i)), right = ids.find(text.substr(i));
            if (left != ids.end() && right != ids.end())
                merges.emplace_back(-model.pieces[id].score, id, left->second, right->second);
        }
    std::sort(merges.begin(), merges.end());
    json out = json::array();
    for (const auto& [score, id, left, right] : merges)
        out.push_back({model.pieces[left].text, model.pieces[right].text});
    return out;
}

} // namespace

json sentencepiece_as_json(std::string_view data) {
    const Model model = read_model(data);
    json vocab = json::object(), added = json::array(), unknown;
    for (size_t id = 0; id < model.pieces.size(); id++) {
        const Piece& piece = model.pieces[id];
        if (piece.type == Piece::user_defined || piece.type == Piece::unused ||
            without_invalid_bytes(piece.text) != piece.text)
            return nullptr;
        vocab[piece.text] = id;
        if (piece.type == Piece::unknown) unknown = piece.text;
        if (piece.type == Piece::unknown || piece.type == Piece::control)
            added.push_back({{"id", id},
                             {"content", piece.text},
                             {"single_word", false},
                             {"lstrip", false},
                             {"rstrip", false},
                             {"normalized", false},
                             {"special", true}});
    }
    if (!model.bpe || model.charsmap || model.suffix || !model.escape_spaces ||
        vocab.size() != model.pieces.size())
        return nullptr;
    const char* mark = "\u2581";
    json normalizers = json::array(), decoders = json::array();
    if (model.remove_extra_spaces) {
        // Spaces only, not other white space.
        for (const auto& [regex, content] : {std::pair(R"(\A +| +\z)", ""), {" {2,}", " "}})
            normalizers.push_back(
                {{"type", "Replace"}, {"pattern", {{"Regex", regex}}}, {"content", content}});
    }
    if (model.dummy_prefix) normalizers.push_back({{"type", "Prepend"}, {"prepend", mark}});
    normalizers.push_back({{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", mark}});
    decoders.push_back({{"type", "Replace"}, {"pattern", {{"String", mark}}}, {"content", " "}});
    decoders.push_back({{"type", "ByteFallback"}});
    decoders.push_back({{"type", "Fuse"}});
    if (model.dummy_prefix)
        decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
    return {{"version", "1.0"},
            {"truncation", nullptr},
            {"padding", nullptr},
            {"added_tokens", added},
            {"normalizer", {{"type", "Sequence"}, {"normalizers", normalizers}}},
            {"pre_tokenizer", nullptr},
            {"post_processor", nullptr},
            {"decoder", {{"type", "Sequence"}, {"decoders", decoders}}},
            {"model",
             {{"type", "BPE"},
              {"dropout", nullptr},
              {"unk_token", unknown},
              {"continuing_subword_prefix", nullptr},
              {"end_of_word_suffix", nullptr},
              {"fuse_unk", true},
              {"byte_fallback", model.byte_fallback},
              {"ignore_merges", false},
              {"vocab", vocab},
              {"merges", merges_of(model)}}}};
}

} // namespace lns
