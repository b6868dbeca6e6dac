#include "gpt/run/schemes.h"

#include <nlohmann/json.hpp>

#include "gpt/base/error.h"
#include "gpt/base/suggest.h"
#include "gpt/base/terminal.h"
#include "gpt/model/scheme.h"

namespace lns {

namespace {

// "branch, in", or "out if ℓ ≤ k, else in".
std::string norms_of(const SchemeRow& row) {
    if (row.out_norm == Layers::first_k) return "out if ℓ ≤ k, else in";
    std::vector<std::string> norms;
    if (row.embed_norm) norms.push_back("embedding");
    if (row.branch_norm == Layers::all) norms.push_back("branch");
    if (row.out_norm == Layers::all) norms.push_back("out");
    if (row.in_norm == Layers::all) norms.push_back("in");
    return join(norms);
}

// "arXiv 2502.05795, its code" with a link.
std::string linked(const std::string& source) {
    const std::string arxiv = "arXiv ";
    if (!source.starts_with(arxiv)) return source;
    const std::string number = source.substr(arxiv.size(), 10);
    return cat("[", number, "](https://arxiv.org/abs/", number, ")",
               source.substr(arxiv.size() + number.size()));
}

nlohmann::ordered_json ingredients(const SchemeRow& row, int L) {
    auto value = [L](double (*of_layers)(int)) -> nlohmann::ordered_json {
        if (!of_layers) return nullptr;
        return of_layers(L);
    };
    return {{"name", row.name},
            {"branch_norm", name_of(row.branch_norm)},
            {"out_norm", name_of(row.out_norm)},
            {"in_norm", name_of(row.in_norm)},
            {"embed_norm", row.embed_norm},
            {"skip", row.skip ? row.skip(L) : 1},
            {"depth", name_of(row.depth)},
            {"gamma", name_of(row.gamma)},
            {"gamma_init", value(row.gamma_init)},
            {"xavier_gain", value(row.xavier_gain)}};
}

Table table_of_schemes() {
    Table table = {{"-n", "norms", "", "source"}, {}};
    for (const SchemeRow& row : scheme_table()) {
        const bool takes_k = row.out_norm == Layers::first_k;
        table.rows.push_back({cat(row.name, takes_k ? cat(", ", row.name, ":k") : ""),
                              norms_of(row), row.what, row.source});
    }
    for (const SchemeAddition& more : scheme_additions())
        table.rows.push_back({cat("any", more.name), "", more.what, more.source});
    return table;
}

std::string markdown(const Table& table) {
    std::string text = "| `-n` | norms | | source |\n| --- | --- | --- | --- |\n";
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
