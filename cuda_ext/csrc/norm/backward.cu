// The gradient of merge_add_norm. With g and h the gradients of x' and y, xhat = (x' - mean) * rstd, d = h *
// weight:
//   of x'      e = g + rstd * (d - mean(d) - xhat * mean(d * xhat))
//   of x_i     size_i / total_m * e[m] for m = slot i; of branch_i gamma times that
//   of weight  sum of h * xhat over all rows, of bias sum of h, of gamma sum of branch_i times the gradient
//   of x_i: columns.cu
//
// backward_kernel: one warp per token, which reads the row of its slot, twice: the second time from the L1
// cache.
#include "../launch.cuh"
#include "any_dtype.cuh"

namespace tome::norm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

template <class T, int kCount>
__global__ __launch_bounds__(kThreads) void backward_kernel(const BackwardParams p) {
  const unsigned blocks = (p.length + kWarps - 1) / kWarps;  // per image
  const int64_t b = blockIdx.x / blocks;
  const int i = static_cast<int>(blockIdx.x % blocks * kWarps + threadIdx.x / kWarpSize);
  if (i >= p.length) return;
  const int64_t row = b * p.length + i;
  const int slot = p.slot.data_ptr == nullptr ? i : __ldg(p.slot.data_ptr + p.slot.offset(b, i));
  // A bad slot is seen in the result and never becomes an address.
  const bool is_valid = static_cast<unsigned>(slot) < static_cast<unsigned>(p.tokens);
  float share = is_valid ? 1.0f : NAN;
  const int m = is_valid ? slot : 0;
  if (p.slot.data_ptr != nullptr && is_valid) {
    const float size = p.size.data_ptr == nullptr ? 1.0f : __ldg(p.size.data_ptr + p.size.offset(b, i));
    const float total = __ldg(p.total.data_ptr + p.total.offset(b, m));
    share = size == total ? 1.0f : size / total;
  }
  const float2 stats = __ldg(p.stats_ptr + b * p.tokens + m);
  const T* merged_ptr = static_cast<const T*>(p.merged_ptr) + (b * p.tokens + m) * p.channels;
  const int64_t grad_x_at = b * p.grad_x.batch_stride + m * p.grad_x.row_stride;
  const int64_t grad_y_at = b * p.grad_y.batch_stride + m * p.grad_y.row_stride;
  const int64_t grad_x_stride = kCount == 1 ? p.grad_x.channel_stride : 1;
  const int64_t grad_y_stride = kCount == 1 ? p.grad_y.channel_stride : 1;

  const auto load = [&](int channel, float (&xhat)[kCount], float (&d)[kCount]) {
    unpack(load_pack<T, kCount>(merged_ptr + channel), xhat);
    load_as(p.grad_y_dtype, p.grad_y.data_ptr, grad_y_at + channel * grad_y_stride, d);
    float weight[kCount];
    if (p.weight.data_ptr != nullptr) load_vector(p.weight, channel, weight);
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      xhat[c] = (xhat[c] - stats.x) * stats.y;
      if (p.weight.data_ptr != nullptr) d[c] *= weight[c];
    }
  };
  constexpr int kStep = kWarpSize * kCount;
  const int first = threadIdx.x % kWarpSize * kCount;
  float mean = 0.0f, slope = 0.0f;
  if (p.grad_y.data_ptr != nullptr) {
#pragma unroll 2
    for (int channel = first; channel < p.channels; channel += kStep) {
      float xhat[kCount], d[kCount];
      load(channel, xhat, d);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        mean += d[c];
        slope = fmaf(d[c], xhat[c], slope);
      }
    }
    mean = warp_sum(mean) / static_cast<float>(p.channels);
    slope = warp_sum(slope) / static_cast<float>(p.channels);
  }
#pragma unroll 2
  for (int channel = first; channel < p.channels; channel += kStep) {
    float e[kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) e[c] = 0.0f;
    if (p.grad_x.data_ptr != nullptr) {
      unpack(load_pack<T, kCount>(static_cast<const T*>(p.grad_x.data_ptr) + grad_x_at +
                                  channel * grad_x_stride),
             e);
    }
    if (p.grad_y.data_ptr != nullptr) {
      float xhat[kCount], d[kCount];
      load(channel, xhat, d);
#pragma unroll
      for (int c = 0; c < kCount; ++c) e[c] = fmaf(stats.y, d[c] - mean - xhat[c] * slope, e[c]);
    }
#pragma unroll
    for (int c = 0; c < kCount; ++c) e[c] *= share;
    const int64_t at = row * p.channels + channel;
    store_pack(static_cast<T*>(p.x_out_ptr) + at, to_pack<T>(e));
    if (p.branch_out_ptr != nullptr) {
      if (p.gamma.data_ptr != nullptr) {
        float gamma[kCount];
        load_vector(p.gamma, channel, gamma);
#pragma unroll
        for (int c = 0; c < kCount; ++c) e[c] *= gamma[c];
      }
      store_as(p.branch_dtype, p.branch_out_ptr, at, e);
    }
  }
}

}  // namespace

void launch_backward(const BackwardParams& p, Dtype dtype, bool aligned, cudaStream_t stream) {
  const int64_t blocks = p.batch * ((p.length + kWarps - 1) / kWarps);
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel = aligned ? backward_kernel<T, kPackSize<T>> : backward_kernel<T, 1>;
    launch_kernel(kernel, blocks, kThreads, 0, 0, stream, p);
  });
}

}  // namespace tome::norm
