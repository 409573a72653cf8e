// Which of the two mma.sync kernels runs, and how a launch is divided.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "attention.h"

namespace tome::attention_ops {

constexpr int kWarpBits = 2;
constexpr int kWarps = 1 << kWarpBits;
constexpr int kThreads = kWarps * 32;
constexpr int kTileRows = 16;   // queries of one product
constexpr int kKeyStep = 16;    // keys of one product of weights and values
constexpr int kBlockKeys = 32;  // keys that lie together in shared memory
constexpr int kTeamKeys = 128;  // keys of the heads that share a block

template <int kValue>
using Count = std::integral_constant<int, kValue>;

// kRowTiles: 16-row tiles of queries that a warp holds at once, so that what it reads of keys and values
// serves twice. kBlocks: blocks that share a multiprocessor, as many as registers allow.
template <int kHeadDim>
struct WarpTiles {
  static constexpr int kRowTiles = kHeadDim <= 96 ? 2 : 1;
  static constexpr int kBlocks = kHeadDim <= 32 ? 3 : 2;
};

struct ResidentParams {
  AttentionParams attention;
  int team_bits;  // a block has 2^team_bits heads, of which each has a team of warps
  int splits;     // blocks of a head; 1 where a block has several
  int key_blocks;
};

struct StreamedParams {
  AttentionParams attention;
  int row_blocks;  // blocks of a head
};

// 32 keys and values in half precision, their bias in float32, twice.
__host__ __device__ constexpr int key_block_bytes(int head_dim) { return kBlockKeys * (4 * head_dim + 8); }

// The queries of all warps.
template <int kHeadDim>
__host__ __device__ constexpr int queries_bytes() {
  return kWarps * WarpTiles<kHeadDim>::kRowTiles * kTileRows * kHeadDim * 2;
}

template <class F>
void dispatch_half(Dtype dtype, F&& f) {
  if (dtype == Dtype::kHalf) return f(TypeTag<__half>{});
  if (dtype == Dtype::kBFloat16) return f(TypeTag<__nv_bfloat16>{});
}

template <class F, size_t... kI>
void dispatch_head_dim(int head_dim, F&& f, std::index_sequence<kI...>) {
  ((head_dim == kHeadDims[kI] ? f(Count<kHeadDims[kI]>{}) : void()), ...);
}
template <class F>
void dispatch_head_dim(int head_dim, F&& f) {
  dispatch_head_dim(head_dim, f, std::make_index_sequence<sizeof(kHeadDims) / sizeof(kHeadDims[0])>{});
}

namespace hopper {
// The resident kernel on warpgroup products: for compute capability 9.0, head dimension 64 and up to 256
// keys; few only where heads are few too.
constexpr int kLeastKeys = 48;  // and below the kernel whose warps take heads of their own
constexpr int kMostKeys = 256;
bool fits_resident(const AttentionParams& params, int multiprocessors);
void launch_resident(const AttentionParams& params, Dtype dtype, int multiprocessors, cudaStream_t stream);
}  // namespace hopper

ResidentParams plan_resident(const AttentionParams& params, int multiprocessors);
// While as many blocks share a multiprocessor as registers allow, or two. The limits are the GPU's: bytes per
// block and bytes per multiprocessor.
bool fits_resident(const ResidentParams& plan, int max_shared_bytes, int multiprocessor_bytes);
int64_t resident_bytes(const ResidentParams& plan);
void launch_resident(const ResidentParams& plan, Dtype dtype, int max_shared_bytes, cudaStream_t stream);
// Any length. Needs no more shared memory than every GPU has.
void launch_streamed(const AttentionParams& params, Dtype dtype, int max_shared_bytes, cudaStream_t stream);

// One of the two, on a GPU with so many multiprocessors and so many bytes per block and per multiprocessor.
inline void launch_mma(const AttentionParams& params, Dtype dtype, int multiprocessors, int max_shared_bytes,
                       int multiprocessor_bytes, cudaStream_t stream) {
  const ResidentParams plan = plan_resident(params, multiprocessors);
  if (fits_resident(plan, max_shared_bytes, multiprocessor_bytes)) {
    launch_resident(plan, dtype, max_shared_bytes, stream);
  } else {
    launch_streamed(params, dtype, max_shared_bytes, stream);
  }
}

}  // namespace tome::attention_ops
