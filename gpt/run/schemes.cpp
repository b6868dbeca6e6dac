#include "gpt/run/schemes.h"

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

} // namespace

std::string describe_schemes(bool markdown) {
    Table table = {{"-n", "norms", "", "source"}, {}};
    for (const SchemeRow& row : scheme_table()) {
        const bool takes_k = row.out_norm == Layers::first_k;
        table.rows.push_back({cat(row.name, takes_k ? cat(", ", row.name, ":k") : ""),
                              norms_of(row), row.what, row.source});
    }
    for (const SchemeAddition& more : scheme_additions())
        table.rows.push_back({cat("any", more.name), "", more.what, more.source});
    if (!markdown) return table.text();
    std::string text = "| `-n` | norms | | source |\n| --- | --- | --- | --- |\n";
    for (const std::vector<std::string>& row : table.rows)
        text += cat("| `", row[0], "` | ", row[1], " | ", row[2], " | ", linked(row[3]), " |\n");
    return text;
}

} // namespace lns
