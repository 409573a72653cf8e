// out = gelu(x), and out = grad * gelu'(x), rounded once. A block owns consecutive packs, a thread one of
// them or, on the way back, every 256th.
#include "gelu.cuh"

#include "../launch.cuh"
#include "../vector.cuh"
#include "activation.h"
#include "sigmoid.cuh"

namespace tome::activation {
namespace {

template <class T, int kCount>
__global__ __launch_bounds__(kThreads) void gelu_kernel(const GeluParams p) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  await_previous();
  if (at >= p.count) return;
  float v[kCount];
  // Not through the path for what a kernel only reads: out may be x.
  unpack(load_pack<T, kCount, false>(static_cast<const T*>(p.x_ptr) + at), v);
#pragma unroll
  for (int c = 0; c < kCount; ++c) v[c] = gelu(v[c], p.gelu);
  store_pack(static_cast<T*>(p.out_ptr) + at, to_pack<T>(v));
}

template <class T>
void launch(const GeluParams& p, bool aligned, cudaStream_t stream) {
  const int64_t each = static_cast<int64_t>(kThreads) * (aligned ? kPackSize<T> : 1);
  const auto kernel = aligned ? gelu_kernel<T, kPackSize<T>> : gelu_kernel<T, 1>;
  launch_kernel(kernel, (p.count + each - 1) / each, kThreads, 0, 0, stream, p, true);
}

template <GeluKind kKind, class T>
__device__ __forceinline__ float slope(float x) {
  if constexpr (kKind == GeluKind::kQuick) {
    const float share = sigmoid<T>(1.702f * x);
    return share + 1.702f * x * share * (1.0f - share);
  } else if constexpr (kKind == GeluKind::kTanh) {
    constexpr float kFactor = 0.7978845608f, kCubic = 0.044715f;  // sqrt(2 / pi)
    const float t = tanhf(kFactor * fmaf(kCubic * x * x, x, x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kFactor * fmaf(3.0f * kCubic * x, x, 1.0f);
  } else {
    constexpr float kRootHalf = 0.7071067812f, kDensity = 0.3989422804f;  // 1 / sqrt(2 pi)
    return 0.5f * (1.0f + erff(kRootHalf * x)) + x * kDensity * expf(-0.5f * x * x);
  }
}

template <GeluKind kKind, class T, int kCount>
__global__ __launch_bounds__(kThreads) void gelu_backward_kernel(const GeluBackwardParams p) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads * kPacks + threadIdx.x) * kCount;
  Pack<T, kCount> grad[kPacks], x[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t at = first + k * kThreads * kCount;
    if (at >= p.count) break;
    grad[k] = load_pack<T, kCount>(static_cast<const T*>(p.grad_ptr) + at);
    x[k] = load_pack<T, kCount>(static_cast<const T*>(p.x_ptr) + at);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t at = first + k * kThreads * kCount;
    if (at >= p.count) break;
    float g[kCount], v[kCount];
    unpack(grad[k], g);
    unpack(x[k], v);
#pragma unroll
    for (int c = 0; c < kCount; ++c) g[c] *= slope<kKind, T>(v[c]);
    store_pack(static_cast<T*>(p.out_ptr) + at, to_pack<T>(g));
  }
}

template <GeluKind kKind>
void launch(const GeluBackwardParams& p, Dtype dtype, bool aligned, cudaStream_t stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t each = static_cast<int64_t>(kThreads) * kPacks * (aligned ? kPackSize<T> : 1);
    const auto kernel =
        aligned ? gelu_backward_kernel<kKind, T, kPackSize<T>> : gelu_backward_kernel<kKind, T, 1>;
    launch_kernel(kernel, (p.count + each - 1) / each, kThreads, 0, 0, stream, p);
  });
}

}  // namespace

void launch_gelu(const GeluParams& p, Dtype dtype, bool aligned, cudaStream_t stream) {
  dtype == Dtype::kHalf ? launch<__half>(p, aligned, stream) : launch<__nv_bfloat16>(p, aligned, stream);
}

void launch_gelu_backward(const GeluBackwardParams& p, GeluKind kind, Dtype dtype, bool aligned,
                          cudaStream_t stream) {
  switch (kind) {
    case GeluKind::kErf:
      return launch<GeluKind::kErf>(p, dtype, aligned, stream);
    case GeluKind::kTanh:
      return launch<GeluKind::kTanh>(p, dtype, aligned, stream);
    case GeluKind::kQuick:
      return launch<GeluKind::kQuick>(p, dtype, aligned, stream);
  }
}

}  // namespace tome::activation
