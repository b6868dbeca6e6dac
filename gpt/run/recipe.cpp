#include "gpt/run/recipe.h"

#include <algorithm>
#include <limits>

#include "gpt/model/params.h"
#include "gpt/run/setup.h"

namespace lns {

namespace {

// arXiv 2502.05795, section 4.1 and its released code, by the model's parameters. The paper has no
// runs below 130m: the 10,000 steps there are ours.
struct PaperRow {
    double parameters;
    int64_t steps;
    double lr;
    const char* warmup;
};
const PaperRow paper_rows[] = {{120e6, 10000, 1e-3, "10%"},
                               {200e6, 20000, 1e-3, "10%"},
                               {300e6, 40000, 1e-3, "10%"},
                               {600e6, 60000, 5e-4, "10%"},
                               {std::numeric_limits<double>::infinity(), 100000, 5e-4, "1000"}};

} // namespace

void apply_recipe(Options& o) {
    auto set = [&](const char* flag, auto& variable, const auto& value) {
        if (!o.is_given(flag)) variable = value;
    };
    auto set_pure_bf16 = [&] {
        set("--dtype", o.dtype, "bf16");
        if (o.dtype == "float32") return; // given; such weights have no master copy
        set("--master-weights", o.master_weights, "no");
        set("--moments", o.moments, "bf16");
    };
    if (o.recipe == "paper") {
        const PaperRow* row = paper_rows;
        const double parameters = double(make_registry(model_config(o)).count());
        while (parameters > row->parameters) row++;
        set("--steps", o.steps, row->steps);
        set("--lr", o.lr, row->lr);
        set("--warmup", o.warmup, row->warmup);
        set("--seq-len", o.seq_len, 256);
        set("--total-batch", o.total_batch, 131072);
        set("--beta1", o.beta1, 0.9);
        set("--beta2", o.beta2, 0.999);
        set("--eps", o.eps, 1e-8);
        set("--weight-decay", o.weight_decay, 0);
        set("--grad-clip", o.grad_clip, 0);
        set("--lr-schedule", o.lr_schedule, "cosine");
        set("--final-lr-frac", o.final_lr_frac, 0.1);
        set("--val-tokens", o.val_tokens, 10000000);
        // √(2/5), as in the code of the published results, until its commit eb1a0a5 of 2026-01-02.
        set("--embed-std", o.embed_std, 0.632455532034);
        set_pure_bf16();
    } else if (o.recipe == "paper-sft") {
        // The same paper's fine-tuning, by the code of OwLore (arXiv 2405.18380): owlore_scripts/
        // run_lisa.sh, which trains 2 layers of LLaMA-2-7B, and scripts/run_finetune_with_lisa.sh
        // of github.com/pixeli99/OwLore, with the defaults of transformers' Trainer.
        const Config config = model_config(o);
        set("--epochs", o.epochs, 4);
        set("--batch", o.batch, 16);
        set("--seq-len", o.seq_len, std::min(512, config.positions));
        set("--lisa", o.lisa, std::min(4, config.layers));
        set("--lisa-interval", o.lisa_interval, 3);
        set("--lr", o.lr, 3e-4);
        set("--lr-schedule", o.lr_schedule, "linear");
        set("--warmup", o.warmup, "0");
        set("--final-lr-frac", o.final_lr_frac, 0);
        set("--beta1", o.beta1, 0.9);
        set("--beta2", o.beta2, 0.999);
        set("--eps", o.eps, 1e-8);
        set("--weight-decay", o.weight_decay, 0);
        set("--grad-clip", o.grad_clip, 1);
        set_pure_bf16();
    } else if (o.model == "tiny" && o.init_from.empty()) {
        set("--seq-len", o.seq_len, 128);
        set("--lr", o.lr, 0.003);
        set("--val-tokens", o.val_tokens, 32768);
    }
    o.flags = training_flags(o);
}

} // namespace lns
