// out = x * sigmoid(1.702 * x), the quick GELU, or out = gate * sigmoid(gate) * x, SwiGLU: one read, one
// write, rounded once. A block owns consecutive packs of an image, a thread every 256th of them.
#include "../launch.cuh"
#include "../vector.cuh"
#include "activation.h"
#include "sigmoid.cuh"

namespace tome::activation {
namespace {

template <class T, int kCount, bool kGated>
__global__ __launch_bounds__(kThreads) void activation_kernel(const ActivationParams p) {
  const int vectors = p.channels / kCount;  // of a row
  const int64_t packs = static_cast<int64_t>(p.rows) * vectors;
  const unsigned blocks = static_cast<unsigned>((packs + kThreads * kPacks - 1) / (kThreads * kPacks));
  const int64_t b = blockIdx.x / blocks;
  const int64_t first = static_cast<int64_t>(blockIdx.x % blocks) * (kThreads * kPacks);
  const int64_t first_row = first / vectors;
  const unsigned offset = static_cast<unsigned>(first % vectors) + threadIdx.x;
  const auto at = [&](const View& view, int k) {
    const unsigned pack = offset + k * kThreads;
    return static_cast<const T*>(view.data_ptr) + b * view.batch_stride +
           (first_row + pack / vectors) * view.row_stride +
           static_cast<int64_t>(pack % vectors) * kCount * (kCount == 1 ? view.channel_stride : 1);
  };
  const int64_t left = packs - first - threadIdx.x;
  Pack<T, kCount> x[kPacks], gate[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (k * kThreads >= left) break;
    x[k] = load_pack<T, kCount>(at(p.x, k));
    if constexpr (kGated) gate[k] = load_pack<T, kCount>(at(p.gate, k));
  }
  T* out_ptr = static_cast<T*>(p.out_ptr) + (b * packs + first + threadIdx.x) * kCount;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (k * kThreads >= left) break;
    float v[kCount], g[kCount];
    unpack(x[k], v);
    if constexpr (kGated) unpack(gate[k], g);
#pragma unroll
    for (int c = 0; c < kCount; ++c) v[c] *= kGated ? g[c] * sigmoid<T>(g[c]) : sigmoid<T>(1.702f * v[c]);
    store_pack(out_ptr + k * kThreads * kCount, to_pack<T>(v));
  }
}

template <class T, int kCount>
void launch(const ActivationParams& p, cudaStream_t stream) {
  const auto kernel =
      p.gate.data_ptr == nullptr ? activation_kernel<T, kCount, false> : activation_kernel<T, kCount, true>;
  launch_kernel(kernel, blocks_per_image(p, kCount) * p.batch, kThreads, 0, 0, stream, p);
}

}  // namespace

void launch_activation(const ActivationParams& p, Dtype dtype, bool aligned, cudaStream_t stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    aligned ? launch<T, kPackSize<T>>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace tome::activation
