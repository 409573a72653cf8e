// Averaging along a slot map and the way back. Both directions gather: no thread adds to what another wrote.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"

namespace tome::merge_ops {

// A [batch, rows, channels] tensor as it lies; strides in elements.
struct View {
  void* data_ptr;
  int64_t batch_stride, row_stride, channel_stride;
};

// A [batch, length] tensor as it lies; data_ptr null where there is none.
template <class T>
struct Table {
  const T* data_ptr;
  int64_t batch_stride, stride;

  __host__ __device__ int64_t offset(int64_t b, int64_t i) const { return b * batch_stride + i * stride; }
};

struct GatherParams {
  View x;               // [batch, length, channels]
  View out;             // [batch, tokens, channels], contiguous
  float* total_ptr;     // [batch, tokens]; null: sum the rows as they are
  Table<int32_t> slot;  // [batch, length]
  Table<float> size;    // [batch, length]
  int64_t batch;
  int length, tokens, channels;
  int block_outputs;  // how many output rows one block owns, at most kMaxBlockOutputs; a gather twice that
};

struct SpreadParams {
  View x;               // [batch, tokens, channels]
  View out;             // [batch, length, channels], contiguous
  Table<int32_t> slot;  // [batch, length]
  Table<float> size;    // [batch, length]
  Table<float> total;   // [batch, tokens]; null: copy the rows as they are
  int64_t batch;
  int length, tokens, channels;
};

constexpr int kMaxBlockOutputs = 32;  // of a block of four warps

void launch_gather(const GatherParams& params, Dtype dtype, bool aligned, cudaStream_t stream);
void launch_spread(const SpreadParams& params, Dtype dtype, bool aligned, cudaStream_t stream);

}  // namespace tome::merge_ops
