// Whether the other ranks are still alive. MPI and NCCL wait for a rank for ever, so a thread of
// each rank keeps a connection of its own (TCP, IPv4): every rank beats to rank 0, and rank 0 to
// every rank. A rank whose process ends without a word, or that is silent for the timeout, ends all
// others with a sentence that says how to go on. So does a step that takes far longer than any
// before it: its process beats, and its GPU hangs.
//
// Time counts only while this process runs itself: ranks that were all stopped together, or slept
// with their laptop, go on.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace lns {

// Seconds of silence that end a run: LNS_RANK_TIMEOUT, or 20; 0: nobody watches. Throws if the
// variable is no such number.
double rank_timeout();

// Where rank 0 is reached: plain bytes, for rank 0 to broadcast.
struct MeetingPoint {
    double timeout = 0; // of all ranks
    uint64_t key = 0;   // of this start, so that strangers are turned away
    uint32_t addresses[8] = {};
    int count = 0;
    uint16_t port = 0; // 0: there is no network to meet on
};

class Watch {
  public:
    Watch(int rank, int size) : rank(rank), size(size) {}
    ~Watch(); // stops watching
    Watch(const Watch&) = delete;
    Watch& operator=(const Watch&) = delete;

    // On rank 0. all_here: the ranks are on this machine, and no other need reach it.
    MeetingPoint open(double timeout, bool all_here);
    // On rank 0, after the broadcast: takes the others' connections. One byte a rank: 1 if it came
    // within ten seconds.
    std::vector<char> accept_all();
    // On the other ranks. here: rank 0 is on this machine.
    void connect(const MeetingPoint& point, bool here);
    // On every rank, when all know who was reached: begins to watch those.
    void start(const std::vector<char>& reached);

    // From rank 0 to all: what a rank that finds another gone tells the user to do.
    void advise(const std::string& text);
    // This rank is about to end as it should.
    void leave();

    std::atomic<bool> waiting{false}; // in a collective, for the others
    // Around work that takes about as long each time, the first apart.
    void begin_steady(const std::string& what);
    void end_steady();

  private:
    struct Peer {
        int fd = -1, rank = 0;
        std::string name; // "rank 1 (process 123 on HOST)"
        std::string received;
        double silent = 0; // seconds
        bool left = false, waits = false;
        bool deaf = false; // its end of the connection is full: it is sent no more
    };

    void run();
    void hear(Peer& peer);
    void send(Peer& peer, const std::string& bytes);
    void check_steady(double elapsed);
    [[noreturn]] void end(const std::string& sentence);
    [[noreturn]] void quit();
    void pass_on_the_end();
    void tell_of_the_stop();

    int rank, size;
    double timeout = 0;
    uint64_t key = 0;
    int listener = -1, wake[2] = {-1, -1};
    std::vector<Peer> peers;
    std::thread thread;

    std::mutex mutex; // of all below, and of sending
    std::string advice;
    bool leaving = false, stopping = false;
    std::string steady; // what is being done; "": nothing
    double spent = 0, began = 0;
    std::map<std::string, double> longest;
};

} // namespace lns
