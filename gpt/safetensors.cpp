#include "gpt/safetensors.h"

#include "gpt/error.h"
#include "gpt/files.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fcntl.h>
#include <nlohmann/json.hpp>
#include <set>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tuple>
#include <unistd.h>

static_assert(std::endian::native == std::endian::little, "safetensors is little-endian");

namespace lns {
namespace {

using nlohmann::json;

constexpr uint64_t max_header = 100'000'000; // as in the reference implementation

// The bytes that shape and dtype say; false if they overflow 63 bits.
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

// A string as JSON.
std::string quoted(const std::string& text, const std::string& path) {
    try {
        return json(text).dump();
    } catch (const json::exception&) {
        fail("cannot write ", path, ": a name or value in its header is not UTF-8.");
    }
}

// The JSON text, with repeated keys refused: the parser would keep the last of them.
json parse_header(const std::string& path, const char* begin, const char* end) {
    std::vector<std::set<std::string>> keys;
    auto watch = [&](int, json::parse_event_t event, json& value) {
        if (event == json::parse_event_t::object_start) keys.emplace_back();
        if (event == json::parse_event_t::object_end) keys.pop_back();
        if (event == json::parse_event_t::key &&
            !keys.back().insert(value.get<std::string>()).second)
            fail(path, ": its header has ", value.dump(), " twice.");
        return true;
    };
    try {
        return json::parse(begin, end, watch);
    } catch (const json::exception& error) {
        fail(path, ": its header is not valid JSON: ", error.what());
    }
}

float half_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31,
             mantissa = half & 1023;
    if (exponent == 0) return std::ldexp(float(mantissa), -24) * (sign ? -1.0f : 1.0f);
    exponent = exponent == 31 ? 255 : exponent + 112; // infinity and NaN; else the bias, 127 - 15
    return std::bit_cast<float>(sign | exponent << 23 | mantissa << 13);
}

template <class Stored, class Out, class Convert>
void convert(const TensorView& view, Out* out, Convert value_of) {
    const char* from = static_cast<const char*>(view.data);
    for (size_t i = 0; i < view.bytes / sizeof(Stored); i++) {
        Stored stored;
        std::memcpy(&stored, from + i * sizeof stored, sizeof stored);
        out[i] = Out(value_of(stored));
    }
}

template <class Out> void read_as(const std::string& path, const TensorView& view, Out* out) {
    auto same = [](auto value) { return value; };
    if (view.dtype == "F64") {
        convert<double>(view, out, same);
    } else if (view.dtype == "F32") {
        convert<float>(view, out, same);
    } else if (view.dtype == "BF16") {
        convert<uint16_t>(view, out, [](uint16_t b) { return std::bit_cast<float>(b << 16); });
    } else if (view.dtype == "F16") {
        convert<uint16_t>(view, out, half_to_float);
    } else {
        fail(path, ": the tensor '", view.name, "' has type ", view.dtype,
             ", and F64, F32, F16 or BF16 is needed here.");
    }
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

    std::string header = "{";
    if (!metadata.empty()) {
        header += "\"__metadata__\":{";
        for (const auto& [key, value] : metadata)
            header += quoted(key, path) + ":" + quoted(value, path) + ",";
        header.back() = '}';
        header += ",";
    }
    std::set<std::string> names = {"__metadata__"};
    std::vector<uint64_t> sizes;
    uint64_t offset = 0;
    for (const TensorOut* tensor : order) {
        uint64_t bytes = 0;
        if (!dtype_bytes(tensor->dtype))
            fail("cannot write ", path, ": '", tensor->name, "' has the unknown type ",
                 tensor->dtype);
        if (!tensor_bytes(tensor->shape, tensor->dtype, bytes))
            fail("cannot write ", path, ": '", tensor->name, "' has the impossible shape ",
                 shape_text(tensor->shape));
        if (!names.insert(tensor->name).second)
            fail("cannot write ", path, ": two tensors have the name '", tensor->name, "'");
        std::string shape = shape_text(tensor->shape);
        header += quoted(tensor->name, path) + ":{\"dtype\":\"" + tensor->dtype +
                  "\",\"shape\":" + shape + ",\"data_offsets\":[" + std::to_string(offset) + "," +
                  std::to_string(offset + bytes) + "]},";
        sizes.push_back(bytes);
        offset += bytes;
    }
    if (header.back() == ',') header.pop_back();
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');

    AtomicFile file(path);
    uint64_t length = header.size();
    file.write(&length, sizeof length);
    file.write(header.data(), header.size());
    for (size_t i = 0; i < order.size(); i++) {
        uint64_t written = 0;
        order[i]->produce([&](const void* data, size_t bytes) {
            file.write(data, bytes);
            written += bytes;
        });
        if (written != sizes[i])
            fail("cannot write ", path, ": '", order[i]->name, "' of type ", order[i]->dtype,
                 " and shape ", shape_text(order[i]->shape), " should have ", sizes[i],
                 " bytes and has ", written, ".");
    }
    file.commit();
}

Safetensors::Safetensors(const std::string& path) : path_(path) {
    Fd file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
    struct stat status = {};
    if (!file || fstat(file.fd, &status) != 0)
        fail("cannot open ", path, ": ", std::strerror(errno));
    if (!S_ISREG(status.st_mode)) fail(path, " is not a file; expected a safetensors file.");
    size_ = size_t(status.st_size);
    if (size_ < 8)
        fail(path, " has ", size_, " bytes; a safetensors file has at least 8: it is truncated.");
    void* map = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.fd, 0);
    if (map == MAP_FAILED) fail("cannot map ", path, " into memory: ", std::strerror(errno));
    map_ = map;
    try {
        parse();
    } catch (...) {
        munmap(map_, size_);
        throw;
    }
}

Safetensors::~Safetensors() { munmap(map_, size_); }

void Safetensors::parse() {
    const char* file = static_cast<const char*>(map_);
    uint64_t length;
    std::memcpy(&length, file, sizeof length);
    if (length > max_header || length < 2)
        fail(path_, " is not a safetensors file: it says that its header has ", length,
             " bytes; expected 2 to ", max_header, ".");
    if (length > size_ - 8)
        fail(path_, " is truncated: its header alone has ", length, " bytes and the file ", size_,
             ".");
    if (file[8] != '{')
        fail(path_, " is not a safetensors file: its header does not begin with '{'.");
    const char* data = file + 8 + length;
    uint64_t data_bytes = size_ - 8 - length;

    json header = parse_header(path_, file + 8, data);
    for (const auto& [name, entry] : header.items()) {
        if (!entry.is_object()) fail(path_, ": the header's entry '", name, "' is no object.");
        if (name == "__metadata__") {
            for (const auto& [key, value] : entry.items()) {
                if (!value.is_string()) fail(path_, ": the metadata '", key, "' is no string.");
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
                 "' has other fields than dtype, shape and data_offsets.");
        if (!dtype.is_string() || !dtype_bytes(dtype.get<std::string>()))
            fail(path_, ": the tensor '", name, "' has the unknown type ", dtype.dump(), ".");
        view.dtype = dtype.get<std::string>();

        bool good = shape.is_array();
        for (const json& n : good ? shape : json::array()) {
            good = good && n.is_number_unsigned() && n.get<uint64_t>() <= INT64_MAX;
            if (good) view.shape.push_back(n.get<int64_t>());
        }
        uint64_t bytes = 0;
        if (!good || !tensor_bytes(view.shape, view.dtype, bytes))
            fail(path_, ": the tensor '", name, "' has the impossible shape ", shape.dump(), ".");
        if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
            !offsets[1].is_number_unsigned())
            fail(path_, ": the tensor '", name, "' has data_offsets ", offsets.dump(),
                 "; expected two numbers, begin and end.");
        uint64_t begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
        if (begin > end || end > data_bytes)
            fail(path_, ": the tensor '", name, "' lies at bytes ", begin, " to ", end, " of ",
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
        fail(path_, " has ", data_bytes, " bytes of data, and its tensors account for ",
             expected - data, ".");
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

void Safetensors::read_f32(const TensorView& view, float* out) const { read_as(path_, view, out); }

void Safetensors::read_f64(const TensorView& view, double* out) const { read_as(path_, view, out); }

} // namespace lns
