// A GPU accesses 8 elements at once, so sizes are rounded up to 8. The padding is zero and stays
// zero: a channel of weight 0 adds nothing, and the gradient of that weight is a product with 0.
#pragma once

#include <cstdint>

#include "gpt/model/config.h"
#include "gpt/model/params.h"

namespace lns::cuda {

inline Config pad_config(Config c) {
    auto up = [](int& n) { n = (n + 7) / 8 * 8; };
    up(c.vocab_size), up(c.mlp_width), up(c.head_size);
    return c;
}

// Where the elements of a parameter p of the real model are in q, that of the padded one.
struct Placement {
    struct Axis {
        int64_t real = 1, padded = 1, group = 1, padded_group = 1;

        Axis(int64_t n, int64_t m, const Config& config, const Config& padded_config)
            : real(n), padded(m), group(n), padded_group(m) {
            const int head = config.head_size, padded_head = padded_config.head_size;
            if (n % head == 0 && n / head * padded_head == m)
                group = head, padded_group = padded_head; // each head is padded
        }
        int64_t operator()(int64_t i) const { return i / group * padded_group + i % group; }
    };
    Axis rows, columns;

    Placement(const Param& p, const Param& q, const Config& config, const Config& padded_config)
        : rows(p.shape[0], q.shape[0], config, padded_config),
          columns(p.shape.size() == 2 ? p.shape[1] : 1, q.shape.size() == 2 ? q.shape[1] : 1,
                  config, padded_config) {
        if (p.shape.size() == 1 || p.shape[1] == q.shape[1])
            columns.group = columns.real, columns.padded_group = columns.padded;
    }
    // f(i, j): element i of p is element j of q.
    template <class F> void each(const F& f) const {
#pragma omp parallel for
        for (int64_t r = 0; r < rows.real; r++)
            for (int64_t c = 0; c < columns.real; c++)
                f(r * columns.real + c, rows(r) * columns.padded + columns(c));
    }
};

} // namespace lns::cuda
