// What all matrix products of a warpgroup (wgmma) need.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>

#include <cstdint>
#include <utility>

namespace tome::sm90 {

constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupRows = 64;  // of a product

using ScaleOut = cute::SM90::GMMA::ScaleOut;

// The same number, from one lane: so the compiler knows that a warp agrees on it, and keeps it, and what
// follows from it, in uniform registers.
template <class N>
__device__ __forceinline__ N uniform(N x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

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

}  // namespace tome::sm90
