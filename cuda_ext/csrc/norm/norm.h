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
  // [batch, length - skip, channels], of the tokens behind the first `skip`; data_ptr null: only the norm of
  // x, and no slot map.
  View branch;
  int skip;
  void* y_ptr;  // [batch, tokens, channels], contiguous
  // [batch, tokens]: mean and 1 / standard deviation; null where no gradient will need them.
  float2* stats_ptr;
  Dtype y_dtype;
  Vector gamma, weight, bias;
  float eps;
  float share;  // 1 / channels
};

// aligned: 16 bytes of x and as many channels of everything else can be accessed at a time.
void launch_norm(const NormParams& params, Dtype dtype, Dtype branch_dtype, bool aligned,
                 cudaStream_t stream);

// From the gradients of x merged and of y to those of x and branch; data_ptr null where there is none.
struct BackwardParams {
  View grad_x, grad_y;      // [batch, tokens, channels]
  const void* merged_ptr;   // [batch, tokens, channels], contiguous
  const float2* stats_ptr;  // [batch, tokens]
  void* x_out_ptr;          // [batch, length, channels], contiguous
  void* branch_out_ptr;     // likewise
  Table<int32_t> slot;      // [batch, length]
  Table<float> size;        // [batch, length]
  Table<float> total;       // [batch, tokens]
  Vector weight, gamma;
  Dtype grad_y_dtype, branch_dtype;
  int64_t batch;
  int length, tokens, channels;
};

void launch_backward(const BackwardParams& params, Dtype dtype, bool aligned, cudaStream_t stream);

}  // namespace tome::norm
