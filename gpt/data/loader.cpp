#include "gpt/data/loader.h"

#include "gpt/base/error.h"
#include "gpt/base/random.h"
#include "gpt/data/paths.h"

#include <algorithm>
#include <sys/stat.h>

namespace lns {

namespace {

std::string window_kind(int length, bool masked) {
    return masked   ? cat("instructions and answers in windows of ", length, " tokens")
           : length ? cat("documents padded to ", length, " tokens")
                    : "one stream of tokens";
}

// Devices and inodes.
std::vector<std::pair<dev_t, ino_t>> identities(const std::vector<std::string>& paths) {
    std::vector<std::pair<dev_t, ino_t>> found;
    for (const std::string& path : paths) {
        struct stat info = {};
        if (stat(path.c_str(), &info) != 0) info = {};
        found.push_back({info.st_dev, info.st_ino});
    }
    return found;
}

} // namespace

ShardSource::ShardSource(const std::string& pattern) : pattern(pattern) {
    for (int tries_left = 9;; tries_left--) {
        const std::vector<std::string> paths = glob_paths(pattern);
        const auto before = identities(paths);
        auto unchanged = [&] {
            return glob_paths(pattern) == paths && identities(paths) == before;
        };
        try {
            open(paths);
        } catch (const Error&) {
            if (tries_left == 0 || unchanged()) throw;
            continue;
        }
        if (unchanged()) return;
        if (tries_left == 0)
            fail("the shards of '", pattern,
                 "' keep being replaced: wait until data/tokenize has finished");
    }
}

void ShardSource::open(const std::vector<std::string>& paths) {
    shards.clear(), ends.clear();
    tokenizer = {};
    uint64_t end = 0;
    std::string named; // the first shard with a known tokenizer
    for (const std::string& path : paths) {
        const Shard& shard = shards.emplace_back(path);
        ends.push_back(end += shard.tokens);
        if (shard.window != shards[0].window || shard.has_mask() != shards[0].has_mask())
            fail("the shards of '", pattern, "' are of different kinds: ", shards[0].path, " has ",
                 window_kind(shards[0].window, shards[0].has_mask()), ", ", path, " has ",
                 window_kind(shard.window, shard.has_mask()), ". Name shards of one kind only");
        if (!shard.id.vocab_size) continue;
        if (tokenizer.vocab_size && shard.id != tokenizer)
            fail("the shards of '", pattern, "' were made with different tokenizers: ", named,
                 " with ", tokenizer.kind, " of ", tokenizer.vocab_size, " tokens, ", path,
                 " with ", shard.id.kind, " of ", shard.id.vocab_size,
                 shard.id.kind == tokenizer.kind && shard.id.vocab_size == tokenizer.vocab_size
                     ? " but different contents"
                     : "",
                 ". Name shards of one only");
        if (!tokenizer.vocab_size) tokenizer = shard.id, named = path;
    }
}

void ShardSource::read(uint64_t pos, size_t n, int* out) {
    size_t s = size_t(std::upper_bound(ends.begin(), ends.end(), pos) - ends.begin());
    if (n > size() || pos > size() - n)
        fail("cannot read tokens ", pos, " to ", pos + n, " of '", pattern, "', which has ",
             size());
    if (checker && checker->failed) std::rethrow_exception(checker->failure);
    while (n > 0) {
        const Shard& shard = shards[s];
        uint64_t at = pos - (ends[s] - shard.tokens);
        size_t here = size_t(std::min<uint64_t>(n, shard.tokens - at));
        shard.read(at, here, out);
        if (vocab)
            for (size_t i = 0; i < here; i++)
                if (out[i] >= vocab) shard.bad_token(at + i, uint32_t(out[i]), vocab);
        pos += here, out += here, n -= here, s++;
    }
}

void ShardSource::read_mask(uint64_t pos, size_t n, unsigned char* learned) {
    if (n > size() || pos > size() - n)
        fail("cannot read the mask of tokens ", pos, " to ", pos + n, " of '", pattern,
             "', which has ", size());
    size_t s = size_t(std::upper_bound(ends.begin(), ends.end(), pos) - ends.begin());
    while (n > 0) {
        const Shard& shard = shards[s];
        const uint64_t at = pos - (ends[s] - shard.tokens);
        const size_t here = size_t(std::min<uint64_t>(n, shard.tokens - at));
        shard.read_mask(at, here, learned);
        pos += here, learned += here, n -= here, s++;
    }
}

std::string ShardSource::describe() const {
    return cat(shards.size(), shards.size() == 1 ? " shard, " : " shards, ", size(), " tokens (",
               tokenizer.vocab_size ? tokenizer.kind : "unknown tokenizer", ") of ", pattern,
               window() ? ", " + window_kind(window(), masked()) : "");
}

std::vector<uint64_t> ShardSource::parts() const {
    std::vector<uint64_t> lengths;
    for (const Shard& shard : shards) lengths.push_back(shard.tokens);
    return lengths;
}

void ShardSource::check_tokens(int vocab) {
    this->vocab = vocab;
    uint64_t bytes = 0;
    size_t checked = 0;
    for (; checked < shards.size(); checked++) {
        const Shard& shard = shards[checked];
        bytes += shard.tokens * uint64_t(shard.token_bytes);
        if (bytes > checked_at_once) break;
        shard.check_checksum(); // damaged tokens may still be below vocab
        shard.check_tokens(vocab);
    }
    if (checker || checked == shards.size()) return;
    checker = std::make_unique<Checker>();
    checker->thread = std::thread([this, checked, &c = *checker] {
        try {
            for (size_t i = checked; i < shards.size() && !c.stop; i++)
                shards[i].check_checksum([&] { return c.stop.load(); });
        } catch (...) {
            c.failure = std::current_exception();
            c.failed = true;
        }
    });
}

void ShardSource::finish_checks() {
    if (!checker) return;
    if (checker->thread.joinable()) checker->thread.join();
    if (checker->failed) std::rethrow_exception(checker->failure);
}

ShardSource::Checker::~Checker() {
    stop = true;
    if (thread.joinable()) thread.join();
}

void MemorySource::read(uint64_t pos, size_t n, int* out) {
    if (n > size() || pos > size() - n)
        fail("cannot read tokens ", pos, " to ", pos + n, " of ", describe());
    std::copy_n(tokens.begin() + std::ptrdiff_t(pos), n, out);
}

std::string MemorySource::describe() const { return cat(tokens.size(), " tokens in memory"); }

void MemorySource::check_tokens(int vocab) {
    for (size_t i = 0; i < tokens.size(); i++)
        if (tokens[i] < 0 || tokens[i] >= vocab)
            fail("token ", i, " of the ", tokens.size(), " in memory is ", tokens[i],
                 ", expected one below the model's vocabulary of ", vocab);
}

uint64_t permute(uint64_t i, uint64_t n, uint64_t seed, uint64_t epoch) {
    if (n <= 1) return 0;
    int half = 4; // a Feistel network of fewer bits yields few permutations
    while (half < 32 && n > uint64_t(1) << (2 * half)) half++;
    const uint64_t mask = (uint64_t(1) << half) - 1;
    const uint64_t stream = fnv1a("loader.order") + epoch;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (uint64_t round = 0; round < 6; round++) {
            uint64_t mixed = left ^ (random_bits(seed, stream, round << 32 | right) & mask);
            left = right, right = mixed;
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}

Loader::Loader(std::shared_ptr<TokenSource> source, int T, uint64_t seed, bool shuffle)
    : source(std::move(source)), T(T), seed(seed), shuffle(shuffle) {
    if (T < 1) fail("the sequence length is ", T, ", expected at least 1");
    const int padded = this->source->window();
    if (padded && padded != T)
        fail("sequences of ", T, " tokens do not match ", this->source->describe(),
             ". Use --seq-len ", padded, ", or tokenize with another --pad-documents or without");
    if (padded) document_end = this->source->id().eot;
    buffer.resize(size_t(T) + (padded ? 0 : 1));
    if (this->source->size() == TokenSource::endless) {
        this->shuffle = false;
        windows = TokenSource::endless;
        part_starts = part_windows = {0};
        return;
    }
    uint64_t start = 0, longest = 0;
    for (uint64_t length : this->source->parts()) {
        part_starts.push_back(start);
        part_windows.push_back(windows);
        start += length;
        longest = std::max(longest, length);
        if (length > 0) windows += (padded ? length : length - 1) / uint64_t(T);
    }
    if (windows == 0)
        fail("a sequence of ", T, " needs ", uint64_t(T) + 1, " tokens of one shard, but ",
             this->source->describe(), " has ", longest,
             " at most. Use a shorter --seq-len or more text");
}

uint64_t Loader::position(uint64_t window) const {
    if (shuffle) window = permute(window, windows, seed, at.epoch);
    auto after = std::upper_bound(part_windows.begin(), part_windows.end(), window);
    size_t part = size_t(after - part_windows.begin()) - 1;
    return part_starts[part] + (window - part_windows[part]) * uint64_t(T);
}

void Loader::next(int B, int* inputs, int* targets) {
    for (int b = 0; b < B; b++) {
        source->read(position(at.index), buffer.size(), buffer.data());
        std::copy_n(buffer.begin(), T, inputs + size_t(b) * size_t(T));
        int* to = targets + size_t(b) * size_t(T);
        std::copy(buffer.begin() + 1, buffer.end(), to);
        if (source->masked()) {
            learned.resize(buffer.size());
            source->read_mask(position(at.index), buffer.size(), learned.data());
            for (int t = 0; t + 1 < T; t++)
                if (!learned[size_t(t) + 1]) to[t] = -1;
            to[T - 1] = -1;
        } else if (source->window()) {
            auto end = std::find(buffer.begin(), buffer.end(), document_end);
            // The last target is the end itself, one position earlier.
            std::fill(to + std::clamp<std::ptrdiff_t>(end - buffer.begin(), 0, T - 1), to + T, -1);
        }
        skip(1);
    }
}

void Loader::skip(uint64_t n) {
    at.epoch += n / windows;
    at.index += n % windows; // cannot overflow: only endless sources have 2^63 windows or more
    if (at.index >= windows) at.epoch++, at.index -= windows;
}

void Loader::restore(LoaderState state) {
    if (state.index >= windows)
        fail("the saved position is window ", state.index, " of an epoch, but ", source->describe(),
             " has ", windows, " windows of ", T,
             " tokens. Resume with the data and the sequence length that the run began with");
    at = state;
}

} // namespace lns
