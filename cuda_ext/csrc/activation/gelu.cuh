// A GELU of a float32 number, to be rounded to 16 bits.
#pragma once

#include "../vector.cuh"
#include "gelu.h"

namespace tome::activation {

// Its power and its quotient give what the limits need: 2^inf = inf, 1 / inf = 0.
template <int kTerms>
__device__ __forceinline__ float gelu(float v, const Gelu<kTerms>& g) {
  const float square = v * v;
  float r = g.terms[kTerms - 1];
#pragma unroll
  for (int i = kTerms - 2; i >= 0; --i) r = fmaf(r, square, g.terms[i]);
  return v * fast_reciprocal(1.0f + fast_exp2(v * r));
}

}  // namespace tome::activation
