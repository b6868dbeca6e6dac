// Chat templates: the part of Jinja 3.1 that templates of Hugging Face's tokenizers use, with the
// settings of transformers (trim_blocks, lstrip_blocks, loop controls, generation blocks).
//
// Statements: if, for (with `if`, `else`, loop.index and its kin, break, continue), set (of names,
// of namespace attributes, and in block form), generation. Expressions: literals, lists, dicts,
// attributes, items, slices, arithmetic, ~, comparisons, in, and, or, not, inline if, the common
// string methods, filters and tests, namespace(), range(), raise_exception(), strftime_now().
// Anything else, such as macros, is an error that names it. Upper and lower case are those of
// ASCII.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gpt/base/json.h"

namespace lns {

class Jinja {
  public:
    // Throws an error that begins with `where` and names the line, if the text is not a template.
    Jinja(std::string_view text, std::string where);

    struct Output {
        std::string text;
        std::vector<std::pair<size_t, size_t>> generated; // [begin, end) of generation blocks
    };
    // Throws if the template raises an exception, or applies an operation to a value of another
    // type.
    Output render(const nlohmann::ordered_json& variables) const;
    // Whether it has generation blocks, which mark what an assistant writes.
    bool marks_generation() const { return marks_generation_; }

    struct Context;
    enum class Flow { next, leave_loop, next_round };
    using Node = std::function<Flow(Context&)>;

  private:
    std::string where_;
    Node root_;
    bool marks_generation_ = false;
};

} // namespace lns
