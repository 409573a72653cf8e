// The GELUs, as one formula, and kernels for what has no product to be part of.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"

namespace tome::activation {

enum class GeluKind { kErf, kTanh, kQuick };

// gelu(v) = v / (1 + 2^(v R(v^2))) with a polynomial R whose values fall from 1 on to -inf: two slow
// instructions, no branch, and all limits are those of F.gelu.
template <int kTerms>
struct Gelu {
  float terms[kTerms];  // of 1, v^2, v^4 and so on
};

// By the error function R is fitted to log2(Phi(-v) / Phi(v)) / v. Inside of a product, errors are weighed by
// those of PyTorch's two roundings in each dtype, of which the result has less in every range. Of numbers
// that are rounded already it is as near to the truth as PyTorch's is (tests/test_linear_gelu.py).
constexpr int kFewTerms = 5, kManyTerms = 7;
constexpr Gelu<kFewTerms> kErfHalf{
    {-2.30128303f, -1.06564434e-01f, 8.90788943e-04f, 2.21912399e-05f, -7.49920311e-07f}};
constexpr Gelu<kFewTerms> kErfBFloat16{
    {-2.29986454f, -1.08215934e-01f, 1.28878993e-03f, -8.14833121e-06f, -4.95278586e-08f}};
constexpr Gelu<kManyTerms> kErf{{-2.30185498f, -0.10534467f, 3.17070762e-04f, 1.17150379e-04f,
                                 -7.54125141e-06f, 2.13152574e-07f, -2.35686666e-09f}};
// The others are exact: -2 sqrt(2 / pi) log2(e), and that times 0.044715; and -1.702 log2(e).
constexpr Gelu<2> kTanh{{-2.30220819f, -0.102943239f}};
constexpr Gelu<2> kQuick{{-2.45546696f, 0.0f}};

template <int kTerms>
Gelu<kTerms> gelu_of(GeluKind kind, Dtype dtype) {
  if (kind == GeluKind::kErf) {
    if constexpr (kTerms == kManyTerms)
      return kErf;
    else
      return dtype == Dtype::kHalf ? kErfHalf : kErfBFloat16;
  }
  const Gelu<2>& exact = kind == GeluKind::kTanh ? kTanh : kQuick;
  Gelu<kTerms> made{{exact.terms[0], exact.terms[1]}};
  made.terms[kTerms - 1] = -2e-38f;  // of which nothing is left below infinity
  return made;
}

struct GeluParams {
  const void* x_ptr;
  void* out_ptr;  // may be x
  int64_t count;  // elements, all contiguous
  Gelu<kManyTerms> gelu;
};

struct GeluBackwardParams {
  const void* grad_ptr;
  const void* x_ptr;
  void* out_ptr;
  int64_t count;
};

// aligned: 16 bytes can be accessed at a time, and `count` is a multiple of them. The first is for 16-bit
// dtypes.
void launch_gelu(const GeluParams& params, Dtype dtype, bool aligned, cudaStream_t stream);
void launch_gelu_backward(const GeluBackwardParams& params, GeluKind kind, Dtype dtype, bool aligned,
                          cudaStream_t stream);

}  // namespace tome::activation
