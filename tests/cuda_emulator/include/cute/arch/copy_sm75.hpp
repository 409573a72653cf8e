#pragma once
#include <cuda_runtime.h>

namespace cute {
struct alignas(16) uint128_t {
  uint32_t word[4];
};

struct SM75_U32x4_LDSM_N {
  static void copy(const uint128_t& source, uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3) {
    const auto address = reinterpret_cast<uintptr_t>(&source);
    const auto first = reinterpret_cast<uintptr_t>(tome::shared);
    if (address % 16 != 0 || address < first || address + 16 > first + emulator::kSharedBytes) std::abort();
    emulator::exchange(&source, [&](const uint128_t* const* all) {
      const int lane = emulator::lane();
      uint32_t* const d[4] = {&d0, &d1, &d2, &d3};
      for (int i = 0; i < 4; ++i) *d[i] = all[8 * i + lane / 4]->word[lane % 4];
      return 0;
    });
  }
};
}  // namespace cute
