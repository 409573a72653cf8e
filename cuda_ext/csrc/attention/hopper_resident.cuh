// What the kernel whose keys all lie in shared memory is made of: the places in shared memory, the copies,
// the bias.
//
// The bias log(size) / scale is one more step of the product of queries and keys: a column of `unit`, a power
// of two, by numbers that half precision holds, three per key, which together are as exact as float32. That
// adds a quarter to the product; starting the accumulators from the bias took longer than the product itself.
#pragma once

#include <cmath>

#include "hopper_products.cuh"
#include "hopper_tail.cuh"
#include "softmax.cuh"

namespace tome::attention_ops::hopper {

constexpr int kDim = 64;
constexpr int kBiasBytes = 16;  // of a key
constexpr int kFewKeys = 208;   // and more: these kernels take fewer keys too, where heads are few

struct HopperResidentParams {
  AttentionParams attention;
  int splits;     // blocks of a head
  float unit;     // of the bias
  float to_bias;  // from the logarithm of a size to units
};

// Half of it, too, must be exact in half precision.
constexpr float kLeastUnit = 0x1p-13f;
constexpr float kMostUnit = 0x1p15f;
inline float unit_of(float scale) { return std::exp2(std::ceil(-std::log2(scale))); }

template <int kKeys>
struct ResidentPlan {
  using Tile = sm90::Tile<kDim, kKeys>;
  static constexpr int kBlocks = kKeys > 224 ? 2 : kKeys > 112 ? 3 : 4;
  // How many of the last keys may be missing.
  static constexpr int kPadded = kKeys < kFewKeys ? kTileRows : kKeys;
  static constexpr int kValues = Tile::kBytes;
  // Not the last: compute-sanitizer takes what the product reads of it for twice as much, as if rows had 32
  // bytes.
  static constexpr int kBias = kValues + Tile::kBytes;
  static constexpr int kQueries = kBias + kKeys * kBiasBytes;
  static constexpr int kTail = kQueries + kWarpgroupRows * kDim * 2;
  static constexpr int kSharedBytes = kTail + kTailBytes + kSwizzleBytes;
  // The keys of the first of two products of queries and keys: its scores are looked at while the second
  // runs.
  static constexpr int kLeft = (kKeys + 16) / 32 * 16;
  static constexpr int kRight = kKeys - kLeft;
  // Of the product with the values: the first part runs while the weights of the second are computed. The
  // most scores of three blocks leave no registers for that, nor for anything else during a product.
  static constexpr bool kIsFull = kKeys == 224;
  static constexpr int kParts = kIsFull ? 1 : 2;
};

// Of a thread: for every 8 keys two neighbours of one row, then of the row 8 below.
template <int kKeys>
struct Scores {
  static constexpr int kLeft = ResidentPlan<kKeys>::kLeft / 2;
  float left[kLeft];
  float right[ResidentPlan<kKeys>::kRight / 2];
  __device__ __forceinline__ float& operator[](int i) { return i < kLeft ? left[i] : right[i - kLeft]; }

  // Into the highest scores of either row, in two chains of maxima each. fmaxf skips NaN: it shows in the
  // weights, not here.
  __device__ __forceinline__ void look(int n, float (&top)[2][2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half][n % 2] =
          fmaxf(top[half][n % 2], fmaxf((*this)[4 * n + 2 * half], (*this)[4 * n + 2 * half + 1]));
    }
  }
};

// A descriptor of what lies `bytes` further on. Addresses stay below 2^18, so only the low word changes: one
// instruction between products where making a new descriptor takes five, each waiting for the one before.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor >> 32 << 32) | low;
}

// `kCopiers` threads copy kRows rows, of which `rows` exist; those of the last kPadded that don't become
// zero.
template <class T, int kCopiers, int kRows, int kPadded>
__device__ __forceinline__ void copy_tile(const T* rows_ptr, int64_t row_stride, int rows, char* shared) {
  using Layout = RowLayout<kDim>;
  constexpr int kStep = kCopiers / Layout::kChunks;  // rows at a time: 4 or 16
  const int thread = forget(threadIdx.x) % kCopiers;
  const int row = thread / Layout::kChunks;
  const int chunk = thread % Layout::kChunks;
  const T* from = rows_ptr + row * row_stride + chunk * kChunkChannels;
  const int to = Layout::offset(row, chunk);
#pragma unroll
  for (int i = 0; i < kRows; i += kStep, from += kStep * row_stride) {
    const bool is_some = i < kRows - kPadded || row + i < rows;
    cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(
        as_chunk(reinterpret_cast<const char*>(is_some ? from : rows_ptr)),
        *reinterpret_cast<cute::uint128_t*>(shared + (to ^ i % 8 * kAccessBytes) + i * Layout::kBytes),
        is_some);
  }
}

// The right operand of the product that adds the bias: a value in three parts, the rest zero. The eight
// columns stand for all sixteen, which is why the left operand is half a unit.
template <class T>
__device__ __forceinline__ uint4 split_bias(float value) {
  float part[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    part[i] = static_cast<float>(static_cast<T>(value));
    value = value == part[i] ? 0.0f : value - part[i];  // not inf - inf
  }
  return make_uint4(pack_pair<T>(part[0], part[1]), pack_pair<T>(part[2], 0.0f), 0, 0);
}

}  // namespace tome::attention_ops::hopper
