// The safetensors format: 8 bytes of little-endian header length, a JSON header, the tensors' bytes
// (https://github.com/huggingface/safetensors). Opening a file validates it: lengths, types, shapes
// against sizes, and offsets that cover the data without holes or overlaps. Scalars are
// little-endian; tensors may be unaligned in foreign files.
//
// Files written here carry checksums (gpt/base/checksum.h) in their metadata: "xxh3:NAME" for each
// tensor's bytes and "xxh3" for the rest of the header. If present, they are checked: the header's
// when the file is opened, a tensor's whenever it is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "gpt/base/mapped.h"

namespace lns {

// Bytes per element of "F64", "F32", "BF16", "I64", "U8", "BOOL", …; 0 for an unknown type.
size_t dtype_bytes(const std::string& dtype);

// A tensor in memory, row-major; a scalar's shape is [].
struct TensorView {
    std::string name, dtype;
    std::vector<int64_t> shape;
    const void* data = nullptr;
    size_t bytes = 0;
    std::optional<uint64_t> checksum = {}; // of its bytes, if its file has one
};

// A tensor whose bytes are produced while it is written: produce calls sink, which is buffered, one
// or more times, with exactly the bytes that dtype and shape imply in total.
using TensorSink = std::function<void(const void* data, size_t bytes)>;
struct TensorOut {
    std::string name, dtype;
    std::vector<int64_t> shape;
    std::function<void(const TensorSink& sink)> produce;
};
TensorOut tensor_out(const TensorView& view);

// Writes the file atomically. Larger types go first, so that every tensor is aligned; otherwise
// the order is kept.
void write_safetensors(const std::string& path, const std::vector<TensorOut>& tensors,
                       const std::map<std::string, std::string>& metadata = {});
void write_safetensors(const std::string& path, const std::vector<TensorView>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

// A memory-mapped file. A tensor takes memory while it is read, no longer.
class Safetensors {
  public:
    explicit Safetensors(const std::string& path);
    Safetensors(const Safetensors&) = delete;
    Safetensors& operator=(const Safetensors&) = delete;

    const std::string& path() const { return path_; }
    const std::vector<TensorView>& tensors() const { return tensors_; } // in the file's order
    const std::map<std::string, std::string>& metadata() const { return metadata_; } // no checksums
    // Covers names, types, shapes, metadata and the tensors' checksums; absent in foreign files.
    std::optional<uint64_t> checksum() const { return checksum_; }
    const TensorView* find(const std::string& name) const; // nullptr if absent
    const TensorView& at(const std::string& name) const;   // throws, naming the file

    // Converts all elements from F64, F32, F16 or BF16 with all threads. Throws for other types and
    // damaged bytes.
    void read_f32(const TensorView& view, float* out) const;
    void read_f64(const TensorView& view, double* out) const;
    // Throws if the tensor's bytes do not match its checksum.
    void check(const TensorView& view) const;

  private:
    std::string path_;
    MappedFile file_;
    std::vector<TensorView> tensors_;
    std::map<std::string, size_t> index_;
    std::map<std::string, std::string> metadata_;
    std::optional<uint64_t> checksum_;
    void parse();
    void take_checksums();
    void finish(const TensorView& view, bool intact) const; // after its bytes were read
};

} // namespace lns
