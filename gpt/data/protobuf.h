// Protocol buffers, as far as SentencePiece's models need them.
#pragma once

#include <cstdint>
#include <string_view>

namespace lns {

// Calls take(number, bytes, value) for each field: bytes of length-delimited ones, the value of
// integers, and the bits of floats. False if the buffer is truncated.
template <class Take> bool each_field(std::string_view data, const Take& take) {
    auto varint = [&](uint64_t& value) {
        value = 0;
        for (int shift = 0; shift < 64 && !data.empty(); shift += 7) {
            const auto byte = static_cast<unsigned char>(data[0]);
            data.remove_prefix(1);
            value |= uint64_t(byte & 127) << shift;
            if (byte < 128) return true;
        }
        return false;
    };
    while (!data.empty()) {
        uint64_t key, size = 0, value = 0;
        if (!varint(key)) return false;
        switch (key & 7) {
        case 0:
            if (!varint(value)) return false;
            break;
        case 1:
            size = 8;
            break;
        case 2:
            if (!varint(size)) return false;
            break;
        case 5:
            size = 4;
            break;
        default:
            return false;
        }
        if (size > data.size()) return false;
        if ((key & 7) == 1 || (key & 7) == 5)
            for (size_t i = size; i-- > 0;)
                value = value << 8 | static_cast<unsigned char>(data[i]);
        take(key >> 3, data.substr(0, (key & 7) == 2 ? size : 0), value);
        data.remove_prefix(size);
    }
    return true;
}

} // namespace lns
