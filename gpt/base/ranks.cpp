#include "gpt/base/ranks.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "gpt/base/error.h"
#include "gpt/base/terminal.h"
#include "gpt/base/watch.h"

#ifdef LNS_MPI
#include <mpi.h>
#endif

namespace lns {

namespace {

// The number of processes, from the environment that launchers set: Open MPI, MPICH and Intel MPI,
// PMIx, Slurm. SLURM_NTASKS will not do: an interactive shell, a single process, has it too.
int launched_size() {
    for (const char* name :
         {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"})
        if (const char* value = std::getenv(name)) return std::max(1, std::atoi(value));
    return std::getenv("PMIX_RANK") ? 2 : 1; // PMIx does not give the number
}

} // namespace

#ifdef LNS_MPI

namespace {

bool mpi_is_running() {
    int initialized = 0, finalized = 0;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    return initialized && !finalized;
}

// Marks this rank as waiting for the others in a collective.
struct Waiting {
    Watch* watch;
    explicit Waiting(Watch* watch) : watch(watch) {
        if (watch) watch->waiting = true;
    }
    ~Waiting() {
        if (watch) watch->waiting = false;
    }
};

// Connects all ranks, and notes unreachable ones. same_host: rank 0 is on this machine.
std::unique_ptr<Watch> start_watch(const Ranks& ranks, bool same_host) {
    const double timeout = rank_timeout();
    auto watch = std::make_unique<Watch>(ranks.rank, ranks.size);
    Rendezvous rendezvous;
    if (ranks.first() && timeout > 0)
        rendezvous = watch->open(timeout, ranks.local_size == ranks.size);
    ranks.broadcast(&rendezvous, sizeof rendezvous);
    if (rendezvous.timeout == 0) return nullptr;
    std::vector<char> connected(size_t(ranks.size), 0);
    if (ranks.first())
        connected = watch->accept_all();
    else
        watch->connect(rendezvous, same_host);
    ranks.broadcast(connected.data(), ranks.size);
    if (const auto lost = std::count(connected.begin(), connected.end(), 0);
        ranks.first() && lost > 0)
        std::fprintf(stderr,
                     "note: %d of %d ranks cannot be reached over TCP (a firewall?): if one of "
                     "them hangs, the others will wait forever\n",
                     int(lost), ranks.size);
    watch->start(connected);
    return watch;
}

} // namespace

Ranks::Ranks() {
    if (launched_size() == 1) return;
    int provided = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Comm local; // the ranks that share memory
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &local);
    MPI_Comm_rank(local, &local_rank);
    MPI_Comm_size(local, &local_size);
    int lowest = rank; // on this machine
    MPI_Bcast(&lowest, 1, MPI_INT, 0, local);
    MPI_Comm_free(&local);
    if (size > 1) watch = start_watch(*this, lowest == 0);
}

Ranks::~Ranks() {
    if (watch) watch->leave();
    if (mpi_is_running()) MPI_Finalize();
}

void Ranks::sum(float* values, int64_t n) const {
    Waiting waiting(watch.get());
    const int64_t chunk = int64_t(1) << 28; // MPI counts are int
    for (int64_t i = 0; size > 1 && i < n; i += chunk)
        MPI_Allreduce(MPI_IN_PLACE, values + i, int(std::min(chunk, n - i)), MPI_FLOAT, MPI_SUM,
                      MPI_COMM_WORLD);
}

void Ranks::sum(double* values, int n) const {
    Waiting waiting(watch.get());
    if (size > 1) MPI_Allreduce(MPI_IN_PLACE, values, n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
}

void Ranks::broadcast(void* data, int bytes) const {
    Waiting waiting(watch.get());
    if (size > 1) MPI_Bcast(data, bytes, MPI_BYTE, 0, MPI_COMM_WORLD);
}

void Ranks::barrier() const {
    Waiting waiting(watch.get());
    if (size > 1) MPI_Barrier(MPI_COMM_WORLD);
}

std::vector<std::string> Ranks::gather(const std::string& mine) const {
    if (size == 1) return {mine};
    Waiting waiting(watch.get());
    const int length = int(mine.size());
    std::vector<int> lengths(size_t(size), 0), starts(size_t(size), 0);
    MPI_Allgather(&length, 1, MPI_INT, lengths.data(), 1, MPI_INT, MPI_COMM_WORLD);
    for (size_t i = 1; i < starts.size(); i++) starts[i] = starts[i - 1] + lengths[i - 1];
    std::string text(size_t(starts.back()) + size_t(lengths.back()), ' ');
    MPI_Allgatherv(mine.data(), length, MPI_CHAR, text.data(), lengths.data(), starts.data(),
                   MPI_CHAR, MPI_COMM_WORLD);
    std::vector<std::string> all;
    for (size_t i = 0; i < starts.size(); i++)
        all.push_back(text.substr(size_t(starts[i]), size_t(lengths[i])));
    return all;
}

void Ranks::abort(int exit_code) const {
    if (watch) watch->leave();
    if (size > 1 && mpi_is_running()) MPI_Abort(MPI_COMM_WORLD, exit_code);
    std::_Exit(exit_code);
}

#else

Ranks::Ranks() {
    if (launched_size() > 1)
        fail("a launcher started several processes, but this build has no MPI: run `make deps "
             "train_gpt`, or start it without mpirun");
}
Ranks::~Ranks() {}
void Ranks::sum(float*, int64_t) const {}
void Ranks::sum(double*, int) const {}
void Ranks::broadcast(void*, int) const {}
void Ranks::barrier() const {}
std::vector<std::string> Ranks::gather(const std::string& mine) const { return {mine}; }
void Ranks::abort(int exit_code) const { std::_Exit(exit_code); }

#endif

double Ranks::sum(double value) const {
    sum(&value, 1);
    return value;
}

bool Ranks::any(bool value) const { return sum(value ? 1.0 : 0.0) > 0; }

void Ranks::set_advice(const std::string& text) const {
    if (watch) watch->set_advice(text);
}

Ranks::TimedSection::TimedSection(const Ranks& ranks, const char* what) : watch(ranks.watch.get()) {
    if (watch) watch->begin_section(what);
}
Ranks::TimedSection::~TimedSection() {
    if (watch) watch->end_section();
}

std::string differences(const std::vector<Facts>& facts) {
    const size_t max_named = 3;
    // Long values are shown from the first word that differs.
    auto shown = [](const std::string& value, const std::string& other) {
        size_t from = 0;
        if (std::max(value.size(), other.size()) > 100) {
            while (from < value.size() && from < other.size() && value[from] == other[from]) from++;
            from = from == 0 ? 0 : value.rfind(' ', from - 1) + 1;
        }
        const std::string part = (from ? "… " : "") + value.substr(from, 100);
        return value.empty() ? "none" : printable(part);
    };
    std::vector<std::string> found; // names
    std::string text;
    size_t more = 0;
    auto differs = [&](size_t rank, const std::string& name, const std::string& its,
                       const std::string& first) {
        if (std::find(found.begin(), found.end(), name) != found.end()) return;
        found.push_back(name);
        if (found.size() > max_named)
            more++;
        else
            text += cat(text.empty() ? "" : "; ", "rank ", rank, " has ", name, " ",
                        shown(its, first), " and rank 0 has ", shown(first, its));
    };
    const std::map<std::string, std::string> first(facts[0].begin(), facts[0].end());
    for (size_t rank = 1; rank < facts.size(); rank++) {
        const std::map<std::string, std::string> its(facts[rank].begin(), facts[rank].end());
        for (const auto& [name, value] : facts[0]) {
            const auto same = its.find(name);
            if (same == its.end() || same->second != value)
                differs(rank, name, same == its.end() ? "" : same->second, value);
        }
        for (const auto& [name, value] : facts[rank])
            if (!first.count(name)) differs(rank, name, value, "");
    }
    return text + (more ? cat("; and ", more, " more") : "");
}

void Ranks::compare(const Facts& mine) const {
    if (size == 1) return;
    std::string text;
    for (const auto& [name, value] : mine) text += name + '\0' + value + '\0';
    std::vector<Facts> all;
    for (const std::string& one : gather(text)) {
        Facts facts;
        for (size_t at = 0; at < one.size();) {
            std::string words[2];
            for (std::string& word : words) {
                word = one.substr(at, one.find('\0', at) - at);
                at += word.size() + 1;
            }
            facts.push_back({words[0], words[1]});
        }
        all.push_back(facts);
    }
    if (const std::string found = differences(all); !found.empty())
        fail("the ranks differ: ", found,
             ". Start all ranks with the same program, flags and files");
}

void CaughtError::share(const Ranks& ranks) const {
    if (ranks.size == 1 && error) std::rethrow_exception(error);
    if (!ranks.any(bool(error))) return;
    std::vector<double> failed(size_t(ranks.size), 0.0);
    failed[size_t(ranks.rank)] = bool(error);
    ranks.sum(failed.data(), int(failed.size()));
    const int first = int(std::find(failed.begin(), failed.end(), 1.0) - failed.begin());
    // The sentence of the first rank with an error, sent as a number per character.
    std::vector<double> characters(1000, 0.0);
    if (first == ranks.rank) try {
            std::rethrow_exception(error);
        } catch (const std::exception& caught) {
            const std::string text = cat("rank ", first, ": ", caught.what());
            for (size_t i = 0; i < std::min(text.size(), characters.size()); i++)
                characters[i] = static_cast<unsigned char>(text[i]);
        }
    ranks.sum(characters.data(), int(characters.size()));
    std::string text;
    for (double c : characters)
        if (c > 0) text += char(c);
    throw SharedError(text);
}

} // namespace lns
