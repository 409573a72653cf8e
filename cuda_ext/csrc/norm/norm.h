// Residual add, merge and LayerNorm in one step, and its gradient.
#pragma once

#include "../merge/merge.h"

namespace tome::norm {

using merge_ops::GatherParams;
using merge_ops::Table;
using merge_ops::View;

// A [channels] tensor of any dtype as it lies; data_ptr null where there is none.
struct Vector {
  const void* data_ptr;
  int64_t stride;
  Dtype dtype;
};

struct NormParams {
  GatherParams merge;  // x, and x merged; without a slot map every token is an output
  View branch;         // [batch, length, channels]
  void* y_ptr;         // [batch, tokens, channels], contiguous
  float2* stats_ptr;   // [batch, tokens]: mean and 1 / standard deviation
  Dtype y_dtype;
  Vector gamma, weight, bias;
  float eps;
};

// aligned: 16 bytes of x and as many channels of everything else can be accessed at a time.
void launch_norm(const NormParams& params, Dtype dtype, Dtype branch_dtype, bool aligned, cudaStream_t stream);

}  // namespace tome::norm
