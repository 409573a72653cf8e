// out[m] = home of the first token i with slot i = m, of the first valid one where there is one: in whose place
// a merged token stands. One launch.
//
// A block owns up to kHomesOutputs tokens of an image, and looks at all slots. Threads meet in integer
// minima, so it matters to none which comes first.
#include "../launch.cuh"
#include "position.h"

namespace tome::position {
namespace {

constexpr int kThreads = 256;

__global__ __launch_bounds__(kThreads) void homes_kernel(const HomesParams p) {
  static __shared__ int member[kHomesOutputs];
  const int blocks = (p.tokens + kHomesOutputs - 1) / kHomesOutputs;  // per image
  const int64_t b = blockIdx.x / blocks;
  const int first = static_cast<int>(blockIdx.x % blocks) * kHomesOutputs;
  const int count = min(kHomesOutputs, p.tokens - first);
  for (int m = threadIdx.x; m < count; m += kThreads) member[m] = 2 * p.length - 1;
  __syncthreads();
  for (int i = threadIdx.x; i < p.length; i += kThreads) {
    const int m = __ldg(p.slot.data_ptr + p.slot.offset(b, i)) - first;
    if (m < 0 || m >= count) continue;  // a slot out of range is nobody's
    // Padding comes behind all that is valid.
    const bool is_valid = p.valid.data_ptr == nullptr || __ldg(p.valid.data_ptr + p.valid.offset(b, i)) != 0;
    atomicMin(&member[m], is_valid ? i : i + p.length);
  }
  __syncthreads();  // every member has been counted
  for (int m = threadIdx.x; m < count; m += kThreads) {
    const int i = member[m] < p.length ? member[m] : member[m] - p.length;
    p.out_ptr[b * p.tokens + first + m] =
        p.home.data_ptr == nullptr ? i : __ldg(p.home.data_ptr + p.home.offset(b, i));
  }
}

}  // namespace

void launch_homes(const HomesParams& p, cudaStream_t stream) {
  const int64_t blocks = p.batch * ((p.tokens + kHomesOutputs - 1) / kHomesOutputs);
  launch_kernel(homes_kernel, blocks, kThreads, 0, 0, stream, p);
}

}  // namespace tome::position
