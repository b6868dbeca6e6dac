// tokenize: converts text files to token shards.
//
// One thread reads the text and cuts it into parts, all cores encode them, and one thread writes
// them in order. Cuts depend on the text only, not on threads or on how a pipe delivers it, and
// Tokenizer::safe_cut chooses them so that the tokens are those of the whole text.
//
// Shards are written into a hidden folder and, once complete, published as a set
// (gpt/data/publish.h). An error, a full disk, Ctrl-C or a kill leaves earlier shards as they were.
#include "data/tool.h"
#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/signals.h"
#include "gpt/base/terminal.h"
#include "gpt/base/threads.h"
#include "gpt/data/instructions.h"
#include "gpt/data/paths.h"
#include "gpt/data/publish.h"
#include "gpt/data/text.h"
#include "gpt/data/tokenizer.h"

#include <CLI/CLI.hpp>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstring>
#include <deque>
#include <fcntl.h>
#include <filesystem>
#include <map>
#include <mutex>
#include <sys/file.h>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>

namespace lns {
namespace {

namespace fs = std::filesystem;

struct Options {
    std::string tokenizer = "bytes", separator, out;
    double val_fraction = 0.05;
    uint64_t shard_tokens = 100'000'000;
    int pad_documents = 0;
    int threads = 0;
    bool quiet = false;
    bool instructions = false;
    std::string format;
    InstructionOptions examples;
    std::vector<std::string> files;
};

constexpr size_t part_bytes = 256 << 10; // the unit of work of a thread
constexpr size_t block_bytes = 64 << 10; // the unit of validation text in a pipe without separators
constexpr size_t known_bytes = 4 << 20;  // a pipe this short is treated as a file
// A text without a place to cut is cut after this many bytes, at the cost of a token or two.
constexpr size_t longest_part = 1 << 20;

volatile std::sig_atomic_t interrupted = 0;

void stop_if_interrupted() {
    if (interrupted) fail("interrupted: no shard was written or changed");
}

// The shards of one kind, train or val

struct ShardSet {
    std::string kind; // train or val
    const PublishedSet* files = nullptr;
    TokenizerId id;
    uint64_t shard_tokens = 0, tokens = 0;
    int window = 0;        // of padded documents or instructions, or 0
    bool masked = false;   // with a mask of the tokens to be learned
    std::vector<int> open; // the unfinished document, as far as it is kept
    bool cut = false;      // whether it was longer
    bool waits = false;    // for the next token, to see whether `waiting` is the last
    int waiting = 0;
    uint64_t documents = 0, documents_cut = 0, padding = 0; // of padded documents
    std::vector<std::unique_ptr<ShardWriter>> shards;       // all but the last are finished

    // Tokens of documents, each followed by end-of-text.
    void add(const std::vector<int>& from) {
        if (window == 0) return write(from.data(), from.size());
        for (int token : from) {
            if (token == id.eot)
                end_document();
            else if (open.size() + 1 < size_t(window))
                open.push_back(token);
            else
                cut = true;
        }
    }
    void end_document() {
        if (!open.empty()) { // an empty document has nothing to predict
            documents++, documents_cut += cut, padding += size_t(window) - open.size() - 1;
            open.resize(size_t(window), id.eot);
            write(open.data(), open.size());
        }
        open.clear(), cut = false;
    }
    // A last token that would be alone in a shard (usually end-of-text) joins the previous one:
    // no sequence fits into a shard of one token.
    void write(const int* from, size_t n) {
        if (n == 0) return;
        if (std::exchange(waits, false)) put(&waiting, 1); // it was not the last
        waits = !window && tokens + n > shard_tokens && (tokens + n) % shard_tokens == 1;
        if (waits) waiting = from[--n];
        put(from, n);
    }
    void put(const int* from, size_t n, const unsigned char* learned = nullptr) {
        while (n > 0) {
            if (shards.empty() || shards.back()->tokens == shard_tokens) {
                if (!shards.empty()) shards.back()->close();
                shards.push_back(std::make_unique<ShardWriter>(files->new_path(kind, shards.size()),
                                                               id, window, masked));
            }
            size_t here = size_t(std::min<uint64_t>(n, shard_tokens - shards.back()->tokens));
            shards.back()->write(from, here, learned);
            from += here, n -= here, tokens += here;
            if (learned) learned += here;
        }
    }
    void finish() {
        if (window) end_document();
        if (waits && shard_tokens == max_shard_tokens) put(&waiting, 1);
        if (waits && shard_tokens < max_shard_tokens) shards.back()->write(&waiting, 1), tokens++;
        if (!shards.empty()) shards.back()->close();
    }
};

// Reader, workers, writer

struct Part {
    size_t begin, end;            // in the job's text
    bool first, last, validation; // of its document
};

struct Job {
    std::string text;
    std::vector<Part> parts;
    std::vector<int> tokens[2]; // train, val
    std::vector<Record> records;
    std::vector<Encoded> examples; // of the records
};

// Jobs pass through `work` on many threads, and through `finish` in order on one. push blocks while
// many jobs are in flight. push or close throws the first exception of a thread.
struct Pipeline {
    using Function = std::function<void(Job&)>;

    Pipeline(int threads, Function work, Function finish)
        : most(size_t(threads) * 4 + 4), work(std::move(work)), finish(std::move(finish)) {
        // Signals go to the reader, whose read(2) they interrupt.
        sigset_t signals, before;
        sigemptyset(&signals);
        sigaddset(&signals, SIGINT);
        sigaddset(&signals, SIGTERM);
        pthread_sigmask(SIG_BLOCK, &signals, &before);
        for (int i = 0; i < threads; i++)
            all.emplace_back([this] { guarded([this] { worker(); }); });
        all.emplace_back([this] { guarded([this] { writer(); }); });
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    ~Pipeline() {
        {
            std::lock_guard lock(mutex);
            stopped = true;
        }
        changed.notify_all();
        for (std::thread& thread : all)
            if (thread.joinable()) thread.join();
    }

    void push(Job job) {
        std::unique_lock lock(mutex);
        wait_for_writer(lock, most);
        todo.emplace_back(pushed++, std::move(job));
        changed.notify_all();
    }
    void close() {
        std::unique_lock lock(mutex);
        wait_for_writer(lock, 1);
    }

  private:
    // Waits until fewer than n jobs are in flight.
    void wait_for_writer(std::unique_lock<std::mutex>& lock, size_t n) {
        while (!failure && pushed - written >= n) {
            changed.wait_for(lock, std::chrono::milliseconds(100));
            stop_if_interrupted();
        }
        if (failure) std::rethrow_exception(failure);
    }
    template <class Body> void guarded(Body body) {
        try {
            body();
        } catch (...) {
            std::lock_guard lock(mutex);
            if (!failure) failure = std::current_exception();
            stopped = true;
            changed.notify_all();
        }
    }
    void worker() {
        std::unique_lock lock(mutex);
        while (true) {
            changed.wait(lock, [&] { return stopped || !todo.empty(); });
            if (stopped) return;
            auto [index, job] = std::move(todo.front());
            todo.pop_front();
            lock.unlock();
            work(job);
            lock.lock();
            done.emplace(index, std::move(job));
            changed.notify_all();
        }
    }
    void writer() {
        std::unique_lock lock(mutex);
        while (true) {
            changed.wait(lock, [&] { return stopped || done.count(written); });
            if (stopped) return;
            Job job = std::move(done.extract(written).mapped());
            lock.unlock();
            finish(job);
            lock.lock();
            written++;
            changed.notify_all();
        }
    }

    size_t most;
    Function work, finish;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::pair<uint64_t, Job>> todo;
    std::map<uint64_t, Job> done;
    uint64_t pushed = 0, written = 0;
    bool stopped = false;
    std::exception_ptr failure;
    std::vector<std::thread> all;
};

// The progress line: redrawn on a terminal, otherwise printed at long intervals.
struct Progress {
    using Clock = std::chrono::steady_clock;
    Clock::time_point start = Clock::now(), shown = start;
    bool terminal = isatty(STDERR_FILENO), quiet = false, open = false;
    uint64_t total = 0; // bytes; 0: unknown

    double seconds() const { return std::chrono::duration<double>(Clock::now() - start).count(); }
    void show(uint64_t bytes) {
        if (quiet || Clock::now() - shown < std::chrono::milliseconds(terminal ? 300 : 10'000))
            return;
        shown = Clock::now();
        double rate = double(bytes) / seconds();
        std::fprintf(stderr, "%s%.1f MB read, %.1f MB/s",
                     terminal ? "\r" : "tokenize: ", double(bytes) / 1e6, rate / 1e6);
        if (total > bytes)
            std::fprintf(stderr, ", %.0f%%, %.0f s left", 100 * double(bytes) / double(total),
                         double(total - bytes) / rate);
        std::fputs(terminal ? "\x1b[K" : "\n", stderr);
        open = terminal;
    }
    ~Progress() {
        if (open) std::fputs("\r\x1b[K", stderr);
    }
};

struct File {
    std::string name;
    int descriptor;
    bool owned;
    explicit File(const std::string& path) : name(path == "-" ? "stdin" : path) {
        owned = path != "-";
        descriptor = owned ? open(path.c_str(), O_RDONLY | O_CLOEXEC) : STDIN_FILENO;
        if (descriptor < 0) fail("cannot open ", name, ": ", std::strerror(errno));
        struct stat info;
        if (fstat(descriptor, &info) == 0 && S_ISDIR(info.st_mode))
            fail(name, " is a directory, expected a text file. Name its files, as in ", name,
                 "/*.txt");
    }
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    ~File() {
        if (owned && descriptor >= 0) close(descriptor);
    }
    // The number of unread bytes; false if it is unknown (a pipe).
    bool size(uint64_t& bytes) const {
        struct stat info;
        if (fstat(descriptor, &info) != 0 || !S_ISREG(info.st_mode)) return false;
        off_t at = lseek(descriptor, 0, SEEK_CUR);
        bytes = info.st_size > at ? uint64_t(info.st_size - at) : 0;
        return true;
    }
    // Appends n bytes; fewer only at the end of the file.
    bool fill(std::string& text, size_t n) {
        size_t before = text.size(), end = before + n;
        text.resize(end);
        size_t at = before;
        while (at < end) {
            ssize_t got = ::read(descriptor, text.data() + at, end - at);
            stop_if_interrupted();
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) fail("cannot read ", name, ": ", std::strerror(errno));
            if (got == 0) break;
            at += size_t(got);
        }
        text.resize(at);
        return at == end;
    }
};

// Cuts the text into documents and parts, and decides where each goes

struct Reader {
    const Options& options;
    const Tokenizer& tokenizer;
    Pipeline& pipeline;
    Progress& progress;
    Job job = {};
    uint64_t bytes = 0, documents = 0, forced_cuts = 0; // bytes: of documents, without separators
    uint64_t zeros = 0, separators = 0;

    // Validation text:
    // - with separators, whole documents, whenever validation has less than its fraction;
    // - otherwise, for files, the last fraction of the text, which begins at tail;
    // - otherwise, for a pipe, blocks of 64 KiB, whenever validation has less than its fraction.
    enum { none, by_document, by_tail, by_block } split = none;
    uint64_t tail = 0, val_bytes = 0;
    bool in_validation = false;
    bool started = false; // part of the current document has been passed on

    void choose() {
        bool lacks = double(val_bytes) < options.val_fraction * double(bytes);
        if ((split == by_document && !started) || split == by_block) in_validation = lacks;
    }

    void add(std::string_view text, bool last) {
        choose();
        job.parts.push_back(
            {job.text.size(), job.text.size() + text.size(), !started, last, in_validation});
        job.text += text;
        bytes += text.size();
        zeros += uint64_t(std::count(text.begin(), text.end(), '\0'));
        if (in_validation) val_bytes += text.size();
        started = !last;
        documents += last;
        if (job.text.size() >= part_bytes) push();
    }
    void push() {
        if (!job.parts.empty()) pipeline.push(std::move(job));
        job = {};
        progress.show(bytes);
    }
    void end_document(std::string_view text) {
        if (started || !text.empty()) add(text, true);
    }

    // The next separator line at or after `from`: its start and the start of the next line. An
    // incomplete one at the end of the text is found once there is more text.
    bool find_separator(std::string_view text, size_t from, bool at_line_start, bool complete,
                        size_t& begin, size_t& end) const {
        const std::string& separator = options.separator;
        for (size_t at = from; (at = text.find(separator, at)) != std::string_view::npos; at++) {
            if (at == 0 ? !at_line_start : text[at - 1] != '\n') continue;
            std::string_view after = text.substr(at + separator.size(), 2);
            bool newline = after.substr(0, 1) == "\n";
            if (!newline && after != "\r\n" && !(complete && (after.empty() || after == "\r")))
                continue;
            begin = at;
            end = at + separator.size() + (newline ? 1 : after.size());
            return true;
        }
        return false;
    }

    // How much of a text can be passed on without splitting a possible separator.
    size_t before_separator(std::string_view text, bool at_line_start) const {
        if (options.separator.empty()) return text.size();
        size_t newline = text.rfind('\n');
        if (newline == std::string_view::npos && !at_line_start) return text.size();
        size_t line = newline == std::string_view::npos ? 0 : newline + 1;
        std::string separator = options.separator + "\r";
        return separator.rfind(text.substr(line), 0) == 0 ? line : text.size();
    }

    // A cut near `at`, preferably at the start of a line: between training and validation text.
    size_t cut_near(std::string_view text, size_t at) const {
        size_t lowest = at > block_bytes ? at - block_bytes : 0;
        for (size_t p = std::min(at, text.size() - 1) + 1; p-- > lowest;) {
            if (text[p] != '\n') continue;
            size_t cut = tokenizer.safe_cut(text.substr(0, p + 1));
            if (cut >= p && cut > 0) return cut;
        }
        if (size_t cut = tokenizer.safe_cut(text.substr(0, at))) return cut;
        return character_boundary(text, at);
    }
    // At most `at`, and not inside a UTF-8 character.
    static size_t character_boundary(std::string_view text, size_t at) {
        for (size_t back = 1; back <= 4 && back < at; back++) {
            unsigned char byte = static_cast<unsigned char>(text[at - back]);
            if (byte < 0x80) return at;
            if (byte >= 0xc0) return at - back;
        }
        return at;
    }

    void read(File& file, std::string text, bool more) {
        bool at_line_start = true, checked = false;
        const size_t part = split == by_block ? block_bytes : part_bytes;
        size_t want = part;
        while (true) {
            if (more && text.size() < want) more = file.fill(text, want - text.size());
            if (!checked)
                if (std::string reason = why_not_text(text, file.name, "data/tokenize");
                    !reason.empty())
                    fail(reason);
            checked = true;

            size_t used = 0, begin, end;
            if (!options.separator.empty()) {
                while (find_separator(text, used, at_line_start, !more, begin, end)) {
                    end_document(std::string_view(text).substr(used, begin - used));
                    used = end;
                    separators++;
                }
            } else if (split == by_tail && !in_validation && bytes + text.size() > tail) {
                used = tail > bytes ? cut_near(text, size_t(tail - bytes)) : 0;
                if (used > 0) add(std::string_view(text).substr(0, used), false);
                in_validation = true;
            }
            if (used == 0 && !more && text.size() <= want) {
                end_document(text);
                return;
            }
            if (used == 0) {
                std::string_view piece = std::string_view(text).substr(0, want);
                piece = piece.substr(0, before_separator(piece, at_line_start));
                used = tokenizer.safe_cut(piece);
                if (used == 0 && want < longest_part) {
                    want *= 2;
                    continue;
                }
                if (used == 0) {
                    used = character_boundary(text, piece.size());
                    forced_cuts++;
                }
                add(std::string_view(text).substr(0, used), false);
            }
            at_line_start = text[used - 1] == '\n';
            text.erase(0, used);
            want = part;
        }
    }

    void read_all() {
        uint64_t total = 0;
        bool known = true;
        for (const std::string& path : options.files) {
            uint64_t size = 0;
            known = File(path).size(size) && known;
            total += size;
        }
        std::unique_ptr<File> pipe; // a single short pipe is read in advance
        std::string ahead;
        bool more = true;
        if (options.files.size() == 1 && (!known || total == 0)) {
            pipe = std::make_unique<File>(options.files[0]);
            more = pipe->fill(ahead, known_bytes);
            known = !more;
            total = ahead.size();
        }
        progress.total = known ? total : 0;
        if (options.val_fraction > 0)
            split = !options.separator.empty() ? by_document : known ? by_tail : by_block;
        tail = uint64_t(double(total) * (1 - options.val_fraction));
        if (pipe) {
            read(*pipe, std::move(ahead), more);
        } else {
            for (const std::string& path : options.files) {
                File file(path);
                read(file, "", true);
            }
        }
        push();
    }
};

// Appends the tokens of a part to `out`, and adds the number of bytes that have none.
void encode_part(const Tokenizer& tokenizer, const Part& part, std::string_view text,
                 std::vector<int>& out, std::atomic<uint64_t>& unencodable) {
    const int eot = tokenizer.eot(), bos = tokenizer.bos;
    // If one token both begins and ends texts, the end of a document begins the next.
    if (part.first && bos >= 0 && bos != eot) out.push_back(bos);
    if (!text.empty()) {
        auto tokens = part.first ? tokenizer.encode(text) : tokenizer.encode_continuation(text);
        out.insert(out.end(), tokens.begin(), tokens.end());
        unencodable += tokenizer.count_unencodable(text);
    }
    if (part.last && eot >= 0) out.push_back(eot);
}

void note(const std::string& text) {
    std::fprintf(stderr, "tokenize: %s\n", printable(text).c_str());
}

// How many of something there were, and where the first.
struct Tally {
    uint64_t count = 0;
    std::string first;

    void add(const std::string& where) {
        if (count++ == 0) first = where;
    }
    std::string text(const std::string& what) const {
        return cat(what, ": ", count, count == 1 ? " example" : " examples", " (the first: ", first,
                   ")");
    }
};

// The folder of an output prefix.
void make_folder(const std::string& prefix) {
    const fs::path folder = fs::path(prefix).parent_path();
    std::error_code error;
    if (!folder.empty()) fs::create_directories(folder, error);
    if (error) fail("cannot make the directory ", folder.string(), ": ", error.message());
    if (prefix.empty() || prefix.back() == '/')
        fail("--out '", prefix, "' names no file, expected a prefix such as data/mytext");
}

std::string read_all(const std::string& path) {
    File file(path);
    std::string text;
    while (file.fill(text, size_t(1) << 20)) {
    }
    return text;
}

// Instructions and answers, in windows with a mask.
void run_instructions(const Options& options) {
    std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(options.tokenizer);
    std::optional<ChatTemplate> own;
    if (options.format.empty() && is_directory_at(options.tokenizer))
        own = ChatTemplate::in_folder(options.tokenizer);
    const ChatTemplate format =
        own ? *own : ChatTemplate::load(options.format.empty() ? "alpaca" : options.format);
    make_folder(options.out);

    PublishedSet files(options.out);
    const TokenizerId id = tokenizer->id();
    const uint64_t window = uint64_t(options.examples.window);
    ShardSet sets[2];
    std::vector<Packer> packers;
    for (int k = 0; k < 2; k++) {
        sets[k].kind = k == 0 ? "train" : "val", sets[k].files = &files, sets[k].id = id;
        sets[k].window = int(window), sets[k].masked = true;
        sets[k].shard_tokens = std::max<uint64_t>(options.shard_tokens / window, 1) * window;
        packers.emplace_back(int(window), std::max(id.eot, 0), options.examples.pack,
                             [&set = sets[k]](const Example& full) {
                                 set.put(full.tokens.data(), full.tokens.size(),
                                         full.learned.data());
                             });
    }

    uint64_t examples = 0, used[2] = {0, 0}, bytes = 0;
    Tally empty, cut, too_long;
    Progress progress;
    progress.quiet = options.quiet;
    auto encode = [&](Job& job) {
        for (const Record& record : job.records)
            job.examples.push_back(encode_record(record, format, *tokenizer, options.examples));
    };
    auto write = [&](Job& job) {
        for (Encoded& encoded : job.examples) {
            examples++;
            if (encoded.kind == Encoded::empty) empty.add(encoded.where);
            if (encoded.kind == Encoded::too_long) too_long.add(encoded.where);
            if (encoded.kind != Encoded::usable) continue;
            if (encoded.cut) cut.add(encoded.where);
            // The first is for training, then validation takes one whenever it has too few.
            const bool validation =
                double(used[1]) < options.val_fraction * double(used[0] + used[1]);
            used[validation]++;
            packers[validation].add(std::move(encoded.example));
        }
    };
    Pipeline pipeline(options.threads, encode, write);
    for (const std::string& path : options.files) {
        const std::string text = read_all(path), name = path == "-" ? "stdin" : path;
        if (std::string reason = why_not_text(text, name, "data/tokenize"); !reason.empty())
            fail(reason);
        Job job;
        read_records(text, name, [&](Record record) {
            stop_if_interrupted();
            job.records.push_back(std::move(record));
            if (job.records.size() < 64) return;
            pipeline.push(std::move(job));
            job = {};
        });
        pipeline.push(std::move(job));
        bytes += text.size();
        progress.show(bytes);
    }
    pipeline.close();
    if (examples == 0) fail("there is no record in the input; no shard was written");
    for (int k = 0; k < 2; k++) packers[size_t(k)].finish(), sets[k].finish();
    if (used[0] == 0)
        fail("none of the ", examples, " examples has an answer within ", window,
             " tokens; no shard was written. Use a longer --seq-len");
    const double seconds = progress.seconds();
    stop_if_interrupted();
    tokenizer->chat_template = format.text;
    tokenizer->save(files.new_tokenizer());
    const int removed = files.publish();

    if (removed)
        note(cat("removed ", removed, " shards that an earlier run left under ", options.out));
    if (empty.count) note(empty.text("left out, as their answer is empty"));
    if (too_long.count)
        note(too_long.text(cat("left out, as their prompt alone has ", window, " tokens or more")));
    if (cut.count) note(cut.text(cat("cut to ", window, " tokens")));
    if (options.quiet) return;
    std::ostringstream out;
    out << std::fixed << std::setprecision(1);
    const uint64_t tokens = sets[0].tokens + sets[1].tokens;
    out << examples << " examples by the template " << format.name << ", " << tokens
        << " tokens of " << id.kind << " (vocabulary " << id.vocab_size << ") in windows of "
        << window << "; " << seconds << " s\n  "
        << 100 * double(packers[0].learned + packers[1].learned) / double(tokens)
        << "% of the tokens are learned, "
        << 100 * double(packers[0].padding + packers[1].padding) / double(tokens)
        << "% are padding\n";
    for (int k = 0; k < 2; k++)
        if (!sets[k].shards.empty())
            out << "  " << files.path(sets[k].kind, 0) << (sets[k].shards.size() > 1 ? " ..." : "")
                << ": " << used[k] << " examples in " << packers[size_t(k)].windows << " windows\n";
    out << "  " << options.out << "_tokenizer/\n";
    std::fputs(printable(out.str()).c_str(), stdout);
}

void run(const Options& options) {
    if (options.separator.find('\n') != std::string::npos)
        fail("--doc-separator has a newline, expected the text of one line");
    for (const std::string& path : options.files)
        File file(path); // fail early if one cannot be opened
    std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(options.tokenizer);
    make_folder(options.out);

    PublishedSet files(options.out);
    TokenizerId id = tokenizer->id();
    const int window = options.pad_documents;
    uint64_t shard_tokens = options.shard_tokens;
    if (window) {
        if (window < 2)
            fail("--pad-documents 1 has room for end-of-text only, expected at least 2");
        if (id.eot < 0)
            fail("--pad-documents: the tokenizer '", options.tokenizer,
                 "' has no end-of-text to end and pad documents with");
        if (options.separator.empty() && options.val_fraction > 0)
            fail("--pad-documents needs whole documents, but without --doc-separator validation "
                 "would take a part of one: give the line that ends a document, or "
                 "--val-fraction 0 to make each file a document");
        shard_tokens = std::max<uint64_t>(shard_tokens / uint64_t(window), 1) * uint64_t(window);
    }
    ShardSet sets[2];
    for (int k = 0; k < 2; k++) {
        sets[k].kind = k == 0 ? "train" : "val", sets[k].files = &files;
        sets[k].id = id, sets[k].shard_tokens = shard_tokens, sets[k].window = window;
    }
    uint64_t bytes, documents, forced_cuts, zeros, separators;
    std::atomic<uint64_t> unencodable = 0;
    double seconds;
    {
        Progress progress;
        progress.quiet = options.quiet;
        auto encode = [&](Job& job) {
            for (const Part& part : job.parts) {
                std::string_view text(job.text);
                text = text.substr(part.begin, part.end - part.begin);
                encode_part(*tokenizer, part, text, job.tokens[part.validation], unencodable);
            }
        };
        auto write = [&](Job& job) {
            for (int k = 0; k < 2; k++) sets[k].add(job.tokens[k]);
        };
        Pipeline pipeline(options.threads, encode, write);
        Reader reader{options, *tokenizer, pipeline, progress};
        reader.read_all();
        pipeline.close();
        bytes = reader.bytes, documents = reader.documents, forced_cuts = reader.forced_cuts;
        zeros = reader.zeros, separators = reader.separators;
        if (bytes == 0) fail("there is no text in the input; no shard was written");
        for (ShardSet& set : sets) set.finish();
        if (sets[0].tokens == 0)
            fail("all of the text went to validation. Use a smaller --val-fraction or more text");
        seconds = progress.seconds();
    }
    stop_if_interrupted();
    tokenizer->save(files.new_tokenizer());
    const int removed = files.publish();

    uint64_t tokens = sets[0].tokens + sets[1].tokens;
    if (removed)
        note(cat("removed ", removed, " shards that an earlier run left under ", options.out));
    if (forced_cuts)
        note(cat(forced_cuts,
                 " stretches of 1 MiB had no place to cut, and were cut anyway, perhaps inside a "
                 "word"));
    if (zeros)
        note(cat(zeros, " bytes of the input are 0, which do not occur in text: is it text?"));
    if (unencodable)
        note(cat(unencodable, " bytes have no token in this vocabulary: they became its unknown "
                              "token, or were dropped if it has none"));
    if (options.val_fraction > 0 && sets[1].tokens == 0)
        note(options.separator.empty() || documents > 1
                 ? "the text is too short for validation tokens"
             : separators ? "the text is one document, and the first is never for validation, so "
                            "there are no validation tokens"
                          : "the text is one document, with no line of --doc-separator in it, so "
                            "there are no validation tokens");
    if (options.quiet) return;
    std::ostringstream out;
    out << std::fixed << std::setprecision(2);
    out << documents << (documents == 1 ? " document, " : " documents, ") << bytes << " bytes, "
        << tokens << " tokens of " << id.kind << " (vocabulary " << id.vocab_size << ")";
    if (!window) out << ", " << double(bytes) / double(tokens) << " bytes a token";
    out << "; " << std::setprecision(1) << seconds << " s, " << double(bytes) / 1e6 / seconds
        << " MB/s\n";
    if (window) {
        const double kept = double(sets[0].documents + sets[1].documents);
        out << "  windows of " << window << ", a document each: "
            << 100 * double(sets[0].documents_cut + sets[1].documents_cut) / kept
            << "% of the documents are longer and cut, "
            << 100 * double(sets[0].padding + sets[1].padding) / double(tokens)
            << "% of the tokens are padding\n";
    }
    for (const ShardSet& set : sets)
        if (!set.shards.empty())
            out << "  " << files.path(set.kind, 0) << (set.shards.size() > 1 ? " ..." : "") << ": "
                << set.tokens << " tokens in " << set.shards.size()
                << (set.shards.size() == 1 ? " shard\n" : " shards\n");
    out << "  " << options.out << "_tokenizer/\n";
    std::fputs(printable(out.str()).c_str(), stdout);
}

} // namespace
} // namespace lns

int main(int argc, char** argv) {
    lns::prepare_process();
    lns::Options options;
    options.threads = lns::default_threads();
    std::string shard_tokens = "100M";
    CLI::App app("Turns text files into shards of tokens for train_gpt (and llm.c).");
    app.option_defaults()->always_capture_default();
    app.add_option("files", options.files, "Text files; - or none: stdin")->type_name("FILE");
    app.add_option("-o,--out", options.out,
                   "Write PREFIX_train_000000.bin ..., PREFIX_val_000000.bin ... and "
                   "PREFIX_tokenizer/; existing ones are replaced")
        ->required()
        ->type_name("PREFIX")
        ->always_capture_default(false);
    app.add_option(
           "--tokenizer", options.tokenizer,
           "bytes; gpt2:DIR, with encoder.json and vocab.bpe or vocab.json and merges.txt; a "
           "SentencePiece FILE.model; a tokenizer.json of Hugging Face; or a directory with one of "
           "these and its tokenizer_config.json")
        ->type_name("SPEC");
    app.add_option(
           "--doc-separator", options.separator,
           "A line that ends a document (such as <|endoftext|>) and is not part of the text; "
           "without it, every file is one document. The tokenizer's end-of-text follows "
           "each document")
        ->type_name("STR");
    app.add_option("--val-fraction", options.val_fraction,
                   "Fraction of the text for validation: with separators, evenly spread documents; "
                   "otherwise the end of the text, or evenly spread blocks of 64 KiB of a pipe of "
                   "more than 4 MiB")
        ->check([](const std::string& text) -> std::string {
            char* end;
            double x = std::strtod(text.c_str(), &end);
            if (!text.empty() && !*end && x >= 0 && x <= 0.99) return "";
            return lns::cat("'", text, "' is not a number from 0 to 0.99");
        })
        ->type_name("X");
    app.add_option(
           "--pad-documents", options.pad_documents,
           "Make each document a window of N tokens: longer ones are cut to N - 1 tokens and "
           "end-of-text, shorter ones padded; train_gpt --seq-len N ignores the padding; "
           "0: concatenate documents")
        ->check(CLI::Range(0, 1 << 24))
        ->type_name("N");
    app.add_flag("--instructions", options.instructions,
                 "The files are records of instructions and answers, in JSON Lines or one JSON "
                 "list: instruction, input (optional) and output; prompt and completion; or "
                 "messages, a list of role and content. Windows of --seq-len tokens, with a mask: "
                 "answers are learned, the rest is context");
    app.add_option("--template", options.format,
                   "How a conversation becomes text: alpaca, chatml, llama-3, plain, a FILE of "
                   "Jinja, or a folder with a tokenizer_config.json; default: the one in the "
                   "tokenizer's folder, else alpaca")
        ->type_name("NAME")
        ->needs("--instructions")
        ->always_capture_default(false);
    app.add_option("--seq-len", options.examples.window,
                   "Tokens of a window of instructions; longer examples are cut at the end")
        ->check(CLI::Range(2, 1 << 24))
        ->needs("--instructions")
        ->type_name("N");
    app.add_flag("--pack", options.examples.pack,
                 "Several examples a window, of which later ones see the earlier ones; without "
                 "it, one, and padding")
        ->needs("--instructions");
    app.add_flag("--train-on-prompt", options.examples.learn_all,
                 "Learn prompts as well as answers")
        ->needs("--instructions");
    app.add_option("--shard-tokens", shard_tokens, "Tokens per shard, such as 5000000, 500k, 100M")
        ->type_name("N");
    app.add_option("--threads", options.threads, "Encoding threads; they do not affect the result")
        ->check(CLI::Range(1, 1024));
    app.add_flag("-q,--quiet", options.quiet, "Print no progress and no summary");
    return lns::run_tool("tokenize", app, argc, argv, [&] {
        options.tokenizer = lns::expand_home_in_tokenizer(options.tokenizer);
        options.out = lns::expand_home(options.out);
        options.format = lns::expand_home(options.format);
        if (options.instructions && (!options.separator.empty() || options.pad_documents))
            lns::fail("--instructions has windows of its own: leave out --doc-separator and "
                      "--pad-documents");
        for (std::string& file : options.files) file = lns::expand_home(file);
        options.shard_tokens = uint64_t(lns::parse_count(shard_tokens));
        if (options.shard_tokens == 0)
            lns::fail("--shard-tokens 0: a shard needs at least 1 token");
        if (options.shard_tokens > lns::max_shard_tokens)
            lns::fail("--shard-tokens ", shard_tokens,
                      " is more than a shard can count, expected at "
                      "most ",
                      lns::max_shard_tokens);
        if (options.files.empty()) {
            options.files = {"-"};
            if (isatty(STDIN_FILENO)) std::fputs("tokenize: reading from the terminal\n", stderr);
        }
        struct sigaction action {};
        action.sa_handler = [](int) {
            lns::interrupted = 1;
        }; // without SA_RESTART: read(2) returns
        sigaction(SIGINT, &action, nullptr);
        sigaction(SIGTERM, &action, nullptr);
        if (options.instructions)
            lns::run_instructions(options);
        else
            lns::run(options);
    });
}
