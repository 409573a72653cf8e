// Where tokens stand: queries and keys turned by their position, and the positions that a merge leaves.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../merge/merge.h"

namespace tome::position {

using merge_ops::Table;

// A [batch, heads, rows, channels] tensor as it lies.
struct Heads {
  const void* data_ptr;
  int64_t batch_stride, head_stride, row_stride, channel_stride;
};

struct RotateParams {
  Heads q, k;                   // [batch, q_heads or k_heads, tokens, dim]
  void *q_out_ptr, *k_out_ptr;  // [batch, tokens, q_heads or k_heads, dim], contiguous
  Heads table;                  // [batch, heads, rows, 2 * dim]: sines, then cosines; stride 0: all alike
  Dtype table_dtype;
  Table<int64_t> home;  // [batch, tokens], one of the two or none: token n stands in place n
  Table<int32_t> short_home;
  int64_t batch;
  int tokens, prefix, rows, q_heads, k_heads, dim;
  bool is_half;  // pairs are dim / 2 apart, and not neighbours
  bool is_back;  // the gradient: the transposed rotation
};

constexpr int kRotateThreads = 256;
constexpr int kRotateHeads = 4;  // of a thread, which reads the table once
constexpr int kFewChannels = 4;  // for heads whose halves are no whole accesses: 72 or 88 channels of 16 bits

// Threads that an image takes where each moves `count` channels of either half of a head.
inline int64_t rotate_units(const RotateParams& p, int count) {
  const int64_t chunks = (p.q_heads + p.k_heads + kRotateHeads - 1) / kRotateHeads;
  return p.tokens * chunks * (p.dim / (2 * count));
}

// count: the channels that can be accessed at a time in either half of every row: 16 bytes, kFewChannels
// or 1.
void launch_rotate(const RotateParams& params, Dtype dtype, int count, cudaStream_t stream);

struct HomesParams {
  Table<int32_t> slot;   // [batch, length]
  Table<int64_t> home;   // [batch, length]; data_ptr null: each in its own place
  Table<uint8_t> valid;  // [batch, length]; data_ptr null: all are
  int64_t* out_ptr;      // [batch, tokens], contiguous
  int64_t batch;
  int length, tokens;
};

struct PairParams {
  const void* bias_ptr;  // [heads, places, places], strides in elements
  int64_t head_stride, row_stride, column_stride;
  Table<int64_t> home;    // [batch, tokens]
  Table<float> key_bias;  // [batch, tokens], or none
  void* out_ptr;          // [batch, heads, tokens, padded], contiguous; zeros behind the tokens
  int64_t batch;
  int heads, places, tokens, padded;
};

constexpr int kPairThreads = 256;
constexpr int kPairRows = 64;     // of a block
constexpr int kPairColumns = 4;   // of a lane
constexpr int kPairMultiple = 8;  // to which rows are filled up: kernels of attention copy other masks

__host__ __device__ inline int64_t pair_blocks(const PairParams& p) {  // of an image
  return (static_cast<int64_t>(p.heads) * p.tokens + kPairRows - 1) / kPairRows;
}

void launch_pairs(const PairParams& params, Dtype dtype, cudaStream_t stream);

constexpr int kHomesOutputs = 2048;  // of a block

void launch_homes(const HomesParams& params, cudaStream_t stream);

}  // namespace tome::position
