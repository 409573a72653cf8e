// A GELU of a float32 number, to be rounded to 16 bits.
#pragma once

#include "gelu.h"

namespace tome::activation {

// Each one instruction. Both give what the limits need: 2^inf = inf, 1 / inf = 0.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

template <int kTerms>
__device__ __forceinline__ float gelu(float v, const Gelu<kTerms>& g) {
  const float square = v * v;
  float r = g.terms[kTerms - 1];
#pragma unroll
  for (int i = kTerms - 2; i >= 0; --i) r = fmaf(r, square, g.terms[i]);
  return v * reciprocal(1.0f + power_of_two(v * r));
}

}  // namespace tome::activation
