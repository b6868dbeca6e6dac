#include "gpt/cpu/bf16.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "gpt/base/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lns {

namespace {

Bf16Unit unit_of_cpu() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Bf16Unit::none;
    const bool amx = (d >> 22 & 1) && (d >> 24 & 1); // AMX-BF16, AMX-TILE
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw"))
        return Bf16Unit::none; // also if the system does not save the registers
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return Bf16Unit::none;
#if defined(__linux__)
    // Linux grants AMX's 8 KiB of registers only on request.
    const long request_permission = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE
    if (amx && syscall(SYS_arch_prctl, request_permission, tile_data) == 0) return Bf16Unit::amx;
#else
    (void)amx;
#endif
    return Bf16Unit::avx512;
#else
    return Bf16Unit::none;
#endif
}

Bf16Unit allowed_unit() {
    const char* text = std::getenv("LNS_BF16");
    if (!text || !*text) return Bf16Unit::amx;
    const std::string word = text;
    if (word == "none") return Bf16Unit::none;
    if (word == "avx512") return Bf16Unit::avx512;
    if (word == "amx") return Bf16Unit::amx;
    fail("LNS_BF16 is '", word, "', expected none, avx512 or amx");
}

} // namespace

Bf16Unit bf16_unit() {
    static const Bf16Unit unit = std::min(unit_of_cpu(), allowed_unit());
    return unit;
}

const char* name_of(Bf16Unit unit) {
    return unit == Bf16Unit::amx ? "AMX-BF16" : unit == Bf16Unit::avx512 ? "AVX512-BF16" : "none";
}

} // namespace lns
