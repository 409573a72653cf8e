// Attention whose keys count by their size: softmax(q k^T scale + log size) v. Scores are never stored.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"

namespace tome::attention_ops {

// A [batch, heads, rows, head_dim] tensor as it lies; strides in elements, channels without gaps.
struct Heads {
  const void* data_ptr;
  int64_t batch_stride, head_stride, row_stride;
};

struct AttentionParams {
  Heads q, k, v;
  void* out_ptr;          // [batch, queries, heads, head_dim], contiguous
  float* lse_ptr;         // [batch, heads, queries], the log-sum-exp of every row; null: nobody wants it
  const float* size_ptr;  // [batch, keys]; null: plain attention
  int64_t size_batch_stride, size_stride;
  int64_t batch;
  int heads, queries, keys, head_dim;
  float scale;      // above kLeastScale
  bool is_aligned;  // every row of q, k and v (backward: of all that is read) starts on a 16-byte boundary
};

// Takes the kernel that fits: every architecture, every length, head dimensions of is_head_dim().
void launch_attention(const AttentionParams& params, Dtype dtype, cudaStream_t stream);

// The kernel for long sequences on compute capability 9.0; that the library holds code for 90a is for the
// caller to know. False, and nothing launched, where no tensor map describes the inputs.
bool launch_attention_hopper(const AttentionParams& params, Dtype dtype, int multiprocessors,
                             cudaStream_t stream);

// The bias enters a score before the scale does, so it is divided by it: this keeps the quotient finite.
constexpr float kLeastScale = 1e-30f;

constexpr int kHeadDims[] = {32, 64, 72, 80, 96, 128};

constexpr bool is_head_dim(int64_t head_dim) {
  for (const int known : kHeadDims) {
    if (head_dim == known) return true;
  }
  return false;
}

}  // namespace tome::attention_ops
