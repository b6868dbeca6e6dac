// Detects ranks that died or hang. MPI and NCCL wait forever, so a thread of each rank keeps a TCP
// connection (IPv4) for heartbeats: every rank to rank 0, and rank 0 to every rank. If a rank ends
// unannounced, or is silent for the timeout, all others end with a message that says how to
// continue. So they do if a step takes far longer than any before: heartbeats continue while a GPU
// hangs.
//
// Time counts only while this process itself runs: ranks that were suspended together, or slept
// with their laptop, continue.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace lns {

// The timeout in seconds: LNS_RANK_TIMEOUT, or 20; 0 disables watching. Throws if it is invalid.
double rank_timeout();

// How to reach rank 0: plain bytes that rank 0 broadcasts.
struct Rendezvous {
    double timeout = 0; // the same on all ranks
    uint64_t key = 0;   // random, to reject other connections
    uint32_t addresses[8] = {};
    int count = 0;
    uint16_t port = 0; // 0: no network
};

class Watch {
  public:
    Watch(int rank, int size) : rank(rank), size(size) {}
    ~Watch(); // stops watching
    Watch(const Watch&) = delete;
    Watch& operator=(const Watch&) = delete;

    // On rank 0: listens. same_host: all ranks are on this machine, so loopback suffices.
    Rendezvous open(double timeout, bool same_host);
    // On rank 0, after the broadcast: accepts connections for up to ten seconds. Returns for each
    // rank whether it connected.
    std::vector<char> accept_all();
    // On the other ranks. same_host: rank 0 is on this machine.
    void connect(const Rendezvous& rendezvous, bool same_host);
    // On every rank: starts to watch the connected ones.
    void start(const std::vector<char>& connected);

    // On rank 0: sets the advice that any rank prints when it loses another.
    void set_advice(const std::string& text);
    // Announces that this rank ends normally.
    void leave();

    std::atomic<bool> waiting{false}; // for the other ranks, in a collective
    // Enclose work that takes about the same time on every call, except the first.
    void begin_section(const std::string& what);
    void end_section();

  private:
    struct Peer {
        int fd = -1, rank = 0;
        std::string name; // "rank 1 (process 123 on HOST)"
        std::string received;
        double silence = 0; // seconds since its last message
        bool left = false, waiting = false;
        bool blocked = false; // it no longer reads, and is sent nothing more
    };

    void run();
    void receive(Peer& peer);
    void send(Peer& peer, const std::string& bytes);
    void check_section(double elapsed);
    [[noreturn]] void fail_all(const std::string& reason);
    [[noreturn]] void quit();
    void broadcast_end();
    void print_stop_advice();

    int rank, size;
    double timeout = 0;
    uint64_t key = 0;
    int listener = -1, wake[2] = {-1, -1};
    std::vector<Peer> peers;
    std::thread thread;

    std::mutex mutex; // guards sending, and everything below
    std::string advice;
    bool leaving = false, stopping = false;
    std::string section; // the section under way, or ""
    double spent = 0, began = 0;
    std::map<std::string, double> longest;
};

} // namespace lns
