#pragma once
#include <cuda_runtime.h>

namespace cute {
struct alignas(16) uint128_t {
  uint32_t word[4];
};

// kCount 8x8 matrices of 16-bit numbers; thread 8 i + j points at row j of the i-th.
template <int kCount>
void load_matrices(const uint128_t& source, uint32_t* const (&d)[kCount], bool transposed) {
  const int lane = emulator::lane();
  const auto address = reinterpret_cast<uintptr_t>(&source);
  const auto first = reinterpret_cast<uintptr_t>(tome::shared);
  const bool is_used = lane < 8 * kCount;
  if (is_used && (address % 16 != 0 || address < first || address + 16 > first + emulator::kSharedBytes)) {
    std::abort();
  }
  emulator::exchange(&source, [&](const uint128_t* const* all) {
    for (int i = 0; i < kCount; ++i) {
      if (!transposed) {
        *d[i] = all[8 * i + lane / 4]->word[lane % 4];
        continue;
      }
      uint16_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const auto* row = reinterpret_cast<const uint16_t*>(all[8 * i + lane % 4 * 2 + j]);
        pair[j] = row[lane / 4];
      }
      *d[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
    return 0;
  });
  emulator::sync_warp();  // nobody writes to shared memory before all have read
}

struct SM75_U32x4_LDSM_N {
  static void copy(const uint128_t& source, uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3) {
    load_matrices<4>(source, {&d0, &d1, &d2, &d3}, false);
  }
};
struct SM75_U32x2_LDSM_N {
  static void copy(const uint128_t& source, uint32_t& d0, uint32_t& d1) {
    load_matrices<2>(source, {&d0, &d1}, false);
  }
};
struct SM75_U16x8_LDSM_T {
  static void copy(const uint128_t& source, uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3) {
    load_matrices<4>(source, {&d0, &d1, &d2, &d3}, true);
  }
};
struct SM75_U16x4_LDSM_T {
  static void copy(const uint128_t& source, uint32_t& d0, uint32_t& d1) {
    load_matrices<2>(source, {&d0, &d1}, true);
  }
};
}  // namespace cute
