// The metric of all tokens of images too large for one block: keys -> split unit vectors [batch, rows, 2,
// padded] in device memory, row_lanes threads per row.
#include "../launch.cuh"
#include "metric.cuh"

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
  let_next_start();
  const uint32_t first = blockIdx.x * (kMetricThreads / p.row_lanes) + threadIdx.x / p.row_lanes;
  const uint32_t rows = static_cast<uint32_t>(p.batch) * p.rows();
  const uint32_t row = min(first, rows - 1);  // the last warp stays whole for the shuffles
  const int b = static_cast<int>(row / p.rows());
  const int l = row_in_turn(p, static_cast<int>(row % p.rows()));
  const int channel = threadIdx.x % p.row_lanes * kLaneChannels;
  if (first < rows && l == 0 && channel == 0) p.done_ptr[b] = 0;
  float x[kLaneChannels];
  // The metric should stay in the L2 cache until scores are computed from it; keys need not.
  sum_heads<T, kAligned, true>(p, b, row_position(p, b, l), channel, x);
  normalise(x, p.row_lanes);
  if (first < rows && channel < p.padded) {
    const int64_t to = static_cast<int64_t>(b) * p.rows() + l;
    store_split(p.metric_ptr + to * 2 * p.padded, channel, p.padded, x);
  }
}

}  // namespace

void launch_metric(const Params& p, Dtype dtype, bool aligned, cudaStream_t stream) {
  const int64_t threads = static_cast<int64_t>(p.batch) * p.rows() * p.row_lanes;
  const int64_t blocks = (threads + kMetricThreads - 1) / kMetricThreads;
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_kernel(aligned ? match_metric_kernel<T, true> : match_metric_kernel<T, false>, blocks,
                  kMetricThreads, 0, 0, stream, p);
  });
}

}  // namespace tome::match
