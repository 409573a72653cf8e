// out[i] = x[slot i], or that times size_i / total[slot i]: the unmerge and the gradient of a merge. One warp
// per output row, one launch.
#include "../launch.cuh"
#include "../vector.cuh"
#include "merge.h"

namespace tome::merge_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPacks = 4;  // loads in flight per thread

template <class T, int kCount>
__global__ __launch_bounds__(kThreads) void spread_kernel(const SpreadParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (row >= p.batch * p.length) return;
  const int64_t b = row / p.length;
  const int i = static_cast<int>(row % p.length);
  const int slot = __ldg(p.slot.data_ptr + p.slot.offset(b, i));
  const bool is_valid = static_cast<unsigned>(slot) < static_cast<unsigned>(p.tokens);
  float weight = 1.0f;
  if (p.total.data_ptr != nullptr && is_valid) {
    const float size = p.size.data_ptr == nullptr ? 1.0f : __ldg(p.size.data_ptr + p.size.offset(b, i));
    weight = size / __ldg(p.total.data_ptr + p.total.offset(b, slot));
  }
  const T* x_ptr = static_cast<const T*>(p.x.data_ptr) + b * p.x.batch_stride + slot * p.x.row_stride;
  T* out_ptr = static_cast<T*>(p.out.data_ptr) + b * p.out.batch_stride + i * p.out.row_stride;
  constexpr int kStep = kWarpSize * kCount;
  for (int base = threadIdx.x % kWarpSize * kCount; base < p.channels; base += kPacks * kStep) {
    Pack<T, kCount> pack[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int at = base + k * kStep;
      if (is_valid) {
        if (at < p.channels) pack[k] = load_pack<T, kCount>(x_ptr + at * p.x.channel_stride);
      } else {
        // A bad slot is seen in the result and never becomes an address.
#pragma unroll
        for (int c = 0; c < kCount; ++c) pack[k].value[c] = from_float<T>(NAN);
      }
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int at = base + k * kStep;
      if (at >= p.channels) break;
      if (p.total.data_ptr != nullptr) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          pack[k].value[c] = from_float<T>(weight * to_float(pack[k].value[c]));
        }
      }
      store_pack(out_ptr + at, pack[k]);
    }
  }
}

template <class T, int kCount>
void launch(const SpreadParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.batch * p.length + kWarps - 1) / kWarps;
  launch_kernel(spread_kernel<T, kCount>, blocks, kThreads, 0, 0, stream, p);
}

}  // namespace

void launch_spread(const SpreadParams& p, Dtype dtype, bool aligned, cudaStream_t stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    aligned ? launch<T, kPackSize<T>>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace tome::merge_ops
