// data/get.sh with a small local server: complete, interrupted, resumed and wrong downloads.
#include "dev/test/data_helpers.h"
#include "gpt/data/loader.h"
#include "gpt/data/tokenizer.h"

#include <arpa/inet.h>
#include <cstring>
#include <gtest/gtest.h>
#include <map>
#include <netinet/in.h>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>

using namespace lns;
using namespace lns::test;
namespace fs = std::filesystem;

namespace {

// Serves files by the last part of the path over HTTP/1.0, one connection at a time.
struct Server {
    std::map<std::string, std::string> files, headers; // headers: additional ones, by file
    std::map<std::string, size_t> stop_after;          // once: closes after this many bytes
    bool ranges = true;
    std::vector<std::string> requests; // name, or "name@from" for a range

    Server() {
        listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        sockaddr_in address{};
        address.sin_family = AF_INET;
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t size = sizeof address;
        if (bind(listener, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
            listen(listener, 8) != 0 ||
            getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) != 0)
            fail("cannot listen on loopback");
        url = cat("http://127.0.0.1:", ntohs(address.sin_port));
        thread = std::thread([this] {
            for (int client; (client = accept(listener, nullptr, nullptr)) >= 0; close(client))
                serve(client);
        });
    }
    ~Server() {
        shutdown(listener, SHUT_RDWR);
        thread.join();
        close(listener);
    }

    void serve(int client) {
        std::string request;
        char block[1024];
        while (request.find("\r\n\r\n") == std::string::npos) {
            ssize_t n = recv(client, block, sizeof block, 0);
            if (n <= 0) return;
            request.append(block, size_t(n));
        }
        std::string path = request.substr(4, request.find(' ', 4) - 4),
                    name = path.substr(path.rfind('/') + 1);
        size_t from = 0, range = request.find("Range: bytes=");
        if (range != std::string::npos && ranges) from = std::stoull(request.substr(range + 13));
        requests.push_back(
            range == std::string::npos
                ? name
                : cat(name, "@",
                      request.substr(range + 13, request.find('-', range) - range - 13)));
        auto found = files.find(name);
        std::string reply;
        if (found == files.end()) {
            reply = "HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n";
        } else if (from >= found->second.size() && from > 0) {
            reply = cat("HTTP/1.0 416 Range Not Satisfiable\r\nContent-Range: bytes */",
                        found->second.size(), "\r\n\r\n");
        } else {
            std::string body = found->second.substr(from);
            reply = from ? cat("HTTP/1.0 206 Partial Content\r\nContent-Range: bytes ", from, "-",
                               found->second.size() - 1, "/", found->second.size(), "\r\n")
                         : "HTTP/1.0 200 OK\r\n";
            reply += cat("Content-Length: ", body.size(), "\r\n", headers[name], "\r\n");
            if (stop_after.count(name)) {
                body.resize(stop_after[name]);
                stop_after.erase(name);
            }
            reply += body;
        }
        for (size_t sent = 0; sent < reply.size();) {
            ssize_t n = send(client, reply.data() + sent, reply.size() - sent, MSG_NOSIGNAL);
            if (n <= 0) return;
            sent += size_t(n);
        }
    }

    std::string url;

  private:
    int listener;
    std::thread thread;
};

struct GetScript : testing::Test {
    TemporaryDirectory dir;
    Server server;
    std::string tokenize =
        std::getenv("LNS_TOKENIZE") ? std::getenv("LNS_TOKENIZE") : "data/tokenize";
    void SetUp() override {
        for (const char* program : {"curl", "jq", "gzip"})
            if (run(cat("command -v ", program)).status != 0)
                GTEST_SKIP() << program << " is not installed here";
        if (fs::exists(tokenize)) return;
#ifdef __SANITIZE_ADDRESS__
        GTEST_SKIP() << "data/tokenize is not built here";
#else
        FAIL() << "there is no " << tokenize << ": run make data/tokenize first";
#endif
    }
    Finished get(const std::string& arguments) {
        return run("http_proxy= all_proxy= LNS_RETRY_SECONDS=0 LNS_MIRROR=" + server.url +
                   " LNS_TOKENIZE='" + fs::absolute(tokenize).string() + "' data/get.sh " +
                   arguments);
    }
    std::string got(const std::string& arguments) {
        Finished finished = get(arguments);
        EXPECT_EQ(finished.status, 0) << finished.output;
        return finished.output;
    }
    std::string failed(const std::string& arguments) {
        Finished finished = get(arguments);
        EXPECT_EQ(finished.status, 1) << finished.output;
        return finished.output;
    }
    std::string text(const std::string& pattern) {
        ShardSource source(dir / pattern);
        std::vector<int> tokens(source.size());
        source.read(0, tokens.size(), tokens.data());
        return load_tokenizer("bytes")->decode(tokens);
    }
};

std::string stories(const std::string& about, int n) {
    std::string text;
    for (int i = 0; i < n; i++) text += cat("Once there was ", about, " ", i, ".\n<|endoftext|>\n");
    return text;
}

std::string without_separators(std::string text) {
    for (size_t at; (at = text.find("<|endoftext|>\n")) != std::string::npos;) text.erase(at, 14);
    return text;
}

// A handmade llm.c shard.
std::string ready_shard(int count) {
    std::string bytes(1024 + 2 * size_t(count), '\0');
    const int32_t words[] = {20240520, 1, count};
    std::memcpy(bytes.data(), words, sizeof words);
    return bytes;
}

// The file's SHA-256 as in Hugging Face's headers.
std::string linked_sum(const std::string& bytes) {
    TemporaryDirectory dir;
    write_bytes(dir / "x", bytes);
    return "X-Linked-ETag: \"" + run("sha256sum " + dir / "x").output.substr(0, 64) + "\"\r\n";
}

} // namespace

TEST_F(GetScript, FetchesAndTokenizes) {
    std::string train = stories("a fox", 5000), valid = stories("a dog", 50);
    server.files = {{"TinyStoriesV2-GPT4-train.txt", train},
                    {"TinyStoriesV2-GPT4-valid.txt", valid}};
    std::string output = got("tinystories '" + dir.path + "' --tokenizer bytes");
    EXPECT_TRUE(says(output, {"MB are free", "5000 documents", "Train on it: ./train_gpt"}));
    EXPECT_EQ(text("tinystories_train_*.bin"), without_separators(train));
    EXPECT_EQ(text("tinystories_val_*.bin"), without_separators(valid));
    EXPECT_TRUE(fs::exists(dir / "tinystories_tokenizer"));
    // A second time, nothing is requested.
    server.requests.clear();
    EXPECT_TRUE(says(got("tinystories '" + dir.path + "' --tokenizer bytes"), {"have "}));
    EXPECT_TRUE(server.requests.empty());
}

TEST_F(GetScript, ResumesWhereItStopped) {
    std::string train = stories("a fox", 5000), valid = stories("a dog", 50);
    server.files = {{"TinyStoriesV2-GPT4-train.txt", train},
                    {"TinyStoriesV2-GPT4-valid.txt", valid}};
    // It resumes automatically within a run.
    server.stop_after = {{"TinyStoriesV2-GPT4-train.txt", 70'000}};
    got("tinystories '" + dir.path + "' --tokenizer bytes");
    EXPECT_EQ(text("tinystories_train_*.bin"), without_separators(train));
    EXPECT_EQ(server.requests.back(), "TinyStoriesV2-GPT4-train.txt@70000");

    // In another run, with servers that support ranges and that do not.
    for (bool ranges : {true, false}) {
        server.ranges = ranges;
        TemporaryDirectory other;
        write_bytes(other / "TinyStoriesV2-GPT4-train.txt.part", train.substr(0, 1000));
        got("tinystories '" + other.path + "' --tokenizer bytes");
        EXPECT_EQ(read_bytes(other / "TinyStoriesV2-GPT4-train.txt"), train);
        EXPECT_FALSE(fs::exists(other / "TinyStoriesV2-GPT4-train.txt.part"));
    }

    // Complete except for the name; or longer than the file.
    server.ranges = true;
    for (const std::string& part : {train, train + "more"}) {
        TemporaryDirectory other;
        write_bytes(other / "TinyStoriesV2-GPT4-train.txt.part", part);
        got("tinystories '" + other.path + "' --tokenizer bytes");
        EXPECT_EQ(read_bytes(other / "TinyStoriesV2-GPT4-train.txt"), train);
    }
}

TEST_F(GetScript, RefusesWrongChecksums) {
    server.files = {{"input.txt", "First Citizen:\nNot the text that is expected.\n"}};
    EXPECT_TRUE(
        says(failed("tinyshakespeare '" + dir.path + "'"),
             {"has the SHA-256",
              "expected 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}));
    write_bytes(dir / "tinyshakespeare.txt", "changed afterwards");
    EXPECT_TRUE(says(failed("tinyshakespeare '" + dir.path + "'"),
                     {"tinyshakespeare.txt has the SHA-256"}));
    EXPECT_TRUE(fs::is_empty(dir.path));

    // The server's checksum: correct, and wrong after a part of another file.
    const std::string train = "TinyStoriesV2-GPT4-train.txt",
                      valid = "TinyStoriesV2-GPT4-valid.txt";
    server.files = {{train, stories("a fox", 5000)}, {valid, stories("a dog", 50)}};
    for (const auto& [name, bytes] : server.files) server.headers[name] = linked_sum(bytes);
    got("tinystories '" + dir / "right" + "' --tokenizer bytes");
    fs::create_directories(dir / "wrong");
    write_bytes(dir / "wrong/" + train + ".part", "something else");
    EXPECT_TRUE(
        says(failed("tinystories '" + dir / "wrong" + "' --tokenizer bytes"), {"has the SHA-256"}));
    EXPECT_FALSE(fs::exists(dir / "wrong/" + train));
    got("tinystories '" + dir / "wrong" + "' --tokenizer bytes");
    EXPECT_EQ(read_bytes(dir / "wrong/" + train), server.files[train]);
}

TEST_F(GetScript, C4IsUnpacked) {
    auto packed = [&](const std::string& json) {
        write_bytes(dir / "x", json);
        run("gzip -f " + dir / "x");
        return read_bytes(dir / "x.gz");
    };
    server.files = {
        {"c4-train.00000-of-01024.json.gz", packed(R"({"text":"one \"é\"\nline","url":"u"})"
                                                   "\n"
                                                   R"({"text":"two"})"
                                                   "\n")},
        {"c4-train.00001-of-01024.json.gz", packed(R"({"text":"three"})"
                                                   "\n")},
        {"c4-validation.00000-of-00008.json.gz", packed(R"({"text":"four"})"
                                                        "\n")}};
    got("c4 '" + dir / "c4" + "' --files 2 --tokenizer bytes");
    EXPECT_EQ(text("c4/c4_train_*.bin"), "one \"é\"\nline\ntwo\nthree\n");
    EXPECT_EQ(text("c4/c4_val_*.bin"), "four\n");
    got("c4 '" + dir / "padded" + "' --files 2 --tokenizer bytes --pad-documents 8");
    ShardSource padded(dir / "padded/c4_train_*.bin");
    EXPECT_EQ(padded.window(), 8);
    EXPECT_EQ(padded.size(), 24u); // three documents
    EXPECT_EQ(ShardSource(dir / "padded/c4_val_*.bin").window(), 8);
    // A damaged file leaves no shards that look complete.
    std::string& damaged = server.files["c4-train.00001-of-01024.json.gz"];
    damaged.resize(damaged.size() / 2);
    EXPECT_TRUE(says(failed("c4 '" + dir / "damaged" + "' --files 2 --tokenizer bytes"),
                     {"no shards were made"}));
    EXPECT_FALSE(fs::exists(dir / "damaged/c4_train_000000.bin"));
}

TEST_F(GetScript, ReadyShardsAreChecked) {
    server.files = {{"fineweb_val_000000.bin", ready_shard(100)},
                    {"fineweb_train_000001.bin", ready_shard(300)},
                    {"fineweb_train_000002.bin", ready_shard(200).substr(0, 1200)}};
    EXPECT_TRUE(says(failed("fineweb-10B '" + dir.path + "' --files 2"),
                     {"000002.bin is no shard", "has 1200 bytes"}));
    EXPECT_EQ(ShardSource(dir / "fineweb-10B_train_*.bin").size(), 300u);
    EXPECT_EQ(ShardSource(dir / "fineweb-10B_val_*.bin").size(), 100u);
    EXPECT_TRUE(
        says(failed("fineweb-10B '" + dir.path + "' --tokenizer bytes"), {"cannot be had"}));
}

TEST_F(GetScript, MistakesAreErrors) {
    EXPECT_TRUE(
        says(failed("shakespeare"), {"no data set 'shakespeare', expected tinyshakespeare"}));
    EXPECT_TRUE(says(failed(""), {"Usage:"}));
    EXPECT_TRUE(says(failed("c4 --pad-documents x"), {"needs a number of tokens"}));
    EXPECT_TRUE(says(failed("tinyshakespeare --pad-documents 256"), {"documents"}));
    EXPECT_TRUE(says(failed("c4 --frob"), {"unknown option --frob"}));
    EXPECT_TRUE(says(failed("c4 '" + dir.path + "' --files 2000"),
                     {"--files 2000 is not a number of 1 to 1024"}));
    EXPECT_TRUE(says(failed("c4 '" + dir.path + "' more"), {"found 'more' besides"}));
    EXPECT_TRUE(says(failed("tinyshakespeare '" + dir.path + "'"), {"is refused (HTTP 404)"}));
    EXPECT_TRUE(
        says(run("LNS_TOKENIZE=/none data/get.sh tinyshakespeare '" + dir.path + "'").output,
             {"make data/tokenize"}));
}
