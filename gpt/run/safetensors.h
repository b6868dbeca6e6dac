// The safetensors format: 8 bytes of little-endian header length, a JSON header, the tensors' bytes
// (https://github.com/huggingface/safetensors). A file is validated as a whole before any tensor is
// used: lengths, types, shapes against sizes, and offsets that cover the data without holes or
// overlaps. Scalars are little-endian; a view may be unaligned in files that others wrote.
//
// Files that we write carry checksums (gpt/base/checksum.h) in their metadata: "xxh3:NAME" of each
// tensor's bytes, and "xxh3" of everything else that the header says. Where they are, they are
// checked: the header's when the file is opened, a tensor's whenever it is read.
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

// Bytes of one element of "F64", "F32", "BF16", "I64", "U8", "BOOL", …; 0 if there is no such type.
size_t dtype_bytes(const std::string& dtype);

// A tensor that lies in memory, row-major; [] is the shape of a scalar.
struct TensorView {
    std::string name, dtype;
    std::vector<int64_t> shape;
    const void* data = nullptr;
    size_t bytes = 0;
    std::optional<uint64_t> checksum = {}; // of its bytes, in a file that says it
};

// A tensor whose bytes are made as they are written: produce calls sink once or often (it is
// buffered) with exactly as many bytes as dtype and shape say.
using TensorSink = std::function<void(const void* data, size_t bytes)>;
struct TensorOut {
    std::string name, dtype;
    std::vector<int64_t> shape;
    std::function<void(const TensorSink& sink)> produce;
};
TensorOut tensor_out(const TensorView& view);

// Writes the file whole or not at all (AtomicFile). Larger types go first, so that every tensor is
// aligned; otherwise the order is kept.
void write_safetensors(const std::string& path, const std::vector<TensorOut>& tensors,
                       const std::map<std::string, std::string>& metadata = {});
void write_safetensors(const std::string& path, const std::vector<TensorView>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

// A file, mapped into memory for as long as this lives.
class Safetensors {
  public:
    explicit Safetensors(const std::string& path);
    Safetensors(const Safetensors&) = delete;
    Safetensors& operator=(const Safetensors&) = delete;

    const std::string& path() const { return path_; }
    const std::vector<TensorView>& tensors() const { return tensors_; } // as they lie in the file
    // Without the checksums.
    const std::map<std::string, std::string>& metadata() const { return metadata_; }
    // Of names, types, shapes, metadata and the tensors' checksums; absent if others wrote the
    // file.
    std::optional<uint64_t> checksum() const { return checksum_; }
    const TensorView* find(const std::string& name) const; // nullptr if absent
    const TensorView& at(const std::string& name) const;   // throws, naming the file

    // All elements, converted from F64, F32, F16 or BF16, by all threads. Throws if the type is
    // another or the bytes are damaged.
    void read_f32(const TensorView& view, float* out) const;
    void read_f64(const TensorView& view, double* out) const;
    // Throws if the tensor's bytes are not those that were written.
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
};

} // namespace lns
