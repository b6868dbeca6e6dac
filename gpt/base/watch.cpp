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

// Messages are one letter; a length and the text follow `advises`.
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

void set_options(int fd) {
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

// A connected socket, or -1 if there is no answer within a second.
int connect_to(uint32_t ipv4, uint16_t port) {
    const int fd = new_socket();
    if (fd < 0) return -1;
    set_options(fd);
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
             "', expected seconds from 1 to 86400, or 0 to wait forever");
    return seconds;
}

Watch::~Watch() {
    if (thread.joinable()) {
        {
            std::lock_guard lock(mutex);
            stopping = true;
        }
        (void)!write(wake[1], "x", 1);
        thread.join();
    }
    for (const Peer& peer : peers)
        if (peer.fd >= 0) close(peer.fd);
    for (int fd : {listener, wake[0], wake[1]})
        if (fd >= 0) close(fd);
}

Rendezvous Watch::open(double seconds, bool same_host) {
    Rendezvous rendezvous;
    rendezvous.timeout = timeout = seconds;
    std::random_device random;
    rendezvous.key = key = uint64_t(random()) << 32 | random();
    rendezvous.addresses[rendezvous.count++] = htonl(INADDR_LOOPBACK);
    sockaddr_in address = address_of(htonl(same_host ? INADDR_LOOPBACK : INADDR_ANY), 0);
    socklen_t length = sizeof address;
    listener = new_socket();
    if (listener < 0 ||
        bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
        listen(listener, size) != 0 ||
        getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length) != 0)
        return rendezvous;
    rendezvous.port = address.sin_port;
    ifaddrs* all = nullptr;
    if (same_host || getifaddrs(&all) != 0) return rendezvous;
    for (const ifaddrs* i = all; i && rendezvous.count < 8; i = i->ifa_next)
        if (i->ifa_addr && i->ifa_addr->sa_family == AF_INET && !(i->ifa_flags & IFF_LOOPBACK))
            rendezvous.addresses[rendezvous.count++] =
                reinterpret_cast<const sockaddr_in*>(i->ifa_addr)->sin_addr.s_addr;
    freeifaddrs(all);
    return rendezvous;
}

std::vector<char> Watch::accept_all() {
    std::vector<char> connected(size_t(size), 0);
    connected[0] = 1;
    const double until = now() + 10;
    while (listener >= 0 && int(peers.size()) < size - 1 && now() < until) {
        if (!ready(listener, POLLIN, until - now())) continue;
        const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        if (fd < 0) continue;
        Hello hello;
        if (!receive_all(fd, &hello, sizeof hello, 1) || hello.key != key || hello.rank <= 0 ||
            hello.rank >= size || connected[size_t(hello.rank)] ||
            ::send(fd, &key, sizeof key, MSG_NOSIGNAL) != sizeof key) {
            close(fd);
            continue;
        }
        set_options(fd);
        hello.host[sizeof hello.host - 1] = 0;
        connected[size_t(hello.rank)] = 1;
        Peer peer;
        peer.fd = fd, peer.rank = hello.rank;
        peer.name = cat("rank ", hello.rank, " (process ", hello.process, " on ",
                        printable(hello.host), ")");
        peers.push_back(peer);
    }
    close(listener);
    listener = -1;
    return connected;
}

void Watch::connect(const Rendezvous& rendezvous, bool same_host) {
    timeout = rendezvous.timeout;
    // The first address is loopback.
    for (int i = same_host ? 0 : 1; rendezvous.port && i < (same_host ? 1 : rendezvous.count);
         i++) {
        const int fd = connect_to(rendezvous.addresses[i], rendezvous.port);
        if (fd < 0) continue;
        Hello hello = {};
        hello.key = rendezvous.key, hello.rank = rank, hello.process = int32_t(getpid());
        gethostname(hello.host, sizeof hello.host - 1);
        uint64_t answer = 0;
        if (::send(fd, &hello, sizeof hello, MSG_NOSIGNAL) == sizeof hello &&
            receive_all(fd, &answer, sizeof answer, 5) && answer == rendezvous.key) {
            Peer peer;
            peer.fd = fd, peer.name = "rank 0";
            peers.push_back(peer);
            return;
        }
        close(fd);
    }
}

void Watch::start(const std::vector<char>& connected) {
    if (rank != 0 && !connected[size_t(rank)]) { // rank 0 gave up before the answer came
        for (const Peer& peer : peers) close(peer.fd);
        peers.clear();
    }
    if (peers.empty() || pipe2(wake, O_CLOEXEC | O_NONBLOCK) != 0) return;
    sigset_t all, before; // the main thread handles signals
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread = std::thread(&Watch::run, this);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Watch::set_advice(const std::string& text) {
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

void Watch::begin_section(const std::string& what) {
    std::lock_guard lock(mutex);
    section = what;
    spent = 0;
    began = now();
}

void Watch::end_section() {
    std::lock_guard lock(mutex);
    double& most = longest[section];
    most = std::max(most, std::min(now() - began, spent + 2)); // without suspended time
    section.clear();
}

void Watch::send(Peer& peer, const std::string& bytes) {
    if (peer.fd < 0 || peer.blocked) return;
    const ssize_t n = ::send(peer.fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n != ssize_t(bytes.size())) peer.blocked = true;
}

void Watch::receive(Peer& peer) {
    char bytes[4096];
    ssize_t n;
    while ((n = recv(peer.fd, bytes, sizeof bytes, MSG_DONTWAIT)) > 0) {
        peer.silence = 0;
        peer.received.append(bytes, size_t(n));
    }
    const bool closed = n == 0 || (errno != EAGAIN && errno != EINTR);
    size_t at = 0;
    for (const std::string& in = peer.received; at < in.size(); at++) {
        const char letter = in[at];
        if (letter == computes || letter == waits) peer.waiting = letter == waits;
        if (letter == leaves) peer.left = true;
        if (letter == ends) quit(); // another rank has printed why
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
        fail_all(cat(peer.name, " ended unexpectedly: it was killed (out of memory?), it crashed, "
                                "or its machine failed"));
    std::lock_guard lock(mutex); // the main thread may be sending
    close(peer.fd);
    peer.fd = -1;
}

void Watch::check_section(double elapsed) {
    std::string sentence;
    {
        std::lock_guard lock(mutex);
        if (section.empty()) return;
        spent += elapsed;
        // The first call also compiles, tunes and allocates: by default it may take half an hour.
        const auto known = longest.find(section);
        const bool first = known == longest.end();
        if (spent < (first ? 90 * timeout : timeout + 10 * known->second)) return;
        sentence = cat(
            section, " has taken ", format_duration(spent),
            first ? "" : cat(", and the longest before ", format_duration(known->second)), ": ");
    }
    std::string busy;
    if (!waiting) busy = cat("rank ", rank);
    for (const Peer& peer : peers)
        if (peer.fd >= 0 && !peer.waiting) busy += (busy.empty() ? "" : ", ") + peer.name;
    fail_all(sentence +
             (busy.empty() ? "the ranks wait for each other" : "it does not finish on " + busy) +
             " (does a GPU or the network hang?)");
}

void Watch::fail_all(const std::string& reason) {
    // If several ranks notice, only rank 0 or 1 reports: it ends the others while they wait.
    if (rank > 1) sleep(3);
    std::string text =
        cat("train_gpt: ", rank == 0 ? "" : cat("rank ", rank, ": "), reason, ". All ranks end. ");
    {
        std::lock_guard lock(mutex);
        text += (advice.empty() ? "Nothing was written yet: start them again" : advice) + "\n";
    }
    (void)!write(STDERR_FILENO, text.data(), text.size());
    broadcast_end();
    std::_Exit(1);
}

// A launcher that is stopped may kill the ranks a second later.
void Watch::print_stop_advice() {
    std::lock_guard lock(mutex);
    if (leaving || advice.empty()) return;
    const std::string text =
        cat("stopping; if the launcher kills the ranks before they have saved: ", advice, "\n");
    (void)!write(STDERR_FILENO, text.data(), text.size());
}

void Watch::quit() {
    broadcast_end();
    sleep(3);
    std::_Exit(1);
}

void Watch::broadcast_end() {
    std::lock_guard lock(mutex);
    for (Peer& peer : peers) send(peer, {ends});
}

void Watch::run() {
    const double interval = std::min(1.0, timeout / 8);
    double last = now(), beat = 0; // seconds since the last heartbeat
    double stopping_for = 0;       // seconds since a stop was requested; -1: advice printed
    for (;;) {
        std::vector<pollfd> fds = {{wake[0], POLLIN, 0}};
        for (const Peer& peer : peers) fds.push_back({peer.fd, POLLIN, 0}); // poll ignores -1
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
            peer.silence += elapsed;
            receive(peer);
            if (peer.fd >= 0 && peer.silence > timeout)
                fail_all(cat(peer.name, " has not answered for ", timeout,
                             " s: it is stopped, or its machine or the network to it hangs"));
        }
        check_section(elapsed);
        if (rank == 0 && stopping_for >= 0 && stop_requested() && (stopping_for += elapsed) > 0.4) {
            print_stop_advice();
            stopping_for = -1;
        }
        beat += elapsed;
        if (beat < 0.99 * interval) continue;
        beat = 0;
        std::lock_guard lock(mutex);
        for (Peer& peer : peers) send(peer, {waiting ? waits : computes});
    }
}

} // namespace lns
