// Matching: from keys to a slot map. The metric of a token is the sum of its keys over the heads (the mean's
// direction), scores are cosines, each source token takes its best target, and the r best pairs are merged.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"

namespace tome::match {

// How the i-th source and the j-th target are found in the sequence.
enum class Pairing {
  kBipartite,  // sources at even positions, targets at odd ones
  kRuns,       // of each run of `run` tokens the last is a target
  kListed,     // positions given per image
};

// Rows are numbered sources first, then targets: row l < sources is source l, the others are targets.
struct Params {
  const void* keys_ptr;
  int64_t batch_stride, head_stride, token_stride, channel_stride;  // in elements
  const int64_t* sources_ptr;                                       // [batch, sources], kListed only
  const int64_t* targets_ptr;                                       // [batch, targets], kListed only
  int32_t* slot_ptr;                                                // [batch, tokens]
  __half* metric_ptr;            // scratch [batch, rows, 2, padded]: high and low halves; tiled path only
  unsigned long long* best_ptr;  // scratch [batch, sources]; tiled path only
  int* done_ptr;                 // scratch [batch]: blocks of an image that have finished; tiled path only
  int batch, heads, tokens, channels;
  int padded;  // channels rounded up to the depth of one matrix product
  int prefix, sources, targets;
  int merged;  // r: how many sources merge; the best ones
  int run;
  int row_lanes;  // threads that share one row: a power of two, 8 channels each
  Pairing pairing;

  __host__ __device__ int rows() const { return sources + targets; }
  __host__ __device__ int first_target() const { return prefix + sources - merged; }  // its slot
};

constexpr int kProductDepth = 16;  // channels per matrix product
constexpr int kMaxChannels = 256;
constexpr int kReservedBytes = 1024;  // of shared memory, that CUDA takes for itself per block
constexpr int kLaneChannels = 8;      // channels of one thread while loading

// Bytes between rows in shared memory: high and low halves, then one 16-byte step, so that the eight rows
// that one ldmatrix reads together fall into different banks (padded / 4 is even, plus one is odd).
constexpr int row_bytes(int padded) { return 4 * padded + 16; }

// The derived sizes: padding, and the smallest power of two of threads that covers a row.
inline void set_layout(Params& params) {
  params.padded = (params.channels + kProductDepth - 1) / kProductDepth * kProductDepth;
  params.row_lanes = 1;
  while (params.row_lanes * kLaneChannels < params.padded) params.row_lanes *= 2;
}

// The path of one block per image pays while two blocks share a multiprocessor, so that one loads while the
// other scores. The two limits are the GPU's: bytes per block and bytes per multiprocessor.
bool fits_one_block(const Params& params, int max_shared_bytes, int multiprocessor_bytes);
void launch_fused(const Params& params, Dtype dtype, bool aligned, int max_shared_bytes, cudaStream_t stream);
// On compute capability 9.0, with code for 90a: a cluster of blocks per image, where images are few and fit
// one block. False for all others.
bool launch_cluster(const Params& params, Dtype dtype, bool aligned, int max_shared_bytes,
                    int multiprocessors, cudaStream_t stream);
// Longer images take two launches: the metric into device memory, then scores and selection.
void launch_metric(const Params& params, Dtype dtype, bool aligned, cudaStream_t stream);
// False where the GPU has too little shared memory for even the smallest tile.
bool launch_tiled(const Params& params, int max_shared_bytes, int multiprocessors, cudaStream_t stream);
// On compute capability 9.0, with code for 90a: for long images and head dimensions of 49 to 80. False for
// all others.
bool launch_hopper(const Params& params, cudaStream_t stream);

}  // namespace tome::match
