// Matrix products of a warpgroup (wgmma): 64 queries by keys, and 64 queries' weights by values. Queries and
// weights come from registers, keys and values from shared memory.
//
// Shared memory holds a tile as panels of kPanel columns, each [rows][kPanel], swizzled as the copy engine
// writes it. A panel is 128, 64 or 32 bytes wide: the widest that divides the head dimension, so that one
// product covers all columns of the values.
#pragma once

#include <cute/arch/mma_sm80.hpp>

#include "../vector.cuh"
#include "../warpgroup.cuh"

namespace tome::attention_ops::hopper {

constexpr int kProductDepth = 16;

template <class T, int kColumns>
struct Product;

#define TOME_PRODUCT(T, NAME, COLUMNS)                                                                       \
  template <>                                                                                                \
  struct Product<T, COLUMNS> {                                                                               \
    using ByKeys = cute::SM90::GMMA::MMA_64x##COLUMNS##x16_F32##NAME##NAME##_RS<cute::SM90::GMMA::Major::K,  \
                                                                                cute::SM90::GMMA::Major::K>; \
    using ByValues =                                                                                         \
        cute::SM90::GMMA::MMA_64x##COLUMNS##x16_F32##NAME##NAME##_RS<cute::SM90::GMMA::Major::K,             \
                                                                     cute::SM90::GMMA::Major::MN>;           \
    using OfWarp = cute::SM80_16x8x16_F32##NAME##NAME##F32_TN;                                               \
  };
#define TOME_PRODUCTS(COLUMNS)       \
  TOME_PRODUCT(__half, F16, COLUMNS) \
  TOME_PRODUCT(__nv_bfloat16, BF16, COLUMNS)
TOME_PRODUCTS(16)
TOME_PRODUCTS(32)
TOME_PRODUCTS(48)
TOME_PRODUCTS(64)
TOME_PRODUCTS(72)
TOME_PRODUCTS(80)
TOME_PRODUCTS(96)
TOME_PRODUCTS(112)
TOME_PRODUCTS(128)
TOME_PRODUCTS(144)
TOME_PRODUCTS(160)
TOME_PRODUCTS(176)
TOME_PRODUCTS(192)
TOME_PRODUCTS(208)
TOME_PRODUCTS(224)
TOME_PRODUCTS(240)
TOME_PRODUCTS(256)
#undef TOME_PRODUCTS
#undef TOME_PRODUCT

// c += a b, with the first kColumns / 2 numbers of c.
template <class Op, int kColumns, int kSize>
__device__ __forceinline__ void multiply(const uint32_t (&a)[4], uint64_t b, float (&c)[kSize]) {
  static_assert(kColumns / 2 <= kSize, "the accumulator is too small");
  warpgroup_multiply<Op>(a, b, c, ScaleOut::One, std::make_integer_sequence<int, kColumns / 2>{});
}

// How a tile of `kRows` rows lies in shared memory, and the descriptors by which products find it there.
template <int kDim, int kRows>
struct TileLayout {
  static constexpr int kPanel = kDim % 64 == 0 ? 64 : kDim % 32 == 0 ? 32 : 16;
  static constexpr int kPanels = (kDim + kPanel - 1) / kPanel;
  static constexpr int kPitch = 2 * kPanel;  // bytes per row of a panel
  static constexpr int kPanelBytes = kRows * kPitch;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static constexpr int kSteps = kPanels * kPanel / kProductDepth;  // products per row of columns
  static constexpr int kSwizzle = kPitch - 16;                     // the address bits that change, from bit 4
  static_assert(kPanelBytes % (8 * kPitch) == 0, "a panel starts where its swizzle repeats");

  // Byte offset of 8 columns of a row within the tile.
  __device__ static uint32_t offset(int row, int column) {
    const uint32_t linear = row * kPitch + column % kPanel * 2;
    return column / kPanel * kPanelBytes + (linear ^ (linear >> 3 & kSwizzle));
  }

  static constexpr uint64_t kMode = kPanel == 64 ? 1 : kPanel == 32 ? 2 : 3;

  __device__ static uint64_t descriptor(uint32_t low, int leading_bytes) {
    return low | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
           static_cast<uint64_t>(8 * kPitch >> 4) << 32 | kMode << 62;
  }
  __device__ static uint32_t low_word(uint32_t address) { return (address & 0x3ffff) >> 4; }

  // From one lane, so that the compiler knows it to be uniform in a warp and keeps descriptors made of it in
  // uniform registers. Else it moves each there on its own, between products.
  __device__ static uint32_t uniform_low_word(uint32_t address) {
    return __shfl_sync(kFullWarp, low_word(address), 0);
  }

  // Rows by 16 columns, of which a product takes the sum, and how far the next 16 columns are.
  __device__ static uint64_t by_columns(uint32_t tile) { return descriptor(uniform_low_word(tile), 16); }
  __device__ static constexpr uint64_t columns_advance(int step) {
    const int column = step * kProductDepth;
    return (column / kPanel * kPanelBytes + column % kPanel * 2) >> 4;
  }
  __device__ static uint64_t by_columns(uint32_t tile, int step) {
    return descriptor(low_word(tile), 16) + columns_advance(step);
  }

  // All columns of 16 rows, of which a product takes the sum, and how far the next 16 rows are.
  __device__ static uint64_t by_rows(uint32_t tile) {
    return descriptor(uniform_low_word(tile), kPanelBytes);
  }
  __device__ static constexpr uint64_t rows_advance(int step) { return step * kProductDepth * kPitch >> 4; }
  __device__ static uint64_t by_rows(uint32_t tile, int step) {
    return descriptor(low_word(tile), kPanelBytes) + rows_advance(step);
  }
};

}  // namespace tome::attention_ops::hopper
