#include "gpt/run/setup.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "gpt/base/build.h"
#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/suggest.h"
#include "gpt/base/threads.h"
#include "gpt/cpu/bf16.h"
#include "gpt/cuda/gpu.h"
#include "gpt/data/paths.h"
#include "gpt/data/stories.h"
#include "gpt/run/checkpoint.h"
#include "gpt/run/rundir.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

namespace lns {

namespace fs = std::filesystem;

namespace {

Config base_config(const Options& o) {
    if (!o.model_given() && !o.init_from.empty()) return checkpoint_config(o.init_from);
    const std::vector<std::string> presets = preset_names();
    const bool preset = std::find(presets.begin(), presets.end(), o.model) != presets.end();
    const bool is_path = o.model.find('/') != std::string::npos || path_exists(o.model);
    return !preset && is_path ? checkpoint_config(o.model) : preset_config(o.model);
}

// The schemes that scale by depth.
std::vector<std::string> depth_schemes() {
    std::vector<std::string> names;
    for (const SchemeRow& row : scheme_table())
        if (row.depth != DepthScale::none) names.push_back(row.name);
    return names;
}

bool sizes_given(const Options& o) {
    return o.layers || o.width || o.heads || o.kv_heads || o.mlp_width || !o.arch.empty();
}

} // namespace

Config model_config(const Options& o) {
    Config c = base_config(o);
    if (!o.arch.empty() && o.arch != c.model_type) {
        Config other = architecture(o.arch);
        other.vocab_size = c.vocab_size;
        other.width = c.width;
        other.layers = c.layers;
        other.heads = c.heads;
        other.kv_heads = c.kv_heads;
        other.head_size = c.head_size;
        other.positions = c.positions;
        if (other.gated_mlp() == c.gated_mlp()) other.mlp_width = c.mlp_width;
        c = other;
    }
    // Sizes that follow from the given ones
    if (o.width || o.heads) c.head_size = 0;
    if (o.heads) c.kv_heads = 0;
    if (o.width) c.mlp_width = 0;
    if (o.layers && architecture_row(c.model_type).unrotated_every) c.rotated_layers.clear();
    for (auto [given, size] : {std::pair{o.layers, &c.layers},
                               {o.width, &c.width},
                               {o.heads, &c.heads},
                               {o.kv_heads, &c.kv_heads},
                               {o.mlp_width, &c.mlp_width},
                               {o.vocab, &c.vocab_size},
                               {o.positions, &c.positions}})
        if (given) *size = int(given);
    if (sizes_given(o)) c.preset = "";

    const Options standard;
    if (!o.norm.empty()) c.scheme = parse_scheme(o.norm);
    if (!o.norm.empty() && c.scheme.prores) c.scheme.step = 0;
    if (!o.norm_type.empty()) set_norm_type(c, o.norm_type);
    if (o.lns_power != standard.lns_power) c.scheme.lns_power = o.lns_power;
    if (o.lns_sites != standard.lns_sites) parse_sites(o.lns_sites, c.scheme);
    if (!o.completep_base.empty()) parse_base_model(o.completep_base, c.scheme);
    const bool lns_flags = o.lns_power != standard.lns_power || o.lns_sites != standard.lns_sites;
    if (lns_flags && c.scheme.row->depth == DepthScale::none)
        fail("--lns-power and --lns-sites change only -n ", join(depth_schemes(), " and -n "),
             ", and the scheme is '", c.scheme.name(), "': leave them out, or choose one of those");
    if (o.clip_gates > 0 && !c.scheme.gated())
        fail("--clip-gates clips the gates of +gpas, and the scheme is '", c.scheme.name(),
             "': leave it out, or choose -n ", c.scheme.name(), "+gpas");
    if (!o.completep_base.empty() && !c.scheme.row->depth_transfer)
        fail("--completep-base belongs to -n completep, and the scheme is '", c.scheme.name(),
             "': leave it out");
    if (o.init_std > 0) c.init_std = o.init_std;
    if (o.embed_std > 0) c.embed_std = o.embed_std;
    complete_config(c);
    return c;
}

namespace {

// PREFIX if the pattern's first file is PREFIX_train_000000.bin, "" if it has no such name.
std::string shard_prefix(const std::string& pattern) {
    std::string path = glob_paths(pattern)[0];
    size_t name = path.rfind('/') == std::string::npos ? 0 : path.rfind('/') + 1;
    for (const char* part : {"_train_", "_val_"})
        if (size_t at = path.rfind(part); at != std::string::npos && at >= name)
            return path.substr(0, at);
    return "";
}

std::shared_ptr<TokenSource> open_tokens(const std::string& pattern, uint64_t seed) {
    if (pattern.empty()) return std::make_shared<StorySource>(seed);
    return std::make_shared<ShardSource>(pattern);
}

} // namespace

std::string validation_pattern(const std::string& train, const std::string& val) {
    if (!val.empty() || train.empty()) return val;
    const std::string prefix = shard_prefix(train);
    std::string beside = literal_pattern(prefix) + "_val_*.bin";
    if (!prefix.empty() && matches_any(beside)) return beside;
    fail("-i '", train,
         "' was given without -j, and there is no *_val_*.bin beside it: name "
         "shards to validate on with -j, or make some with data/tokenize --val-fraction");
}

std::string saved_pattern(const std::string& pattern, const std::string& run) {
    if (pattern.empty() || pattern[0] == '/' || matches_any(pattern)) return pattern;
    const std::vector<std::string> folders = start_directories(run);
    for (const std::string& folder : folders)
        if (matches_any(folder + "/" + pattern)) return folder + "/" + pattern;
    if (folders.empty()) return pattern;
    fail("no file matches '", pattern, "', neither here nor where the run ", run,
         " was started, in ", join(folders), ": go there, or name the data with -i and -j");
}

void find_saved_paths(Options& o, const SavedFlags& saved) {
    auto unchanged = [&](const std::string& flag, const std::string& value) {
        auto was = saved.find(flag);
        return !value.empty() && was != saved.end() && was->second == value;
    };
    if (unchanged("--train", o.train)) o.train = saved_pattern(o.train, o.out);
    if (unchanged("--val", o.val)) o.val = saved_pattern(o.val, o.out);
    const std::string gpt2 = "gpt2:";
    for (auto [flag, value] :
         {std::pair{"--tokenizer", &o.tokenizer}, std::pair{"--init-from", &o.init_from},
          std::pair{"--model", &o.model}, std::pair{"--task-data", &o.task_data}}) {
        if (!unchanged(flag, *value)) continue;
        const std::string kind = value->starts_with(gpt2) ? gpt2 : "";
        const std::string path = value->substr(kind.size());
        if (path[0] == '/' || path_exists(path)) continue;
        for (const std::string& folder : start_directories(o.out))
            if (path_exists(folder + "/" + path)) {
                *value = kind + folder + "/" + path;
                break;
            }
    }
}

std::shared_ptr<TokenSource> open_validation(const std::string& pattern, int64_t seed) {
    return open_tokens(pattern, uint64_t(seed) + 1000000);
}

std::unique_ptr<Tokenizer> find_tokenizer(const std::string& spec, const std::string& pattern,
                                          const TokenizerId& id, std::string* why_none) {
    std::string from = spec;
    if (from.empty() && !pattern.empty()) {
        std::string beside = shard_prefix(pattern) + "_tokenizer";
        if (is_directory_at(beside)) from = beside;
    }
    if (from.empty() && id.kind == "bytes") from = "bytes";
    if (from.empty()) return nullptr;
    std::unique_ptr<Tokenizer> tokenizer;
    try {
        tokenizer = load_tokenizer(from);
    } catch (const Error& error) {
        if (!spec.empty() || !why_none) throw;
        *why_none = error.what();
        return nullptr;
    }
    if (id.vocab_size && tokenizer->id() != id)
        fail("the tokenizer '", from, "' (", tokenizer->id().kind, ", ", tokenizer->vocab_size(),
             " tokens) is not the one that made the tokens (", id.kind, ", ", id.vocab_size,
             " tokens",
             tokenizer->id().kind == id.kind && tokenizer->vocab_size() == id.vocab_size
                 ? ", of other contents"
                 : "",
             "): name that one with --tokenizer");
    return tokenizer;
}

void expect_tokenizer(const Tokenizer& tokenizer, const std::string& dir, const TokenizerId& id) {
    const TokenizerId found = tokenizer.id();
    if (id.vocab_size && found != id)
        fail("the tokenizer in ", dir, " (", found.kind, ", ", found.vocab_size,
             " tokens) is not the model's (", id.kind, ", ", id.vocab_size, " tokens",
             found.kind == id.kind && found.vocab_size == id.vocab_size ? ", of other contents"
                                                                        : "",
             "): put the model's own files back");
}

void expect_tokenizer_of_weights(const std::string& path, const TokenizerId& id) {
    const std::string at = find_checkpoint(path);
    if (!id.vocab_size || !is_directory_at(at)) return;
    TokenizerId known;
    if (path_exists(at + "/trainer_state.json")) known = read_trainer_state(at).tokenizer;
    if (!known.vocab_size && has_tokenizer(at)) {
        try {
            known = load_tokenizer(at)->id();
        } catch (const Error& error) {
            fail("the tokenizer beside the weights cannot be compared with that of the tokens (",
                 id.kind, ", ", id.vocab_size, " tokens): ", error.what(),
                 ". If you know that they are the same, move its files out of ", at);
        }
    }
    if (known.vocab_size && known != id)
        fail("the weights of ", at, " belong to another tokenizer (", known.kind, " of ",
             known.vocab_size, ") than the tokens (", id.kind, " of ", id.vocab_size,
             known.kind == id.kind && known.vocab_size == id.vocab_size ? ", of other contents"
                                                                        : "",
             "): tokenize the text with that of the weights");
}

Data open_data(const Options& o) {
    Data data;
    if (o.train.empty() && !o.val.empty())
        fail("-j '", o.val, "' was given without -i: name shards to train on with -i");
    data.train =
        open_tokens(o.train, uint64_t(o.seed)); // first: a file that is no shard is named as such
    const std::string val = validation_pattern(o.train, o.val);
    data.val = open_validation(val, o.seed);
    data.id = data.train->id();
    TokenizerId val_id = data.val->id();
    if (data.id.vocab_size && val_id.vocab_size && data.id != val_id)
        fail("the shards to train on were made by another tokenizer than those to validate on: '",
             o.train, "' by ", data.id.kind, " of ", data.id.vocab_size, " tokens, '", val, "' by ",
             val_id.kind, " of ", val_id.vocab_size, ": tokenize both with one");
    if (!data.id.vocab_size) data.id = val_id;
    data.tokenizer = find_tokenizer(o.tokenizer, o.train, data.id, &data.why_no_tokenizer);
    if (data.tokenizer) data.id = data.tokenizer->id();
    return data;
}

void fit_vocabulary(const Options& o, Data& data, Config& config) {
    if (!o.init_from.empty() && !o.resume) expect_tokenizer_of_weights(o.init_from, data.id);
    const bool free = o.vocab == 0 && o.init_from.empty() && data.id.vocab_size > 0 &&
                      (config.preset == "tiny" || o.model == "tiny");
    if (free) config.vocab_size = data.id.vocab_size;
    if (data.id.vocab_size > config.vocab_size)
        fail("the data has a vocabulary of ", data.id.vocab_size, " tokens (", data.id.kind,
             "), the model only ", config.vocab_size, ": give --vocab ", data.id.vocab_size,
             ", or tokenize for the model");
    data.train->check_tokens(config.vocab_size);
    data.val->check_tokens(config.vocab_size);
}

void check_length(int64_t B, int64_t T, const Config& config) {
    if (T > config.positions)
        fail("--seq-len ", T, " is longer than the model's ", config.positions,
             " positions: shorten it, or train a model of more --positions");
    const int64_t width = std::max({config.width, config.mlp_width, config.q_width()});
    if (double(B) * double(T) * config.layers * double(width) > 1e15)
        fail("--batch ", B, " x --seq-len ", T, " tokens in ", config.layers, " layers of width ",
             width, " exceed any machine's memory: lower one of them");
}

namespace {

// The largest divisor of n that is at most `most`.
int64_t divisor_up_to(int64_t n, int64_t most) {
    int64_t d = std::min(n, most);
    while (n % d) d--;
    return d;
}

// "3 (mpirun -np 3) or 4": the counts nearest to `ranks` that divide n.
std::string ranks_that_share(int64_t n, int64_t ranks) {
    const int64_t fewer = divisor_up_to(n, ranks);
    int64_t more = ranks + 1;
    while (more <= n && n % more) more++;
    const std::string command = cat(fewer, " (mpirun -np ", fewer, ")");
    return more > n ? command : cat(command, " or ", more);
}

} // namespace

StepShape step_shape(const Options& o, int ranks) {
    const bool fixed = o.continued && o.total_batch > 0;
    const bool batch_given = o.is_given("--batch");
    const int64_t sequence = o.seq_len * ranks; // tokens of one sequence on each rank
    StepShape shape = {o.total_batch, o.batch};
    if (fixed && !batch_given && shape.tokens % sequence == 0)
        shape.batch = divisor_up_to(shape.tokens / sequence, o.batch);
    const int64_t micro = shape.batch * sequence;
    if (micro > INT32_MAX)
        fail("--batch ", o.batch, " x --seq-len ", o.seq_len,
             " are too many tokens for a step: lower --batch");
    if (shape.tokens == 0) shape.tokens = micro;
    if (shape.tokens % micro == 0) return shape;

    const std::string found =
        cat("--total-batch ", shape.tokens, " is not a multiple of the ", micro,
            " tokens that --batch ", o.batch, " x --seq-len ", o.seq_len,
            ranks > 1 ? cat(" x ", ranks, " ranks") : "", " give: ");
    if (fixed && shape.tokens % sequence) {
        const int64_t sequences = shape.tokens / o.seq_len;
        const bool with_batch = batch_given && sequences % o.batch == 0;
        fail("a step of this run has ", sequences, " sequences of ", o.seq_len, " tokens, which ",
             ranks, " ranks cannot share equally: start ",
             ranks_that_share(with_batch ? sequences / o.batch : sequences, ranks),
             batch_given && !with_batch ? ", without --batch" : "");
    }
    if (fixed || shape.tokens < micro) {
        if (shape.tokens % sequence) fail(found, "try --total-batch ", micro);
        fail(found, "try --batch ", divisor_up_to(shape.tokens / sequence, o.batch));
    }
    const int64_t lower = shape.tokens / micro * micro;
    fail(found, "try --total-batch ", lower,
         lower + micro <= INT32_MAX ? cat(" or ", lower + micro) : "");
}

namespace {

Device wanted_device(const Options& o) {
    if (o.device == "cpu") return Device::cpu;
    const std::string why_not = why_no_gpu();
    if (o.device == "cuda" && !why_not.empty())
        fail("--device cuda: ", why_not, "; --device cpu uses the CPU");
    return why_not.empty() ? Device::cuda : Device::cpu;
}

// Throws for flags that the optimizer does not have.
void check_optimizer_flags(const Options& o) {
    if (o.cautious_decay && o.weight_decay == 0)
        fail("--cautious-decay: nothing decays with --weight-decay 0: leave one of them out");
    if (optimizer_row(o.optimizer).matrices != UpdateRule::adamw) return;
    for (const char* flag : {"--muon-lr", "--muon-scale", "--momentum", "--orthogonalize"})
        if (o.is_given(flag))
            fail(flag, ": the optimizer is AdamW, which lacks it: add --optimizer muon, or leave ",
                 flag, " out");
}

} // namespace

ModelOptions model_options(const Options& o, Purpose purpose, const std::string& trained) {
    ModelOptions m;
    m.device = wanted_device(o);
    const bool cuda = m.device == Device::cuda;
    const bool multiplies = cuda || bf16_unit() != Bf16Unit::none;
    const std::string automatic = !trained.empty() ? trained : multiplies ? "bf16" : "float32";
    const std::string dtype = o.dtype == "auto" ? automatic : o.dtype;
    m.purpose = purpose;
    m.dtype = dtype == "bf16" ? DType::bf16 : DType::float32;
    if (purpose != Purpose::training) return m;
    check_optimizer_flags(o);
    m.optimizer = &optimizer_row(o.optimizer);
    m.master_weights = o.master_weights == "yes";
    m.moments = o.moments == "bf16" ? DType::bf16 : DType::float32;
    m.stochastic_rounding = o.rounding == "stochastic";
    m.recompute = o.recompute == "layers"        ? Recompute::layers
                  : o.recompute == "activations" ? Recompute::activations
                                                 : Recompute::none;
    const bool rounded_weights = m.dtype == DType::bf16 && !m.master_weights;
    if (!m.master_weights && m.dtype != DType::bf16)
        fail("--master-weights no: float32 weights have no master copy",
             o.dtype == "auto" ? " (--dtype auto is float32: this CPU does not multiply bf16)" : "",
             ": add --dtype bf16, or leave it out");
    if (o.gradients == "bf16" && !cuda)
        fail("--gradients bf16: gradients on a CPU are always float32",
             o.device == "cpu" ? "" : " (" + why_no_gpu() + ")", ": leave it out");
    if (o.gradients == "bf16" && m.dtype != DType::bf16)
        fail("--gradients bf16: float32 weights have float32 gradients: add --dtype bf16, or leave "
             "it out");
    if (cuda && (o.gradients == "bf16" || (o.gradients == "auto" && rounded_weights)))
        m.gradients = DType::bf16;
    if (m.stochastic_rounding && !rounded_weights && m.moments != DType::bf16)
        fail("--rounding stochastic: the optimizer writes no bf16 here: add --master-weights no or "
             "--moments bf16, or leave it out");
    return m;
}

Hyperparameters hyperparameters(const Options& o, double lr, double muon_lr, int64_t step) {
    return {.lr = lr,
            .beta1 = o.beta1,
            .beta2 = o.beta2,
            .eps = o.eps,
            .weight_decay = o.weight_decay,
            .step = step,
            .cautious = o.cautious_decay,
            .muon_lr = muon_lr,
            .momentum = o.momentum,
            .orthogonalization = o.orthogonalize == "polar-express"
                                     ? Orthogonalization::polar_express
                                     : Orthogonalization::newton_schulz,
            .muon_scale = o.muon_scale == "jordan" ? MuonScale::jordan : MuonScale::moonlight};
}

std::string describe_precision(const ModelOptions& m) {
    const bool bf16 = m.dtype == DType::bf16;
    std::string text = bf16 ? "bf16" : "float32";
    if (bf16 && m.device == Device::cpu)
        text += bf16_unit() == Bf16Unit::none ? " (emulated in float32 on this CPU: slow)"
                                              : cat(" (", name_of(bf16_unit()), ")");
    if (m.purpose != Purpose::training) return text;
    const char* moments = m.moments == DType::bf16 ? "bf16" : "float32";
    text += bf16 && m.master_weights && m.moments == DType::float32
                ? ", float32 master weights and moments"
            : bf16 && m.master_weights ? ", float32 master weights, bf16 moments"
            : bf16                     ? cat(", no master weights, ", moments, " moments")
                                       : cat(", ", moments, " moments");
    if (m.gradients == DType::bf16) text += ", bf16 gradients";
    if (m.stochastic_rounding) text += ", stochastic rounding";
    if (m.recompute == Recompute::activations) text += "; recomputes norm outputs and activations";
    if (m.recompute == Recompute::layers) text += "; recomputes layers";
    return text;
}

namespace {

// One thread per core, unless the user chose (OMP_PROC_BIND). Otherwise Linux may keep two threads
// that wait for each other on one core for seconds: on 2 cores the tiny model then trained at 900
// to 12,000 tokens/s from run to run, and always at 12,000 with pinned threads.
[[maybe_unused]] void pin_threads() {
#if defined(_OPENMP) && defined(__linux__)
    if (std::getenv("OMP_PROC_BIND") || std::getenv("GOMP_CPU_AFFINITY")) return;
    const std::vector<int>& cores = usable_cores();
#pragma omp parallel
    {
        cpu_set_t mine;
        CPU_ZERO(&mine);
        CPU_SET(cores[size_t(omp_get_thread_num()) % cores.size()], &mine);
        sched_setaffinity(0, sizeof mine, &mine);
    }
#endif
}

} // namespace

int use_threads(const Options& o) {
#ifdef _OPENMP
    const int64_t cores = int64_t(usable_cores().size()), limit = omp_get_thread_limit();
    if (o.threads > limit)
        fail("--threads ", o.threads, " exceeds OMP_THREAD_LIMIT=", limit,
             ": lower it, or unset OMP_THREAD_LIMIT");
    const int64_t threads = o.threads > 0 ? o.threads : default_threads();
    omp_set_num_threads(int(threads));
    // Runs that share a machine for its GPUs must not all pin their threads to core 0.
    if (threads == cores && wanted_device(o) == Device::cpu) pin_threads();
    return int(threads);
#else
    (void)o;
    return 1;
#endif
}

} // namespace lns
