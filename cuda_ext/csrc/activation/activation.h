// The activations of MLPs that PyTorch computes in several passes.
#pragma once

#include <cuda_runtime.h>

#include "../norm/norm.h"

namespace tome::activation {

using merge_ops::View;

struct ActivationParams {
  View x;         // [batch, rows, channels]
  View gate;      // likewise; data_ptr null: x is its own gate, by quick GELU
  void* out_ptr;  // [batch, rows, channels], contiguous
  int64_t batch;
  int rows, channels;
};

constexpr int kThreads = 256;
constexpr int kPacks = 4;  // of a thread under way

inline int64_t blocks_per_image(const ActivationParams& p, int count) {
  const int64_t packs = static_cast<int64_t>(p.rows) * (p.channels / count);
  return (packs + kThreads * kPacks - 1) / (kThreads * kPacks);
}

// aligned: 16 bytes of x and gate can be accessed at a time.
void launch_activation(const ActivationParams& params, Dtype dtype, bool aligned, cudaStream_t stream);

// SwiGLU and the LayerNorm of its first `width` channels; behind them zeros.
struct NormedParams {
  ActivationParams rows_of;
  norm::Vector weight, bias;  // [width]
  int width;
  float share;  // 1 / width
  float eps;
};

constexpr int kRowThreads = 128;  // of a row
constexpr int kMostPacks = 4;     // of a thread, that it keeps; longer rows are read once more

void launch_normed(const NormedParams& params, Dtype dtype, bool aligned, cudaStream_t stream);

}  // namespace tome::activation
