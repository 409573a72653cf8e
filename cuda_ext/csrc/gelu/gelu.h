// gelu(x weight^T + bias) in one product, which rounds its GELU and nothing before it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"

namespace tome::gelu_ops {

// With fewer rows PyTorch's two steps take less time.
constexpr int kLeastRows = 4096;

// gelu(v) = v / (1 + 2^(v R(|v|))) with a polynomial R: two slow instructions and no branch, and all limits
// are those of F.gelu. By the error function R is fitted, by tanh it is exact.
constexpr int kTerms = 8;
struct Gelu {
  float terms[kTerms];  // of 1, |v|, |v|^2 and so on
  float most;           // R is constant from here on
};

struct GeluParams {
  const void* x_ptr;       // [rows, inputs]
  const void* weight_ptr;  // [outputs, inputs], contiguous
  const void* bias_ptr;    // [outputs] or null
  void* out_ptr;           // [rows, outputs], contiguous
  int rows, outputs, inputs;
  int64_t row_stride;  // of x, in elements
  Gelu gelu;
  int multiprocessors;
  bool by_rows;  // tiles follow each other along rows of out, else along its columns
};

// By the tile of out that a block owns, and the blocks of a cluster along its rows and columns. False where
// CUTLASS or the driver refuses. In files of their own: each takes the compiler a minute.
using Launch = bool(const GeluParams& params, Dtype dtype, cudaStream_t stream);
Launch launch_hopper_128x192_1x2, launch_hopper_128x128_2x1;

}  // namespace tome::gelu_ops
