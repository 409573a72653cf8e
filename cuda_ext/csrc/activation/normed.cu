// out = LayerNorm(gate * sigmoid(gate) * x) over the first channels of each row, and zeros behind them: one
// read, one write, rounded once. A block owns a row. A thread keeps its packs; of rows too long for that, and
// of those that can't be read 16 bytes at a time, each pass over the row reads and multiplies again.
#include "../launch.cuh"
#include "../norm/any_dtype.cuh"
#include "activation.h"
#include "sigmoid.cuh"

namespace tome::activation {
namespace {

constexpr int kWarps = kRowThreads / kWarpSize;

// The sum over the block, in the same order always. `shared` is free again at the next call but one.
__device__ __forceinline__ float block_sum(float value, float (&shared)[kWarps]) {
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared[w];
  return sum;
}

template <int kCount>
__device__ __forceinline__ void parameter(const norm::Vector& vector, float missing, int channel, int width,
                                          float (&v)[kCount]) {
  if (vector.data_ptr != nullptr && channel + kCount <= width) return norm::load_vector(vector, channel, v);
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    float one[1] = {missing};
    if (vector.data_ptr != nullptr && channel + c < width) norm::load_vector(vector, channel + c, one);
    v[c] = one[0];
  }
}

template <class T, int kCount, int kPacks>
__global__ __launch_bounds__(kRowThreads) void normed_kernel(const NormedParams p) {
  static __shared__ float sums[kWarps], squares[kWarps];
  constexpr int kKept = kPacks > 0 ? kPacks : 1;
  constexpr int kStep = kRowThreads * kCount;
  const ActivationParams& in = p.rows_of;
  const int64_t b = blockIdx.x / in.rows, n = blockIdx.x % in.rows;
  const T* x_ptr = static_cast<const T*>(in.x.data_ptr) + b * in.x.batch_stride + n * in.x.row_stride;
  const T* gate_ptr =
      static_cast<const T*>(in.gate.data_ptr) + b * in.gate.batch_stride + n * in.gate.row_stride;
  T* out_ptr = static_cast<T*>(in.out_ptr) + static_cast<int64_t>(blockIdx.x) * in.channels;
  const auto product = [&](int channel, float (&v)[kCount]) {
    float g[kCount];
    const auto offset = [&](const View& view) {
      return kCount == 1 ? channel * view.channel_stride : static_cast<int64_t>(channel);
    };
    unpack(load_pack<T, kCount>(x_ptr + offset(in.x)), v);
    unpack(load_pack<T, kCount>(gate_ptr + offset(in.gate)), g);
#pragma unroll
    for (int c = 0; c < kCount; ++c) v[c] *= g[c] * sigmoid<T>(g[c]);
  };
  float kept[kKept][kCount];
  // Visits the packs of this thread's row: those that it keeps, or each anew.
  const auto each = [&](auto&& visit) {
    if constexpr (kPacks > 0) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int channel = static_cast<int>(threadIdx.x) * kCount + k * kStep;
        if (channel < in.channels) visit(channel, kept[k]);
      }
    } else {
      for (int channel = static_cast<int>(threadIdx.x) * kCount; channel < in.channels; channel += kStep) {
        product(channel, kept[0]);
        visit(channel, kept[0]);
      }
    }
  };
  if constexpr (kPacks > 0) each([&](int channel, float (&v)[kCount]) { product(channel, v); });
  float sum = 0.0f;
  each([&](int channel, float (&v)[kCount]) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) sum += channel + c < p.width ? v[c] : 0.0f;
  });
  const float mean = block_sum(sum, sums) * p.share;
  float square = 0.0f;
  each([&](int channel, float (&v)[kCount]) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const float centred = channel + c < p.width ? v[c] - mean : 0.0f;
      square = fmaf(centred, centred, square);
    }
  });
  const float scale = rsqrtf(fmaf(block_sum(square, squares), p.share, p.eps));
  each([&](int channel, float (&v)[kCount]) {
    float weight[kCount], bias[kCount];
    parameter(p.weight, 1.0f, channel, p.width, weight);
    parameter(p.bias, 0.0f, channel, p.width, bias);
#pragma unroll
    for (int c = 0; c < kCount; ++c)
      v[c] = channel + c < p.width ? fmaf((v[c] - mean) * scale, weight[c], bias[c]) : 0.0f;
    store_pack(out_ptr + channel, to_pack<T>(v));
  });
}

template <class T, int kCount, int kPacks>
void launch(const NormedParams& p, cudaStream_t stream) {
  launch_kernel(normed_kernel<T, kCount, kPacks>, p.rows_of.batch * p.rows_of.rows, kRowThreads, 0, 0, stream,
                p);
}

}  // namespace

void launch_normed(const NormedParams& p, Dtype dtype, bool aligned, cudaStream_t stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kCount = kPackSize<T>;
    const int packs = (p.rows_of.channels / kCount + kRowThreads - 1) / kRowThreads;
    if (!aligned) return launch<T, 1, 0>(p, stream);
    if (packs > kMostPacks) return launch<T, kCount, 0>(p, stream);
    packs <= 2 ? launch<T, kCount, 2>(p, stream) : launch<T, kCount, kMostPacks>(p, stream);
  });
}

}  // namespace tome::activation
