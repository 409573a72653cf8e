// Sums over all rows of tensors, for the gradients of what every row is added to or multiplied by.
#pragma once

#include "norm.h"

namespace tome::norm {

// Of a, and of a * b, where b is normalised first if there are statistics.
struct ColumnJob {
  View a, b;                // [batch, rows, channels]; b's data_ptr null: only sums of a
  const float2* stats_ptr;  // [batch, rows] or null
  float* partial_ptr;       // [slabs, 2, channels]
  float* out_ptr[2];        // [channels]; null for a sum that is not wanted
  Dtype a_dtype, b_dtype;
  int64_t batch;
  int rows, channels, slabs;
};

constexpr int kMostJobs = 4;    // of a launch
constexpr int kColumnPack = 8;  // channels per thread where aligned

struct ColumnParams {
  ColumnJob jobs[kMostJobs];
  int count;
};

// Some hundreds of blocks whatever the GPU, so that every GPU adds in the same order.
inline int slabs(int64_t rows, int channels) {
  constexpr int64_t kBlocks = 768, kLeastRows = 64;
  const int64_t tiles = channels / (32 * kColumnPack) + 1;
  const int64_t most = (rows + kLeastRows - 1) / kLeastRows;
  const int64_t wanted = kBlocks / tiles > 1 ? kBlocks / tiles : 1;
  return static_cast<int>(most < 1 ? 1 : most < wanted ? most : wanted);
}

// Slabs of rows, and then over these; both in a fixed order.
void launch_columns(const ColumnParams& params, bool aligned, cudaStream_t stream);

}  // namespace tome::norm
