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
  int block_outputs;  // how many output rows one block owns, at most kMaxBlockOutputs
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

constexpr int kMaxBlockOutputs = 32;  // so that a bit for each fits a word

// Few rows: a warp for each, so that a single image still reaches many multiprocessors. Many rows: larger
// blocks, so that the scan of the slots is shared by more of them, all alike; the largest only where
// there is much to scan, as a grid of few blocks ends unevenly. Without a map nothing is scanned.
inline int block_outputs(int64_t batch, int64_t length, int64_t tokens, bool has_map) {
  constexpr int64_t kFewRows = 1584, kManyRows = 8192, kLong = 2048;
  const int64_t rows = batch * tokens;
  if (rows <= kManyRows || !has_map) return rows <= kFewRows ? 4 : 8;
  const int64_t most = length > kLong ? kMaxBlockOutputs : kMaxBlockOutputs / 2;
  const int64_t blocks = (tokens + most - 1) / most;
  return static_cast<int>((tokens + blocks - 1) / blocks);
}

void launch_gather(const GatherParams& params, Dtype dtype, bool aligned, cudaStream_t stream);
void launch_spread(const SpreadParams& params, Dtype dtype, bool aligned, cudaStream_t stream);

}  // namespace tome::merge_ops
