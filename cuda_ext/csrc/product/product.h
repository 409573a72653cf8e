// A linear layer, and gelu(x weight^T + bias), in one product that rounds once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../activation/gelu.h"
#include "../dtype.h"

namespace tome::products {

// From as many on the product with a GELU takes less time than that of cuBLAS and a GELU behind it.
constexpr int kLeastRows = 2048;
// From as many on, a plain product may be ours; with fewer it waits for the host.
constexpr int64_t kManyRows = 16384;

struct ProductParams {
  const void* x_ptr;       // [rows, inputs]
  const void* weight_ptr;  // [outputs, inputs], contiguous
  const void* bias_ptr;    // [outputs] or null
  void* out_ptr;           // [rows, outputs], contiguous
  int rows, outputs, inputs;
  int64_t row_stride;                            // of x, in elements
  activation::Gelu<activation::kFewTerms> gelu;  // where there is one
  int multiprocessors;
};

// A block's tile. Wide ones are read from shared memory least often, and flat ones are there for few rows.
struct TileShape {
  int rows, outputs;
};
constexpr TileShape kWide{128, 192}, kTall{128, 128}, kFlat{64, 128};

// False where CUTLASS or the driver refuses. In files of their own: each takes the compiler a minute.
using Launch = bool(const ProductParams& params, Dtype dtype, cudaStream_t stream);
Launch launch_hopper_gelu_wide, launch_hopper_gelu, launch_hopper_gelu_flat, launch_hopper_linear_wide;

}  // namespace tome::products
