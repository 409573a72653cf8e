// Matrix products of a warpgroup (wgmma): 64 queries by keys, and 64 queries' weights by values. Queries and
// weights come from registers, keys and values from tiles in shared memory.
#pragma once

#include <cute/arch/mma_sm80.hpp>

#include "../hopper/tile.cuh"
#include "../hopper/warpgroup.cuh"

namespace tome::attention_ops::hopper {

using namespace sm90;

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

}  // namespace tome::attention_ops::hopper
