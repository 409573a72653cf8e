// Images too large for one block, in two launches that stream tiles through shared memory.
//
// match_metric_kernel: keys -> split unit vectors [batch, rows, 2, padded], row_lanes threads per row.
// match_score_kernel: one block owns kRows sources of an image and streams the high halves of all targets
// through shared memory, in tiles of kColumns. What comes close to the best of its row is scored exactly,
// from device memory. The block that finishes an image last selects its pairs.
#include "../launch.cuh"
#include "scan.cuh"
#include "select.cuh"
#include "stream.cuh"

namespace tome::match {
namespace {

constexpr int kMetricThreads = 128;

// The i-th row to be read: sources and targets in turn, so that bipartite matching reads keys in their order.
__device__ __forceinline__ int row_in_turn(const Params& p, int i) {
  const int pairs = min(p.sources, p.targets);
  if (i < 2 * pairs) return i / 2 + i % 2 * p.sources;
  return i - pairs + (p.sources > pairs ? 0 : p.sources);
}

// The number of blocks tells the compiler that it need not save registers at the cost of loads in flight.
template <class T, bool kAligned>
__global__ __launch_bounds__(kMetricThreads, 1024 / kMetricThreads) void match_metric_kernel(const Params p) {
  const uint32_t first = blockIdx.x * (kMetricThreads / p.row_lanes) + threadIdx.x / p.row_lanes;
  const uint32_t rows = static_cast<uint32_t>(p.batch) * p.rows();
  const uint32_t row = min(first, rows - 1);  // the last warp stays whole for the shuffles
  const int b = static_cast<int>(row / p.rows());
  const int l = row_in_turn(p, static_cast<int>(row % p.rows()));
  const int channel = threadIdx.x % p.row_lanes * kLaneChannels;
  if (first < rows && l == 0 && channel == 0) p.done_ptr[b] = 0;
  float x[kLaneChannels];
  sum_heads<T, kAligned>(p, b, row_position(p, b, l), channel, x);
  normalise(x, p.row_lanes);
  if (first < rows && channel < p.padded) {
    const int64_t to = static_cast<int64_t>(b) * p.rows() + l;
    store_split(p.metric_ptr + to * 2 * p.padded, channel, p.padded, x);
  }
}

// Scoring a candidate takes about as long as scoring a row with this many targets in tiles does.
constexpr int kTargetsPerCandidate = 128;

// The first look of a warp: at kWarpColumns of each tile.
template <class Traits>
__device__ __forceinline__ void look(const Params& p, const Share& share, char* shared, int warp_row,
                                     int warp_column, uint32_t mask, Seen& seen) {
  const Stream<Traits, false> stream(p, share, shared);
  stream.begin();
  write_fixed(p, share.image, share.block * Traits::kThreads + threadIdx.x, share.blocks * Traits::kThreads);
  stream.await();
  const char* const source_ptr[kScanTiles] = {
      source_address(shared, warp_row, Traits::kRows - 1, stream.stride),
      source_address(shared, warp_row + kProductRows, Traits::kRows - 1, stream.stride)};
  const Sources<Traits::kSteps> sources(source_ptr);
  for (int tile = 0; tile * Traits::kColumns < p.targets; ++tile) {
    const char* target_ptr =
        target_address(stream.next(tile), warp_column, Traits::kColumns - 1, stream.stride);
    // Targets past the end repeat the last one: they change no maximum, and are never listed.
    if (tile * Traits::kColumns + warp_column >= p.targets) continue;
#pragma unroll
    for (int g = 0; g < Traits::kWarpGroups; ++g) {
      float score[kScanTiles][2][4];
      score_high(sources, target_ptr + g * kGroupColumns * stream.stride, stream.padded / kProductDepth,
                 score);
      seen.add(score, tile * Traits::kWarpGroups + g, mask);
    }
  }
}

// The second look where too many come close to be listed: all three products, except in tiles where nothing
// comes close.
template <class Traits>
__device__ __forceinline__ void look_again(const Params& p, const Share& share, char* shared, int warp_row,
                                           int warp_column, const uint32_t* block_top, float close,
                                           unsigned long long* block_best) {
  const Stream<Traits, true> stream(p, share, shared);
  stream.begin();
  stream.await();
  const char* const source_ptr[kScanTiles] = {
      source_address(shared, warp_row, Traits::kRows - 1, stream.stride),
      source_address(shared, warp_row + kProductRows, Traits::kRows - 1, stream.stride)};
  Best<kScanTiles> best;
#pragma unroll
  for (int i = 0; i < 2 * kScanTiles; ++i) {
    // No best score is lower.
    best.known[i / 2][i % 2] =
        score_of(block_top[warp_row + i * 8 + threadIdx.x % kWarpSize / 4]) - close / 2;
  }
  for (int tile = 0; tile * stream.kColumns < p.targets; ++tile) {
    const char* const target_ptr[1] = {
        target_address(stream.next(tile), warp_column, stream.kColumns - 1, stream.stride)};
    score_tile<kScanTiles, 2>(source_ptr, target_ptr, stream.padded, tile * stream.kColumns + warp_column,
                              p.targets, best);
  }
#pragma unroll
  for (int i = 0; i < 2 * kScanTiles; ++i) {
    const unsigned long long packed = reduce_best(best, i / 2, i % 2);
    const int lane = threadIdx.x % kWarpSize;
    if (lane % 4 == 0) atomicMax(block_best + warp_row + i * 8 + lane / 4, packed);
  }
}

// The best targets of the block's sources, packed, into block_best.
template <class Traits>
__device__ __forceinline__ void score_block(const Params& p, const Share& share, char* shared,
                                            unsigned long long* block_best, uint32_t* block_top) {
  static __shared__ int count;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warp_row = warp / Traits::kWarpsN * kScanRows;
  const int warp_column = warp % Traits::kWarpsN * Traits::kWarpColumns;
  for (int i = threadIdx.x; i < Traits::kRows; i += Traits::kThreads) {
    block_best[i] = pack_best(-INFINITY, 0);
    block_top[i] = 0;
  }
  if (threadIdx.x == 0) count = 0;
  const int groups = (p.targets + Traits::kColumns - 1) / Traits::kColumns * Traits::kWarpGroups;
  const uint32_t mask = group_mask(groups);
  Seen seen;
  look<Traits>(p, share, shared, warp_row, warp_column, mask, seen);

#pragma unroll
  for (int i = 0; i < 2 * kScanTiles; ++i) {
    float top = seen.best[i];
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
    if (lane % 4 == 0) atomicMax(block_top + warp_row + i * 8 + lane / 4, order_of(top));
  }
  __syncthreads();  // the tiles have served too: their memory takes both halves of the sources, and
                    // candidates
  const Stream<Traits, true> stream(p, share, shared);
  stream.template copy_rows<Traits::kRows>(share.sources_ptr, 0, share.rows - 1, shared);
  cute::cp_async_fence();
  const int sources_bytes = Traits::kRows * stream.stride;
  auto* candidates = reinterpret_cast<Candidate*>(shared + sources_bytes);
  const int capacity =
      min((Traits::tile_bytes(p.padded) - sources_bytes) / static_cast<int>(sizeof(Candidate)),
          Traits::kRows * (1 + p.targets / kTargetsPerCandidate));
  const float close = closeness(mask);
  int listed[2 * kScanTiles];  // groups of each row
  int all = 0;
#pragma unroll
  for (int i = 0; i < 2 * kScanTiles; ++i) {
    const int row = warp_row + i * 8 + lane / 4;
    const float least = score_of(block_top[row]) - close;
    // Where a third is close, all may be.
    listed[i] = seen.third[i] >= least ? groups : (seen.second[i] >= least) + (seen.best[i] >= least);
    if (row >= share.rows || seen.best[i] == -INFINITY) listed[i] = 0;
    all += listed[i];
  }
  int at = all > 0 ? atomicAdd(&count, all) : 0;
#pragma unroll
  for (int i = 0; i < 2 * kScanTiles; ++i) {
    for (int j = 0; j < listed[i]; ++j, ++at) {
      if (at >= capacity) break;
      const int group = listed[i] > 2 ? j : __float_as_uint(j == 0 ? seen.best[i] : seen.second[i]) & mask;
      candidates[at] = {warp_row + i * 8 + lane / 4,
                        group / Traits::kWarpGroups * Traits::kColumns + warp_column +
                            group % Traits::kWarpGroups * kGroupColumns + lane % 4 * 2};
    }
  }
  cute::cp_async_wait<0>();
  __syncthreads();
  if (count <= capacity) {
    for (int i = 2 * kBatch * warp; i < count; i += 2 * kBatch * Traits::kThreads / kWarpSize) {
      score_candidates<Traits::kSteps>(candidates, i, count, p, share, shared, block_best);
    }
    return;
  }
  look_again<Traits>(p, share, shared, warp_row, warp % Traits::kWarpsN * kGroupColumns, block_top, close,
                     block_best);
}

// The selection reads the scores five times; from device memory that would be five times its latency.
template <int kThreads>
__device__ __forceinline__ void copy_best(const unsigned long long* best_ptr, int sources,
                                          unsigned long long* copied) {
  constexpr int kInFlight = 4;
  for (int base = threadIdx.x; base < sources; base += kInFlight * kThreads) {
    unsigned long long best[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      best[j] = base + j * kThreads < sources ? best_ptr[base + j * kThreads] : 0;
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (base + j * kThreads < sources) copied[base + j * kThreads] = best[j];
    }
  }
  __syncthreads();
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocks) void match_score_kernel(const Params p) {
  static __shared__ bool is_last;
  char* shared = dynamic_shared();
  const int blocks = (p.sources + Traits::kRows - 1) / Traits::kRows;  // per image
  const int b = blockIdx.x / blocks;
  const int block = blockIdx.x % blocks;
  const int first_row = block * Traits::kRows;
  const int rows = min(Traits::kRows, p.sources - first_row);
  const __half* image_ptr = p.metric_ptr + static_cast<int64_t>(b) * p.rows() * 2 * p.padded;
  const Share share{image_ptr + static_cast<int64_t>(first_row) * 2 * p.padded,
                    image_ptr + static_cast<int64_t>(p.sources) * 2 * p.padded,
                    rows,
                    b,
                    block,
                    blocks};
  auto* block_best = reinterpret_cast<unsigned long long*>(shared + Traits::tile_bytes(p.padded));
  score_block<Traits>(p, share, shared, block_best, reinterpret_cast<uint32_t*>(block_best + Traits::kRows));
  __syncthreads();
  if (p.merged == p.sources) {  // nothing to select
    for (int i = threadIdx.x; i < rows; i += Traits::kThreads)
      write_merged(p, b, first_row + i, block_best[i]);
    return;
  }
  unsigned long long* best_ptr = p.best_ptr + static_cast<int64_t>(b) * p.sources;
  for (int i = threadIdx.x; i < rows; i += Traits::kThreads) best_ptr[first_row + i] = block_best[i];
  // Every thread publishes its scores before the block counts itself as done; the last block sees them all.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(p.done_ptr + b, 1) == blocks - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  // The tiles have served: their memory holds what the selection needs, and the scores where they fit.
  auto& storage = *reinterpret_cast<SelectStorage*>(shared);
  auto* copied = reinterpret_cast<unsigned long long*>(shared + kStorageBytes);
  const bool fits = kStorageBytes + static_cast<int64_t>(p.sources) * 8 <= Traits::shared_bytes(p.padded);
  if (fits) copy_best<Traits::kThreads>(best_ptr, p.sources, copied);
  write_sources<Traits::kThreads>(p, b, fits ? copied : best_ptr, storage);
}

template <class Traits>
bool try_score(const Params& p, int max_shared_bytes, cudaStream_t stream) {
  const int bytes = Traits::shared_bytes(p.padded);
  if (Traits::kSteps > 0 && Traits::kSteps * kProductDepth != p.padded) return false;
  if (bytes + kAccessBytes > max_shared_bytes) return false;
  const int64_t blocks = (p.sources + Traits::kRows - 1) / Traits::kRows;
  launch_kernel(match_score_kernel<Traits>, blocks * p.batch, Traits::kThreads, bytes,
                max_shared_bytes - kAccessBytes, stream, p);
  return true;
}

}  // namespace

bool launch_tiled(const Params& p, Dtype dtype, bool aligned, int max_shared_bytes, int multiprocessors,
                  cudaStream_t stream) {
  const int64_t threads = static_cast<int64_t>(p.batch) * p.rows() * p.row_lanes;
  const int64_t blocks = (threads + kMetricThreads - 1) / kMetricThreads;
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_kernel(aligned ? match_metric_kernel<T, true> : match_metric_kernel<T, false>, blocks,
                  kMetricThreads, 0, 0, stream, p);
  });
  // Where two blocks per multiprocessor hold all sources they get eight warps each, else four blocks four.
  // Head dimensions of 64 and 80 have kernels of their own; wide metrics on GPUs with little shared memory
  // take the smaller tiles.
  const bool is_wide = static_cast<int64_t>(p.batch) * ((p.sources + 63) / 64) <= 2 * multiprocessors;
  if (is_wide) {
    if (try_score<Traits<64, 128, 4, 4, 3, 2>>(p, max_shared_bytes, stream)) return true;
    if (try_score<Traits<64, 128, 4, 5, 3, 2>>(p, max_shared_bytes, stream)) return true;
  }
  return try_score<Traits<64, 64, 2, 4, 3, 4>>(p, max_shared_bytes, stream) ||
         try_score<Traits<64, 64, 2, 5, 3, 4>>(p, max_shared_bytes, stream) ||
         try_score<Traits<64, 128, 4, 0, 2, 2>>(p, max_shared_bytes, stream) ||
         try_score<Traits<64, 64, 2, 0, 2, 2>>(p, max_shared_bytes, stream) ||
         try_score<Traits<32, 32, 2, 0, 2, 2>>(p, max_shared_bytes, stream);
}

}  // namespace tome::match
