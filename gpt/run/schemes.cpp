#include "gpt/run/schemes.h"

#include <nlohmann/json.hpp>

#include "gpt/base/error.h"
#include "gpt/base/suggest.h"
#include "gpt/base/terminal.h"
#include "gpt/model/scheme.h"

namespace lns {

NLOHMANN_JSON_SERIALIZE_ENUM(Gamma, {{Gamma::none, "none"},
                                     {Gamma::vector, "vector"},
                                     {Gamma::scalar, "scalar"}})
NLOHMANN_JSON_SERIALIZE_ENUM(DepthScale, {{DepthScale::none, "none"},
                                          {DepthScale::output, "output"},
                                          {DepthScale::init_weight, "init_weight"},
                                          {DepthScale::input, "input"},
                                          {DepthScale::branch, "branch"},
                                          {DepthScale::residual, "residual"}})
NLOHMANN_JSON_SERIALIZE_ENUM(Mixing, {{Mixing::sum, "sum"},
                                      {Mixing::streams, "streams"},
                                      {Mixing::sources, "sources"}})

namespace {

// "arXiv 2502.05795, its code" with a link.
std::string linked(const std::string& source) {
    const std::string arxiv = "arXiv ";
    if (!source.starts_with(arxiv)) return source;
    const std::string number = source.substr(arxiv.size(), 10);
    return cat("[", number, "](https://arxiv.org/abs/", number, ")",
               source.substr(arxiv.size() + number.size()));
}

// Lists have an element for each sublayer; reads_second one more, for the head.
nlohmann::ordered_json ingredients(const SchemeRow& row, int L) {
    using Json = nlohmann::ordered_json;
    const Scheme scheme = parse_scheme(row.name);
    auto of_layers = [L](double (*f)(int)) { return f ? Json(f(L)) : Json(); };
    auto where = [&](SchemeRow::Where f, int last) {
        Json list = Json::array();
        for (int k = 1; k <= last; k++) list.push_back(f && f({k, L, scheme}));
        return list;
    };
    auto factors = [&](SchemeRow::Factor f) {
        Json list = Json::array();
        for (int k = 1; k <= 2 * L; k++) list.push_back(f ? f({k, L, scheme}) : 1);
        return list;
    };
    return {
        {"name", row.name},
        {"number", row.number_of ? Json(number_of(scheme, L)) : Json()},
        {"branch_norm", where(row.branch_norm, 2 * L)},
        {"out_norm", where(row.out_norm, 2 * L)},
        {"in_norm", where(row.in_norm, 2 * L)},
        {"embed_norm", row.embed_norm},
        {"skip", factors(row.skip)},
        {"beta", factors(row.beta)},
        {"depth", row.depth},
        {"depth_at", where(
                         row.depth_at ? row.depth_at : [](const Place&) { return true; }, 2 * L)},
        {"gamma", row.gamma},
        {"gamma_init", of_layers(row.gamma_init)},
        {"omega_init", of_layers(row.omega_init)},
        {"xavier_gain", of_layers(row.xavier_gain)},
        {"reads_second", where(row.reads_second, 2 * L + 1)},
        {"plain_head", row.plain_head},
        {"mixing", row.mixing},
        {"head_norms", row.head_norms},
        {"grouped", row.grouped},
        {"depth_transfer", row.depth_transfer}};
}

Table table_of_schemes() {
    Table table = {{"-n", "equations", "", "source"}, {}};
    for (const SchemeRow& row : scheme_table())
        table.rows.push_back({cat(row.name, row.number_of ? cat(", ", row.name, ":k") : ""),
                              row.equations, row.what, row.source});
    for (const SchemeAddition& more : scheme_additions())
        table.rows.push_back({cat("any", more.name), more.equations, more.what, more.source});
    return table;
}

std::string markdown(const Table& table) {
    std::string text = "| `-n` | equations | | source |\n| --- | --- | --- | --- |\n";
    for (const std::vector<std::string>& row : table.rows)
        text += cat("| `", row[0], "` | ", row[1], " | ", row[2], " | ", linked(row[3]), " |\n");
    return text;
}

} // namespace

std::string describe_schemes(const std::string& format, int L) {
    if (format == "names") return join(scheme_names(), "\n") + "\n";
    if (format == "markdown") return markdown(table_of_schemes());
    if (format == "table") return table_of_schemes().text();
    nlohmann::ordered_json rows;
    for (const SchemeRow& row : scheme_table()) rows.push_back(ingredients(row, L));
    return rows.dump(2) + "\n";
}

} // namespace lns
