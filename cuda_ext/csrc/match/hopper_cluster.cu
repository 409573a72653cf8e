// A whole image in a cluster of blocks, for so few images that a block of each leaves most multiprocessors
// idle: what takes one of them long is to load all heads of all keys.
//
// A block makes unit vectors of its share of the sources, for itself, and of the targets, which it writes
// into the shared memory of all blocks. It scores its sources with all targets; the first block selects. What
// blocks write to each other counts as bytes, which barriers wait for: a fence would wait for device memory.
//
// Shared memory of each: its sources, all targets, one packed best per source (of the first block only), and
// those of its own sources.
#include <cute/arch/cluster_sm90.hpp>

#include "../hopper/async.cuh"
#include "../launch.cuh"
#include "select.cuh"

namespace tome::match {
namespace {

constexpr int kBlocks = 8;  // of a cluster
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kClusterHeads = 16;  // loads under way
constexpr int kUnitColumns = 16;   // targets of a warp at a time, so that all warps have some
constexpr int kMultiprocessorBlocks = 2;
constexpr int kStaticBytes = kStorageBytes + kAccessBytes;  // with the barriers

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// What a block owns.
struct ClusterShare {
  int most_sources, first_source, sources;
  int first_target, targets;

  __host__ __device__ ClusterShare(const Params& p, int rank) {
    most_sources = divide_up(divide_up(p.sources, kProductRows), kBlocks) * kProductRows;
    first_source = rank * most_sources;
    sources = part(p.sources, first_source, most_sources);
    const int most_targets = divide_up(p.targets, kBlocks);
    first_target = rank * most_targets;
    targets = part(p.targets, first_target, most_targets);
  }
  __host__ __device__ static int part(int all, int first, int most) {
    const int left = all - first;
    return left < 0 ? 0 : left < most ? left : most;
  }
};

int64_t shared_bytes(const Params& p) {
  const int rows = ClusterShare(p, 0).most_sources;
  return static_cast<int64_t>(rows + p.targets) * row_bytes(p.padded) +
         8 * (static_cast<int64_t>(p.sources) + rows);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define TOME_CLUSTER __cluster_dims__(kBlocks)

template <class T, bool kAligned>
__device__ __forceinline__ void load_share(const Params& p, int b, const ClusterShare& share,
                                           char* sources_ptr, char* targets_ptr, uint32_t barrier) {
  const int stride = row_bytes(p.padded);
  const int rows = share.sources + share.targets;
  const int warp_rows = kWarpSize / p.row_lanes;
  const int lane = threadIdx.x % kWarpSize;
  const int channel = lane % p.row_lanes * kLaneChannels;
  // Every warp comes by once, if only for the barrier. Threads behind the last row redo it and store nothing.
  int base = threadIdx.x / kWarpSize * warp_rows;
  bool is_first = true;
#pragma unroll 1
  do {
    const int local = base + lane / p.row_lanes;
    const int at = max(min(local, rows - 1), 0);
    const bool is_source = at < share.sources;
    const int row = is_source ? share.first_source + at : p.sources + share.first_target + at - share.sources;
    float x[kLaneChannels];
    sum_heads<T, kAligned, false, kClusterHeads>(p, b, row_position(p, b, min(row, p.rows() - 1)), channel,
                                                 x);
    normalise(x, p.row_lanes);
    if (is_first) cute::cluster_wait();  // all blocks have begun, and their barriers too
    is_first = false;
    if (local < rows && channel < p.padded) {
      if (is_source) {
        store_split(reinterpret_cast<__half*>(sources_ptr + at * stride), channel, p.padded, x);
      } else {
        const Split split(x);
        const uint32_t to = sm90::shared_address(
            targets_ptr + (share.first_target + at - share.sources) * stride + channel * 2);
#pragma unroll
        for (int rank = 0; rank < kBlocks; ++rank) {
          const uint32_t other = sm90::of_block(barrier, rank);
          const uint32_t high = sm90::of_block(to, rank);
          sm90::store_async(other, high, *reinterpret_cast<const uint4*>(&split.high));
          sm90::store_async(other, high + 2 * p.padded, *reinterpret_cast<const uint4*>(&split.low));
        }
      }
    }
    __syncwarp();
    base += kWarps * warp_rows;
  } while (base < rows);
}

__device__ __forceinline__ void score_share(const Params& p, const ClusterShare& share,
                                            const char* sources_ptr, const char* targets_ptr,
                                            unsigned long long* best) {
  const int stride = row_bytes(p.padded);
  const int units = divide_up(share.sources, kProductRows);
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int i = threadIdx.x / kWarpSize; i < units * divide_up(p.targets, kUnitColumns); i += kWarps) {
    const int row = i % units * kProductRows;
    const int column = i / units * kUnitColumns;
    const char* const source_ptr[1] = {source_address(sources_ptr, row, share.sources - 1, stride)};
    const char* const target_ptr[1] = {target_address(targets_ptr, column, p.targets - 1, stride)};
    Best<1> found;
    score_tile<1, 2>(source_ptr, target_ptr, p.padded, column, p.targets, found);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned long long packed = reduce_best(found, 0, half);
      const int source = row + half * 8 + lane / 4;
      // An integer maximum: the order in which warps arrive can't be seen.
      if (lane % 4 == 0 && source < share.sources) atomicMax(best + source, packed);
    }
  }
}
#else
#define TOME_CLUSTER
#endif

template <class T, bool kAligned>
__global__ __launch_bounds__(kThreads, kMultiprocessorBlocks) TOME_CLUSTER
    void match_cluster_kernel(const Params p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  static __shared__ SelectStorage storage;
  static __shared__ uint64_t barriers[2];  // for the targets; for the best of all sources, in the first block
  const int b = blockIdx.x / kBlocks;
  const int rank = blockIdx.x % kBlocks;
  const ClusterShare share(p, rank);
  char* sources_ptr = dynamic_shared();
  char* targets_ptr = sources_ptr + share.most_sources * row_bytes(p.padded);
  auto* best = reinterpret_cast<unsigned long long*>(targets_ptr + p.targets * row_bytes(p.padded));
  unsigned long long* const own_best = best + p.sources;
  for (int i = threadIdx.x; i < share.most_sources; i += kThreads) own_best[i] = pack_best(-INFINITY, 0);
  const uint32_t barrier[2] = {sm90::shared_address(barriers), sm90::shared_address(barriers + 1)};
  if (threadIdx.x == 0) {
    sm90::barrier_init(barrier[0], 1);
    sm90::barrier_init(barrier[1], 1);
    sm90::barrier_fence();
    sm90::barrier_arrive_expecting(barrier[0], p.targets * 4 * p.padded);
    sm90::barrier_arrive_expecting(barrier[1], p.sources * 8);
  }
  __syncthreads();
  cute::cluster_arrive_relaxed();
  await_previous();
  write_fixed(p, b, rank * kThreads + threadIdx.x, kBlocks * kThreads);
  __syncwarp();
  load_share<T, kAligned>(p, b, share, sources_ptr, targets_ptr, barrier[0]);
  __syncthreads();
  sm90::barrier_wait(barrier[0], 0);
  score_share(p, share, sources_ptr, targets_ptr, own_best);
  __syncthreads();
  const uint32_t all_best = sm90::of_block(sm90::shared_address(best), 0);
  for (int i = threadIdx.x; i < share.sources; i += kThreads) {
    sm90::store_async(sm90::of_block(barrier[1], 0), all_best + 8 * (share.first_source + i), own_best[i]);
  }
  if (rank != 0) return;
  sm90::barrier_wait(barrier[1], 0);
  write_sources<kThreads>(p, b, best, storage);
#endif
}

template <class T, bool kAligned>
void launch(const Params& p, int max_shared_bytes, cudaStream_t stream) {
  launch_kernel(match_cluster_kernel<T, kAligned>, int64_t{kBlocks} * p.batch, kThreads,
                static_cast<int>(shared_bytes(p)), max_shared_bytes - kStaticBytes, stream, p, true);
}

}  // namespace

bool launch_cluster(const Params& p, Dtype dtype, bool aligned, int max_shared_bytes, int multiprocessors,
                    cudaStream_t stream) {
  if (int64_t{kBlocks} * p.batch > int64_t{kMultiprocessorBlocks} * multiprocessors) return false;
  if (p.targets == 0 || shared_bytes(p) + kStaticBytes > max_shared_bytes) return false;
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    aligned ? launch<T, true>(p, max_shared_bytes, stream) : launch<T, false>(p, max_shared_bytes, stream);
  });
  return true;
}

}  // namespace tome::match
