// Host side of every operation that adds a branch: how its vectors lie.
#pragma once

#include <optional>

#include "../merge/host.h"
#include "norm.h"

namespace tome {

// A [C] tensor for x [B, N, C], or one of as many channels as are told.
norm::Vector vector(const std::optional<Tensor>& tensor, const char* name, const Tensor& x,
                    int64_t channels = -1);

// Whether 16 bytes of x, and as many channels of the others, can be read at a time: packs of as many channels
// take 8, 16 or 32 bytes of them.
bool is_aligned_vector(const norm::Vector& vector);
bool is_aligned_like(const View& view, Dtype dtype, Dtype x_dtype, int64_t channels);

// Mean and 1 / standard deviation of every row, as merged_norm makes them: kernels read them as they lie.
const float2* stats_of(const Tensor& stats, const Tensor& like, int64_t batch, int64_t rows);

// A branch of x [B, N, C]: of its shape and dtype, or of any where x is float32. The dtype.
Dtype check_branch(const Tensor& branch, const Tensor& x);

}  // namespace tome
