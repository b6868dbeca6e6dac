#include "gpt/run/facts.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "gpt/base/error.h"
#include "gpt/base/json.h"
#include "gpt/base/random.h"

namespace lns {

Facts config_facts(const Config& config) {
    Facts facts;
    const auto fields = parse_ordered_json(config_to_json(config), "config.json");
    for (const auto& [key, value] : fields.items())
        facts.push_back({"a model whose " + key + " is", value.dump()});
    return facts;
}

Facts data_facts(const std::string& what, TokenSource& source, const Loader& loader) {
    const TokenizerId id = source.id();
    // Hash 64 tokens at each of 64 places: reading everything could take as long as training.
    const uint64_t tokens = source.size(), places = 64, n = 64;
    uint64_t hash = fnv1a("");
    std::vector<int> some(static_cast<size_t>(n));
    for (uint64_t place = 0; place < places; place++) {
        const bool endless = tokens == TokenSource::endless;
        const uint64_t room = endless || tokens < n ? 0 : tokens - n;
        const uint64_t at = uint64_t(double(room) * double(place) / double(places - 1));
        const size_t count = size_t(std::min(n, tokens));
        source.read(std::min(at, room), count, some.data());
        hash = fnv1a({reinterpret_cast<const char*>(some.data()), count * sizeof some[0]}, hash);
        if (room == 0) break;
    }
    return {{what + " data", source.describe()},
            {what + " sequences", cat(loader.windows_per_epoch())},
            {what + " data tokenized by", cat(id.kind, " ", id.vocab_size, " ", id.fingerprint)},
            fingerprint_fact(what + " data", hash)};
}

std::pair<std::string, std::string> fingerprint_fact(const std::string& what, uint64_t number) {
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(number));
    return {what + " with the fingerprint", text};
}

uint64_t fingerprint(Model& model, Buffer buffer) {
    uint64_t hash = fnv1a("");
    std::vector<float> values;
    for (const Param& p : model.registry.params) {
        if (buffer.kind == Buffer::state && !model.optimizer->has(buffer.index, p)) continue;
        values.resize(size_t(model.shaped(buffer, p).size()));
        model.read(buffer, p, values.data());
        for (float value : values) {
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            hash = (hash ^ bits) * 0x100000001b3; // FNV-1a on 4 bytes at a time
        }
    }
    return hash;
}

} // namespace lns
