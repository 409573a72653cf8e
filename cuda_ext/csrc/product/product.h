// A linear layer, and gelu(x weight^T + bias), in one product that rounds once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"

namespace tome::products {

// With fewer rows PyTorch's two steps take less time.
constexpr int kLeastRows = 4096;

// gelu(v) = v / (1 + 2^(v R(v^2))) with a polynomial R whose values fall from 1 on to -inf: two slow
// instructions, no branch, and all limits are those of F.gelu. By the error function R is fitted, by tanh it
// is exact but for a last term that nothing is left of below infinity.
constexpr int kTerms = 5;
struct Gelu {
  float terms[kTerms];  // of 1, v^2, v^4 and so on
};

struct ProductParams {
  const void* x_ptr;       // [rows, inputs]
  const void* weight_ptr;  // [outputs, inputs], contiguous
  const void* bias_ptr;    // [outputs] or null
  void* out_ptr;           // [rows, outputs], contiguous
  int rows, outputs, inputs;
  int64_t row_stride;  // of x, in elements
  Gelu gelu;           // where there is one
  int multiprocessors;
};

// Outputs of a block's tile.
constexpr int kOutputs = 128, kWideOutputs = 192;

// False where CUTLASS or the driver refuses. In files of their own: each takes the compiler a minute.
using Launch = bool(const ProductParams& params, Dtype dtype, cudaStream_t stream);
Launch launch_hopper_gelu, launch_hopper_gelu_wide, launch_hopper_linear_wide;

}  // namespace tome::products
