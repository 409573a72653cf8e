// Gradients of attention with sizes. With weights P = softmax(q k^T scale + log size) and the gradient dO of
// the output O: dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q; delta is each
// row's sum of dO * O. P is computed anew from the log-sum-exp of each row, which the forward kernels leave.
#pragma once

#include "plan.h"

namespace tome::attention_ops {

// [batch, rows, heads, head_dim] in elements; heads and channels without gaps.
struct Gradient {
  void* data_ptr;
  int64_t batch_stride, row_stride;
};

struct BackwardParams {
  AttentionParams forward;  // its log-sum-exp is read
  Heads out, grad;
  float* delta_ptr;  // [batch, heads, queries]: what the first of two kernels leaves for the second
  Gradient grad_q, grad_k, grad_v;
  int warps;   // of a block; each has kKeyTiles times 16 keys
  int splits;  // blocks of a head
};

// kKeyTiles: 16-row tiles of keys whose gradients a warp holds in registers, so that what it reads of queries
// serves twice. kMostWarps: as many as registers allow in one block of a multiprocessor. kFewWarps: in each
// of two blocks.
template <int kHeadDim>
struct KeysShape {
  static constexpr int kKeyTiles = kHeadDim <= 80 ? 2 : 1;
  static constexpr int kMostWarps = 8;
  static constexpr int kFewWarps = kMostWarps / 2;
};

// How the kernel of keys is launched. Whole: all keys of a head in one block, which writes all gradients.
BackwardParams plan_backward(const BackwardParams& params, bool is_whole);
bool fits_whole(const BackwardParams& plan, int max_shared_bytes);
void launch_backward_keys(const BackwardParams& plan, Dtype dtype, bool is_whole, int max_shared_bytes,
                          cudaStream_t stream);
// The gradient of the queries, and delta.
void launch_backward_queries(const BackwardParams& params, Dtype dtype, int max_shared_bytes,
                             cudaStream_t stream);

}  // namespace tome::attention_ops
