#include "gpt/run/safetensors.h"

#include "gpt/base/checksum.h"
#include "gpt/base/error.h"
#include "gpt/base/files.h"
#include "gpt/base/json.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <fcntl.h>
#include <set>
#include <sys/stat.h>
#include <tuple>
#include <unistd.h>

static_assert(std::endian::native == std::endian::little, "safetensors is little-endian");

namespace lns {
namespace {

using nlohmann::json;

constexpr uint64_t max_header = 100'000'000; // as in the reference implementation

// Sets bytes to the size of a tensor; false if it overflows 63 bits.
bool tensor_bytes(const std::vector<int64_t>& shape, const std::string& dtype, uint64_t& bytes) {
    int64_t product = int64_t(dtype_bytes(dtype));
    for (int64_t n : shape)
        if (n < 0 || __builtin_mul_overflow(product, n, &product)) return false;
    bytes = uint64_t(product);
    return true;
}

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text;
    for (int64_t n : shape) text += (text.empty() ? "" : ", ") + std::to_string(n);
    return "[" + text + "]";
}

std::string json_string(const std::string& text, const std::string& path) {
    try {
        return json(text).dump();
    } catch (const json::exception&) {
        fail("cannot write ", path, ": a name or value in its header is not UTF-8.");
    }
}

const std::string checksum_key = "xxh3", tensor_checksum_key = "xxh3:";

bool is_checksum_key(const std::string& key) {
    return key == checksum_key || key.starts_with(tensor_checksum_key);
}

// The checksum of a header's contents, independent of their order, so that tools may rewrite it.
uint64_t header_checksum(const std::map<std::string, std::string>& metadata,
                         std::vector<std::tuple<std::string, std::string, std::string, uint64_t>>
                             tensors /* name, dtype, shape, checksum */) {
    std::string text;
    auto add = [&](const std::string& part) { text += cat(part.size(), ' ', part, ' '); };
    for (const auto& [key, value] : metadata)
        if (!is_checksum_key(key)) add(key), add(value);
    std::sort(tensors.begin(), tensors.end());
    for (const auto& [name, dtype, shape, sum] : tensors)
        add(name), add(dtype), add(shape), add(checksum_text(sum));
    return checksum(text);
}

float half_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31,
             mantissa = half & 1023;
    if (exponent == 0) return std::ldexp(float(mantissa), -24) * (sign ? -1.0f : 1.0f);
    exponent =
        exponent == 31 ? 255 : exponent + 112; // infinity and NaN; else the biases' difference
    return std::bit_cast<float>(sign | exponent << 23 | mantissa << 13);
}

// Converts a tensor and returns its checksum, if the file has one to compare with. Goes chunk by
// chunk, so that each is converted while it is in the cache.
template <class Stored, class Out, class Convert>
uint64_t convert(const TensorView& view, Out* out, Convert value_of) {
    const char* from = static_cast<const char*>(view.data);
    const int64_t chunks = int64_t((view.bytes + checksum_chunk - 1) / checksum_chunk);
    std::vector<uint64_t> sums(view.checksum ? size_t(chunks) : 0);
#pragma omp parallel for if (chunks > 7)
    for (int64_t c = 0; c < chunks; c++) {
        const size_t begin = size_t(c) * checksum_chunk;
        const size_t bytes = std::min(checksum_chunk, view.bytes - begin);
        if (view.checksum) sums[size_t(c)] = chunk_checksum(from + begin, bytes);
        Out* to = out + begin / sizeof(Stored);
        for (size_t i = 0; i < bytes / sizeof(Stored); i++) {
            Stored stored;
            std::memcpy(&stored, from + begin + i * sizeof stored, sizeof stored);
            to[i] = Out(value_of(stored));
        }
    }
    return checksum_of(sums);
}

[[noreturn]] void fail_damaged(const std::string& path, const TensorView& view) {
    fail(path, ": the tensor '", view.name, "' is damaged: its bytes do not match their checksum (",
         checksum_text(*view.checksum), ")");
}

// Returns whether the tensor matches its checksum.
template <class Out> bool read_as(const std::string& path, const TensorView& view, Out* out) {
    auto same = [](auto value) { return value; };
    uint64_t sum = 0;
    if (view.dtype == "F64") {
        sum = convert<double>(view, out, same);
    } else if (view.dtype == "F32") {
        sum = convert<float>(view, out, same);
    } else if (view.dtype == "BF16") {
        sum =
            convert<uint16_t>(view, out, [](uint16_t b) { return std::bit_cast<float>(b << 16); });
    } else if (view.dtype == "F16") {
        sum = convert<uint16_t>(view, out, half_to_float);
    } else {
        fail(path, ": the tensor '", view.name, "' has type ", view.dtype,
             "; expected F64, F32, F16 or BF16.");
    }
    return !view.checksum || sum == *view.checksum;
}

} // namespace

size_t dtype_bytes(const std::string& dtype) {
    static const std::map<std::string, size_t> bytes = {
        {"F64", 8}, {"I64", 8},  {"U64", 8},     {"C64", 8},     {"F32", 4},    {"I32", 4},
        {"U32", 4}, {"F16", 2},  {"I16", 2},     {"U16", 2},     {"BF16", 2},   {"I8", 1},
        {"U8", 1},  {"BOOL", 1}, {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"F8_E8M0", 1}};
    auto found = bytes.find(dtype);
    return found == bytes.end() ? 0 : found->second;
}

TensorOut tensor_out(const TensorView& view) {
    return {view.name, view.dtype, view.shape,
            [data = view.data, bytes = view.bytes](const TensorSink& sink) { sink(data, bytes); }};
}

void write_safetensors(const std::string& path, const std::vector<TensorView>& tensors,
                       const std::map<std::string, std::string>& metadata) {
    std::vector<TensorOut> out;
    for (const TensorView& view : tensors) out.push_back(tensor_out(view));
    write_safetensors(path, out, metadata);
}

void write_safetensors(const std::string& path, const std::vector<TensorOut>& tensors,
                       const std::map<std::string, std::string>& metadata) {
    std::vector<const TensorOut*> order;
    for (const TensorOut& tensor : tensors) order.push_back(&tensor);
    std::stable_sort(order.begin(), order.end(), [](const TensorOut* a, const TensorOut* b) {
        return dtype_bytes(a->dtype) > dtype_bytes(b->dtype);
    });

    std::set<std::string> names = {"__metadata__"};
    std::vector<uint64_t> sizes;
    for (const TensorOut* tensor : order) {
        uint64_t bytes = 0;
        if (!dtype_bytes(tensor->dtype))
            fail("cannot write ", path, ": '", tensor->name, "' has the unknown type ",
                 tensor->dtype);
        if (!tensor_bytes(tensor->shape, tensor->dtype, bytes))
            fail("cannot write ", path, ": '", tensor->name, "' has the impossible shape ",
                 shape_text(tensor->shape));
        if (!names.insert(tensor->name).second)
            fail("cannot write ", path, ": two tensors are named '", tensor->name, "'");
        sizes.push_back(bytes);
    }
    // The header precedes the tensors, so it is overwritten once their checksums are known.
    AtomicFile file(path);
    const bool with_checksums = file.can_overwrite();
    std::vector<uint64_t> sums(order.size());
    auto header_with = [&](uint64_t own_checksum) {
        std::string header = "{\"__metadata__\":{";
        for (const auto& [key, value] : metadata)
            header += json_string(key, path) + ":" + json_string(value, path) + ",";
        if (with_checksums) {
            header += "\"" + checksum_key + "\":\"" + checksum_text(own_checksum) + "\",";
            for (size_t i = 0; i < order.size(); i++)
                header += json_string(tensor_checksum_key + order[i]->name, path) + ":\"" +
                          checksum_text(sums[i]) + "\",";
        }
        if (header.back() == ',') header.pop_back();
        header += "},";
        uint64_t offset = 0;
        for (size_t i = 0; i < order.size(); i++) {
            header += json_string(order[i]->name, path) + ":{\"dtype\":\"" + order[i]->dtype +
                      "\",\"shape\":" + shape_text(order[i]->shape) + ",\"data_offsets\":[" +
                      std::to_string(offset) + "," + std::to_string(offset + sizes[i]) + "]},";
            offset += sizes[i];
        }
        header.back() = '}';
        header.resize((header.size() + 7) / 8 * 8, ' ');
        return header;
    };
    std::string header = header_with(0);
    const uint64_t length = header.size();
    file.write(&length, sizeof length);
    file.write(header.data(), header.size());
    std::vector<std::tuple<std::string, std::string, std::string, uint64_t>> described;
    for (size_t i = 0; i < order.size(); i++) {
        uint64_t written = 0;
        Checksum sum;
        order[i]->produce([&](const void* data, size_t bytes) {
            if (with_checksums) sum.add(data, bytes);
            file.write(data, bytes);
            written += bytes;
        });
        if (written != sizes[i])
            fail("cannot write ", path, ": '", order[i]->name, "' of type ", order[i]->dtype,
                 " and shape ", shape_text(order[i]->shape), " needs ", sizes[i], " bytes and has ",
                 written, ".");
        sums[i] = sum.value();
        described.emplace_back(order[i]->name, order[i]->dtype, shape_text(order[i]->shape),
                               sums[i]);
    }
    if (with_checksums) {
        header = header_with(header_checksum(metadata, described));
        file.overwrite(sizeof length, header.data(), header.size());
    }
    file.commit();
}

Safetensors::Safetensors(const std::string& path) : path_(path) {
    Fd file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
    struct stat status = {};
    if (!file || fstat(file.fd, &status) != 0)
        fail("cannot open ", path, ": ", std::strerror(errno));
    if (!S_ISREG(status.st_mode)) fail(path, " is not a file; expected a safetensors file.");
    if (status.st_size < 8)
        fail(path, " has ", status.st_size,
             " bytes; a safetensors file has at least 8: it is truncated.");
    file_ = MappedFile(file.fd, path);
    try {
        parse();
    } catch (const Error&) {
        file_.check(); // a truncated or unreadable file is the better explanation
        throw;
    }
    file_.check();
}

void Safetensors::parse() {
    const char* file = reinterpret_cast<const char*>(file_.data());
    const size_t size = file_.size();
    if (is_lfs_pointer({file, size}))
        fail(path_, " is a Git LFS pointer, not the file itself: fetch it with git lfs pull");
    uint64_t length;
    std::memcpy(&length, file, sizeof length);
    if (length > max_header || length < 2)
        fail(path_, " is not a safetensors file: it gives its header's length as ", length,
             " bytes; expected 2 to ", max_header, ".");
    if (length > size - 8)
        fail(path_, " is truncated: its header alone has ", length, " bytes, the file ", size, ".");
    if (file[8] != '{')
        fail(path_, " is not a safetensors file: its header does not begin with '{'.");
    const char* data = file + 8 + length;
    uint64_t data_bytes = size - 8 - length;

    const json header = parse_json({file + 8, length}, path_ + ": its header", max_header);
    for (const auto& [name, entry] : header.items()) {
        if (!entry.is_object()) fail(path_, ": the header's entry '", name, "' is not an object.");
        if (name == "__metadata__") {
            for (const auto& [key, value] : entry.items()) {
                if (!value.is_string()) fail(path_, ": the metadata '", key, "' is not a string.");
                metadata_[key] = value.get<std::string>();
            }
            continue;
        }
        TensorView view;
        view.name = name;
        auto field = [&, &name = name, &entry = entry](const char* key) -> const json& {
            auto found = entry.find(key);
            if (found == entry.end()) fail(path_, ": the tensor '", name, "' has no ", key, ".");
            return *found;
        };
        const json &dtype = field("dtype"), &shape = field("shape");
        const json& offsets = field("data_offsets");
        if (entry.size() != 3)
            fail(path_, ": the tensor '", name,
                 "' has other fields besides dtype, shape and data_offsets.");
        if (!dtype.is_string() || !dtype_bytes(dtype.get<std::string>()))
            fail(path_, ": the tensor '", name, "' has the unknown type ", quoted(dtype), ".");
        view.dtype = dtype.get<std::string>();

        bool good = shape.is_array();
        for (const json& n : good ? shape : json::array()) {
            good = good && n.is_number_unsigned() && n.get<uint64_t>() <= INT64_MAX;
            if (good) view.shape.push_back(n.get<int64_t>());
        }
        uint64_t bytes = 0;
        if (!good || !tensor_bytes(view.shape, view.dtype, bytes))
            fail(path_, ": the tensor '", name, "' has the impossible shape ", quoted(shape), ".");
        if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
            !offsets[1].is_number_unsigned())
            fail(path_, ": the tensor '", name, "' has data_offsets ", quoted(offsets),
                 "; expected two numbers, begin and end.");
        uint64_t begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
        if (begin > end || end > data_bytes)
            fail(path_, ": the tensor '", name, "' is at bytes ", begin, " to ", end, " of ",
                 data_bytes, " bytes of data: the file is truncated or damaged.");
        if (end - begin != bytes)
            fail(path_, ": the tensor '", name, "' of type ", view.dtype, " and shape ",
                 shape_text(view.shape), " needs ", bytes, " bytes and has ", end - begin, ".");
        view.data = data + begin;
        view.bytes = bytes;
        tensors_.push_back(std::move(view));
    }

    std::sort(tensors_.begin(), tensors_.end(), [](const TensorView& a, const TensorView& b) {
        return std::tie(a.data, a.bytes, a.name) < std::tie(b.data, b.bytes, b.name);
    });
    const char* expected = data;
    for (const TensorView& view : tensors_) {
        if (view.data != expected)
            fail(path_, ": the tensor '", view.name, "' begins at byte ",
                 static_cast<const char*>(view.data) - data, " of the data; expected ",
                 expected - data, ": tensors overlap or leave a hole.");
        expected += view.bytes;
        index_.emplace(view.name, index_.size());
    }
    if (expected != data + data_bytes)
        fail(path_, " has ", data_bytes, " bytes of data, but its tensors account for ",
             expected - data, ".");
    take_checksums();
}

// Moves the checksums from the metadata to the tensors. A file has either all or none.
void Safetensors::take_checksums() {
    std::map<std::string, std::string> sums;
    for (auto entry = metadata_.begin(); entry != metadata_.end();)
        if (is_checksum_key(entry->first)) {
            sums.insert(*entry);
            entry = metadata_.erase(entry);
        } else {
            ++entry;
        }
    if (sums.empty()) return;
    auto take = [&](const std::string& key) {
        auto found = sums.find(key);
        uint64_t value = 0;
        if (found == sums.end() || std::sscanf(found->second.c_str(), "%16" SCNx64, &value) != 1 ||
            checksum_text(value) != found->second)
            fail(path_, ": its header is damaged: the checksum '", key, "' is ",
                 found == sums.end() ? "missing" : "'" + found->second + "'");
        sums.erase(found);
        return value;
    };
    std::vector<std::tuple<std::string, std::string, std::string, uint64_t>> described;
    checksum_ = take(checksum_key);
    for (TensorView& view : tensors_) {
        view.checksum = take(tensor_checksum_key + view.name);
        described.emplace_back(view.name, view.dtype, shape_text(view.shape), *view.checksum);
    }
    if (!sums.empty())
        fail(path_, ": its header is damaged: '", sums.begin()->first,
             "' names no tensor of the file");
    if (header_checksum(metadata_, described) != *checksum_)
        fail(path_, ": its header is damaged: it does not match its checksum");
}

void Safetensors::check(const TensorView& view) const {
    finish(view, !view.checksum || lns::checksum(view.data, view.bytes) == *view.checksum);
}

void Safetensors::finish(const TensorView& view, bool intact) const {
    file_.check();
    file_.release(view.data, view.bytes);
    if (!intact) fail_damaged(path_, view);
}

const TensorView* Safetensors::find(const std::string& name) const {
    auto found = index_.find(name);
    return found == index_.end() ? nullptr : &tensors_[found->second];
}

const TensorView& Safetensors::at(const std::string& name) const {
    const TensorView* view = find(name);
    if (!view) fail(path_, " has no tensor '", name, "'.");
    return *view;
}

void Safetensors::read_f32(const TensorView& view, float* out) const {
    finish(view, read_as(path_, view, out));
}

void Safetensors::read_f64(const TensorView& view, double* out) const {
    finish(view, read_as(path_, view, out));
}

} // namespace lns
