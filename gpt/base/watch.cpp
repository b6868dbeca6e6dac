#include "gpt/base/watch.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <random>

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "gpt/base/clock.h"
#include "gpt/base/error.h"
#include "gpt/base/signals.h"
#include "gpt/base/terminal.h"

namespace lns {

namespace {

// The messages: a letter, and of `advice` its length and text behind it.
constexpr char computes = 'c', waits = 'w', leaves = 'l', ends = 'e', advises = 'a';

struct Hello {
    uint64_t key;
    int32_t rank, process;
    char host[64];
};

bool ready(int fd, short events, double seconds) {
    pollfd p = {fd, events, 0};
    return poll(&p, 1, int(std::ceil(1000 * seconds))) > 0;
}

bool receive_all(int fd, void* data, size_t bytes, double seconds) {
    char* to = static_cast<char*>(data);
    for (const double until = now() + seconds; bytes > 0;) {
        if (!ready(fd, POLLIN, std::max(0.0, until - now()))) return false;
        const ssize_t n = recv(fd, to, bytes, 0);
        if (n <= 0) return false;
        to += n, bytes -= size_t(n);
    }
    return true;
}

int new_socket() { return socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0); }

void make_ready(int fd) {
    const int yes = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

sockaddr_in address_of(uint32_t ipv4, uint16_t port) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = ipv4;
    address.sin_port = port;
    return address;
}

// -1 unless it answers within a second.
int connect_to(uint32_t ipv4, uint16_t port) {
    const int fd = new_socket();
    if (fd < 0) return -1;
    make_ready(fd);
    const sockaddr_in address = address_of(ipv4, port);
    int error = 0;
    socklen_t length = sizeof error;
    if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ||
        (errno == EINPROGRESS && ready(fd, POLLOUT, 1) &&
         getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0))
        return fd;
    close(fd);
    return -1;
}

} // namespace

double rank_timeout() {
    const char* text = std::getenv("LNS_RANK_TIMEOUT");
    if (!text || !*text) return 20;
    char* end;
    const double seconds = std::strtod(text, &end);
    if (*end || !(seconds == 0 || (seconds >= 1 && seconds <= 86400)))
        fail("LNS_RANK_TIMEOUT is '", printable(text),
             "', expected seconds from 1 to 86400, or 0 to never give up a rank");
    return seconds;
}

Watch::~Watch() {
    if (thread.joinable()) {
        {
            std::lock_guard lock(mutex);
            stopping = true;
        }
        if (write(wake[1], "x", 1) < 0) {
        }
        thread.join();
    }
    for (const Peer& peer : peers)
        if (peer.fd >= 0) close(peer.fd);
    for (int fd : {listener, wake[0], wake[1]})
        if (fd >= 0) close(fd);
}

MeetingPoint Watch::open(double seconds, bool all_here) {
    MeetingPoint point;
    point.timeout = timeout = seconds;
    std::random_device random;
    point.key = key = uint64_t(random()) << 32 | random();
    point.addresses[point.count++] = htonl(INADDR_LOOPBACK);
    sockaddr_in address = address_of(htonl(all_here ? INADDR_LOOPBACK : INADDR_ANY), 0);
    socklen_t length = sizeof address;
    listener = new_socket();
    if (listener < 0 ||
        bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
        listen(listener, size) != 0 ||
        getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length) != 0)
        return point;
    point.port = address.sin_port;
    ifaddrs* all = nullptr;
    if (all_here || getifaddrs(&all) != 0) return point;
    for (const ifaddrs* i = all; i && point.count < 8; i = i->ifa_next)
        if (i->ifa_addr && i->ifa_addr->sa_family == AF_INET && !(i->ifa_flags & IFF_LOOPBACK))
            point.addresses[point.count++] =
                reinterpret_cast<const sockaddr_in*>(i->ifa_addr)->sin_addr.s_addr;
    freeifaddrs(all);
    return point;
}

std::vector<char> Watch::accept_all() {
    std::vector<char> reached(size_t(size), 0);
    reached[0] = 1;
    const double until = now() + 10;
    while (listener >= 0 && int(peers.size()) < size - 1 && now() < until) {
        if (!ready(listener, POLLIN, until - now())) continue;
        const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        if (fd < 0) continue;
        Hello hello;
        if (!receive_all(fd, &hello, sizeof hello, 1) || hello.key != key || hello.rank <= 0 ||
            hello.rank >= size || reached[size_t(hello.rank)] ||
            ::send(fd, &key, sizeof key, MSG_NOSIGNAL) != sizeof key) {
            close(fd);
            continue;
        }
        make_ready(fd);
        hello.host[sizeof hello.host - 1] = 0;
        reached[size_t(hello.rank)] = 1;
        Peer peer;
        peer.fd = fd, peer.rank = hello.rank;
        peer.name = cat("rank ", hello.rank, " (process ", hello.process, " on ",
                        printable(hello.host), ")");
        peers.push_back(peer);
    }
    close(listener);
    listener = -1;
    return reached;
}

void Watch::connect(const MeetingPoint& point, bool here) {
    timeout = point.timeout;
    // The first address is of rank 0's own machine only.
    for (int i = here ? 0 : 1; point.port && i < (here ? 1 : point.count); i++) {
        const int fd = connect_to(point.addresses[i], point.port);
        if (fd < 0) continue;
        Hello hello = {};
        hello.key = point.key, hello.rank = rank, hello.process = int32_t(getpid());
        gethostname(hello.host, sizeof hello.host - 1);
        uint64_t answer = 0;
        if (::send(fd, &hello, sizeof hello, MSG_NOSIGNAL) == sizeof hello &&
            receive_all(fd, &answer, sizeof answer, 5) && answer == point.key) {
            Peer peer;
            peer.fd = fd, peer.name = "rank 0";
            peers.push_back(peer);
            return;
        }
        close(fd);
    }
}

void Watch::start(const std::vector<char>& reached) {
    if (rank != 0 && !reached[size_t(rank)]) { // rank 0 gave up before the answer came
        for (const Peer& peer : peers) close(peer.fd);
        peers.clear();
    }
    if (peers.empty() || pipe2(wake, O_CLOEXEC | O_NONBLOCK) != 0) return;
    sigset_t all, before; // signals are the main thread's
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread = std::thread(&Watch::run, this);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Watch::advise(const std::string& text) {
    std::lock_guard lock(mutex);
    advice = text.substr(0, 16000);
    const uint32_t length = uint32_t(advice.size());
    const std::string bytes(reinterpret_cast<const char*>(&length), sizeof length);
    for (Peer& peer : peers) send(peer, advises + bytes + advice);
}

void Watch::leave() {
    std::lock_guard lock(mutex);
    leaving = true;
    for (Peer& peer : peers) send(peer, {leaves});
}

void Watch::begin_steady(const std::string& what) {
    std::lock_guard lock(mutex);
    steady = what;
    spent = 0;
    began = now();
}

void Watch::end_steady() {
    std::lock_guard lock(mutex);
    double& most = longest[steady];
    most = std::max(most, std::min(now() - began, spent + 2)); // not what it slept through
    steady.clear();
}

void Watch::send(Peer& peer, const std::string& bytes) {
    if (peer.fd < 0 || peer.deaf) return;
    const ssize_t n = ::send(peer.fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n != ssize_t(bytes.size())) peer.deaf = true;
}

void Watch::hear(Peer& peer) {
    char bytes[4096];
    ssize_t n;
    while ((n = recv(peer.fd, bytes, sizeof bytes, MSG_DONTWAIT)) > 0) {
        peer.silent = 0;
        peer.received.append(bytes, size_t(n));
    }
    const bool closed = n == 0 || (errno != EAGAIN && errno != EINTR);
    size_t at = 0;
    for (const std::string& in = peer.received; at < in.size(); at++) {
        const char letter = in[at];
        if (letter == computes || letter == waits) peer.waits = letter == waits;
        if (letter == leaves) peer.left = true;
        if (letter == ends) quit(); // another rank has told why
        if (letter != advises) continue;
        uint32_t length;
        if (in.size() < at + 1 + sizeof length) break;
        std::memcpy(&length, &in[at + 1], sizeof length);
        if (in.size() < at + 1 + sizeof length + length) break;
        std::lock_guard lock(mutex);
        advice = in.substr(at + 1 + sizeof length, length);
        at += sizeof length + length;
    }
    peer.received.erase(0, at);
    if (!closed) return;
    if (!peer.left)
        end(cat(peer.name, " has ended without a word: it was killed (for want of memory?), it "
                           "crashed, or its machine is gone"));
    std::lock_guard lock(mutex); // the main thread may be sending
    close(peer.fd);
    peer.fd = -1;
}

void Watch::check_steady(double elapsed) {
    std::string sentence;
    {
        std::lock_guard lock(mutex);
        if (steady.empty()) return;
        spent += elapsed;
        // The first also compiles, tunes and allocates: half an hour of the usual 20 seconds.
        const auto known = longest.find(steady);
        const bool first = known == longest.end();
        if (spent < (first ? 90 * timeout : timeout + 10 * known->second)) return;
        sentence = cat(
            steady, " has taken ", format_duration(spent),
            first ? "" : cat(", and the longest before ", format_duration(known->second)), ": ");
    }
    std::string busy;
    if (!waiting) busy = cat("rank ", rank);
    for (const Peer& peer : peers)
        if (peer.fd >= 0 && !peer.waits) busy += (busy.empty() ? "" : ", ") + peer.name;
    end(sentence +
        (busy.empty() ? "the ranks wait for each other"
                      : "it does not come to its end on " + busy) +
        " (does a GPU hang, or the network?)");
}

void Watch::end(const std::string& sentence) {
    // What several ranks find is told by one of them: it ends the others while they wait.
    if (rank > 1) sleep(3);
    std::string text = cat("train_gpt: ", rank == 0 ? "" : cat("rank ", rank, ": "), sentence,
                           ". All ranks end. ");
    {
        std::lock_guard lock(mutex);
        text += (advice.empty() ? "Nothing was written yet: start them again" : advice) + "\n";
    }
    if (write(STDERR_FILENO, text.data(), text.size()) < 0) {
    }
    pass_on_the_end();
    std::_Exit(1);
}

// A launcher that is asked to stop may kill the ranks a second later.
void Watch::tell_of_the_stop() {
    std::lock_guard lock(mutex);
    if (leaving || advice.empty()) return;
    const std::string text =
        cat("stopping; if the launcher kills the ranks before they have saved: ", advice, "\n");
    if (write(STDERR_FILENO, text.data(), text.size()) < 0) {
    }
}

void Watch::quit() {
    pass_on_the_end();
    sleep(3);
    std::_Exit(1);
}

void Watch::pass_on_the_end() {
    std::lock_guard lock(mutex);
    for (Peer& peer : peers) send(peer, {ends});
}

void Watch::run() {
    const double interval = std::min(1.0, timeout / 8);
    double last = now(), beat = 0; // seconds since the last beat
    double asked = 0;              // seconds since a stop was asked for; -1: told
    for (;;) {
        std::vector<pollfd> fds = {{wake[0], POLLIN, 0}};
        for (const Peer& peer : peers) fds.push_back({peer.fd, POLLIN, 0}); // -1 is passed over
        const double pause = std::clamp(interval - beat, 0.01, 0.2);
        poll(fds.data(), nfds_t(fds.size()), int(1000 * pause));
        {
            std::lock_guard lock(mutex);
            if (stopping) return;
        }
        const double elapsed = std::min(now() - last, 2 * interval);
        last = now();
        for (Peer& peer : peers) {
            if (peer.fd < 0) continue;
            peer.silent += elapsed;
            hear(peer);
            if (peer.fd >= 0 && peer.silent > timeout)
                end(cat(peer.name, " has not answered for ", timeout, " s",
                        ": it is stopped, or its machine or the network to it hangs"));
        }
        check_steady(elapsed);
        if (rank == 0 && asked >= 0 && stop_requested() && (asked += elapsed) > 0.4) {
            tell_of_the_stop();
            asked = -1;
        }
        beat += elapsed;
        if (beat < 0.99 * interval) continue;
        beat = 0;
        std::lock_guard lock(mutex);
        for (Peer& peer : peers) send(peer, {waiting ? waits : computes});
    }
}

} // namespace lns
