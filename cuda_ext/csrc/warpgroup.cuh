// What all matrix products of a warpgroup (wgmma) need.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>

#include <cstdint>
#include <utility>

namespace tome {

using ScaleOut = cute::SM90::GMMA::ScaleOut;

// c = c scale + a b, with as many numbers of c as the sequence has: a from registers, b from shared memory.
template <class Op, class Sum, int kSize, int... kI>
__device__ __forceinline__ void warpgroup_multiply(const uint32_t (&a)[4], uint64_t b, Sum (&c)[kSize],
                                                   ScaleOut scale, std::integer_sequence<int, kI...>) {
  Op::fma(a[0], a[1], a[2], a[3], b, c[kI]..., scale);
}

// Keeps the compiler from moving accesses to registers that a product in flight uses.
template <int kSize, class R>
__device__ __forceinline__ void fence_registers(R (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) cute::warpgroup_fence_operand(registers[i]);
}

}  // namespace tome
