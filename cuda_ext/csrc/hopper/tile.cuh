// How a tile of 16-bit numbers lies in shared memory for Hopper's copy engine and products: in panels of some
// columns, each [rows][columns of the panel], one behind the other. Within a panel the 16-byte chunks of a
// row are exchanged (swizzled), so that neither copies nor products meet a bank twice.
#pragma once

#include <cstdint>

#include "../vector.cuh"
#include "warpgroup.cuh"

namespace tome::sm90 {

constexpr int kSwizzleBytes = 1024;  // where the widest swizzle repeats, and panels start
constexpr int kStepColumns = 16;     // of a row that one product sums over

// kColumns: 64, 32 or 16, rows of 128, 64 or 32 bytes.
template <int kColumns, int kRows>
struct Panel {
  static constexpr int kPitch = 2 * kColumns;  // bytes per row
  static constexpr int kBytes = kRows * kPitch;
  static constexpr int kChunks = kPitch / kAccessBytes;
  static constexpr uint64_t kMode = kColumns == 64 ? 1 : kColumns == 32 ? 2 : 3;
  static_assert(kBytes % (8 * kPitch) == 0, "a panel starts where its swizzle repeats");

  // Byte offset of a row's chunk.
  __device__ static uint32_t offset(uint32_t row, uint32_t chunk) {
    return row * kPitch + ((chunk ^ row / (8 / kChunks)) % kChunks) * kAccessBytes;
  }
  // Where a product finds its operand. `low`: the address in units of 16 bytes.
  __device__ static uint64_t descriptor(uint32_t low, int leading_bytes) {
    return low | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
           static_cast<uint64_t>(8 * kPitch >> 4) << 32 | kMode << 62;
  }
};

__device__ __forceinline__ uint32_t low_word(uint32_t address) { return (address & 0x3ffff) >> 4; }

// From one lane, so that the compiler knows it to be the same in a warp, and keeps descriptors made of it in
// uniform registers. Else it moves each there on its own, between products.
__device__ __forceinline__ uint32_t uniform_low_word(uint32_t address) { return uniform(low_word(address)); }

// The widest panels that divide so many columns: one product then covers all of them.
constexpr int widest_panel(int columns) { return columns % 64 == 0 ? 64 : columns % 32 == 0 ? 32 : 16; }

// Panels of kPanel columns, and behind them what is left in panels of 16, the last one padded.
template <int kColumns, int kRows, int kPanel_ = widest_panel(kColumns)>
struct Tile {
  static constexpr int kPanel = kPanel_, kRest = kStepColumns;
  using Main = Panel<kPanel, kRows>;
  using Last = Panel<kRest, kRows>;
  static constexpr int kPanels = (kColumns + (kPanel == kRest ? kRest - 1 : 0)) / kPanel;
  static constexpr int kRestPanels = kPanel == kRest ? 0 : (kColumns % kPanel + kRest - 1) / kRest;
  static constexpr int kRestAt = kPanels * Main::kBytes;
  static constexpr int kBytes = kRestAt + kRestPanels * Last::kBytes;
  static constexpr int kMainSteps = kPanels * kPanel / kStepColumns;
  static constexpr int kSteps = kMainSteps + kRestPanels;  // products per row

  // Byte offset of a row's chunk of 8 columns.
  __device__ static int offset(int row, int chunk) {
    const int rest = chunk - kPanels * Main::kChunks;
    return kRestPanels == 0 || rest < 0
               ? chunk / Main::kChunks * Main::kBytes + Main::offset(row, chunk)
               : kRestAt + rest / Last::kChunks * Last::kBytes + Last::offset(row, rest);
  }

  // Rows by 16 columns, of which a product takes the sum: how far those of a step are behind the first ones,
  // in units of 16 bytes, and, from a row on, their descriptor.
  __device__ static constexpr uint64_t columns_advance(int step) {
    const int column = step * kStepColumns;
    return (step < kMainSteps ? column / kPanel * Main::kBytes + column % kPanel * 2
                              : kRestAt + (step - kMainSteps) * Last::kBytes) >>
           4;
  }
  __device__ static uint64_t by_columns(uint32_t low, int row, int step) {
    const uint32_t at = low + static_cast<uint32_t>(columns_advance(step));
    return step < kMainSteps ? Main::descriptor(at + row * Main::kPitch / 16, 16)
                             : Last::descriptor(at + row * Last::kPitch / 16, 16);
  }
  __device__ static uint64_t by_columns(uint32_t tile) {
    return Main::descriptor(uniform_low_word(tile), 16);
  }

  // All columns of 16 rows, of which a product takes the sum, and how far the next 16 rows are.
  __device__ static uint64_t by_rows(uint32_t tile) {
    static_assert(kRestPanels == 0, "one distance leads from panel to panel");
    return Main::descriptor(uniform_low_word(tile), Main::kBytes);
  }
  __device__ static constexpr uint64_t rows_advance(int step) {
    return step * kStepColumns * Main::kPitch >> 4;
  }
};

}  // namespace tome::sm90
