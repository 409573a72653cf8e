// x'[m] = sum of w_i (x_i + gamma * branch_i) over the tokens i with slot i = m, rounded once; y =
// layer_norm(x'). One launch: everything is read once and written once. Blocks, members and the order of the
// sums are those of a merge (merge/rows.cuh); a row stays in the registers of its warp until y is written.
//
// y is the norm of x' as rounded, so that it doesn't depend on the path that summed the row, and its gradient
// can be taken at x'. The variance is the mean of centred squares.
#include <type_traits>

#include "../launch.cuh"
#include "../merge/rows.cuh"
#include "vector.cuh"

namespace tome::norm {
namespace {

using merge_ops::copy_pack;
using merge_ops::is_inside;
using merge_ops::lane_channel;
using merge_ops::RowPart;

constexpr int kThreads = merge_ops::kFewWarps * kWarpSize;

// gamma, weight and bias in float32, in shared memory: converted once per block, and read without bank
// conflicts as 16 bytes of all lanes lie side by side.
struct Staged {
  float* gamma;
  float* weight;
  float* bias;
};

template <int kCount>
__device__ __forceinline__ void stage(const Vector& from, float missing, int channels, float* to) {
  constexpr int kFours = kCount / 4;  // per pack
#pragma unroll 1
  for (int four = threadIdx.x; four < channels / 4; four += kThreads) {
    const int pack = four / kFours;
    float v[4] = {missing, missing, missing, missing};
    if (from.data_ptr != nullptr) load_vector(from, 4 * four, v);
    const int at = pack / kWarpSize * kFours * kWarpSize + four % kFours * kWarpSize + pack % kWarpSize;
    reinterpret_cast<float4*>(to)[at] = make_float4(v[0], v[1], v[2], v[3]);
  }
}

template <int kCount>
__device__ __forceinline__ void load_staged(const float* from, int channel, float (&v)[kCount]) {
  static_assert(kCount % 4 == 0);
  const int step = channel / (kWarpSize * kCount) * (kWarpSize * kCount);
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
    const float4 four = *reinterpret_cast<const float4*>(from + step + (i * kWarpSize + lane) * 4);
    v[4 * i] = four.x;
    v[4 * i + 1] = four.y;
    v[4 * i + 2] = four.z;
    v[4 * i + 3] = four.w;
  }
}

template <class T, class U, int kCount_, bool kStaged>
struct NormRows {
  static constexpr int kWarps = merge_ops::kFewWarps;
  static constexpr int kCount = kCount_;
  static constexpr int kStep = kWarpSize * kCount;
  struct Fetched {
    Pack<T, kCount> x;
    Pack<U, kCount> branch;
  };
  const NormParams& p;
  const T* x_ptr;  // of the image
  const U* branch_ptr;
  int64_t first_row;  // of the block, among all output rows
  Staged staged;

  __device__ __forceinline__ static void parameter(const Vector& vector, const float* staged_ptr,
                                                   float missing, int channel, float (&v)[kCount]) {
    if constexpr (kStaged) {
      load_staged(staged_ptr, channel, v);
    } else if (vector.data_ptr != nullptr) {
      load_vector(vector, channel, v);
    } else {
#pragma unroll
      for (int c = 0; c < kCount; ++c) v[c] = missing;
    }
  }
  __device__ __forceinline__ void prepare() const {
    if constexpr (kStaged) {
      stage<kCount>(p.weight, 1.0f, p.merge.channels, staged.weight);
      stage<kCount>(p.bias, 0.0f, p.merge.channels, staged.bias);
      if (p.gamma.data_ptr != nullptr) stage<kCount>(p.gamma, 1.0f, p.merge.channels, staged.gamma);
      __syncthreads();
    }
  }
  __device__ __forceinline__ Fetched fetch(int token, int channel) const {
    const View& x = p.merge.x;
    const int64_t x_stride = kCount == 1 ? x.channel_stride : 1;
    const int64_t branch_stride = kCount == 1 ? p.branch.channel_stride : 1;
    return {load_pack<T, kCount>(x_ptr + token * x.row_stride + channel * x_stride),
            load_pack<U, kCount>(branch_ptr + token * p.branch.row_stride + channel * branch_stride)};
  }
  // In shared memory x of all lanes lies before branch.
  static constexpr int kXBytes = kWarpSize * static_cast<int>(sizeof(Pack<T, kCount>));
  static constexpr int kPackBytes = kXBytes + kWarpSize * static_cast<int>(sizeof(Pack<U, kCount>));
  __device__ __forceinline__ void copy(int token, int channel, char* to) const {
    const int lane = threadIdx.x % kWarpSize;
    copy_pack<T, kCount>(x_ptr + token * p.merge.x.row_stride + channel,
                         reinterpret_cast<Pack<T, kCount>*>(to) + lane);
    copy_pack<U, kCount>(branch_ptr + token * p.branch.row_stride + channel,
                         reinterpret_cast<Pack<U, kCount>*>(to + kXBytes) + lane);
  }
  __device__ __forceinline__ Fetched arrived(const char* from) const {
    const int lane = threadIdx.x % kWarpSize;
    return {reinterpret_cast<const Pack<T, kCount>*>(from)[lane],
            reinterpret_cast<const Pack<U, kCount>*>(from + kXBytes)[lane]};
  }
  __device__ __forceinline__ void value(const Fetched& fetched, int channel, float (&v)[kCount]) const {
    float branch[kCount];
    unpack(fetched.x, v);
    unpack(fetched.branch, branch);
    if (!opaque(p.gamma.data_ptr != nullptr)) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) v[c] += branch[c];
    } else {
      float gamma[kCount];
      parameter(p.gamma, staged.gamma, 1.0f, channel, gamma);
#pragma unroll
      for (int c = 0; c < kCount; ++c) v[c] = fmaf(gamma[c], branch[c], v[c]);
    }
  }
  __device__ __forceinline__ T* merged_ptr(int output, int channel) const {
    return static_cast<T*>(p.merge.out.data_ptr) + (first_row + output) * p.merge.channels + channel;
  }
  __device__ __forceinline__ void store(int output, int channel, const float (&v)[kCount]) const {
    store_pack(merged_ptr(output, channel), to_pack<T>(v));
  }

  // The three passes over a row take its packs in the same order and add alike, wherever the row lies.
  __device__ __forceinline__ static float pack_sum(const float (&v)[kCount]) {
    float sum[kCount];
#pragma unroll
    for (int c = 0; c < kCount; ++c) sum[c] = v[c];
#pragma unroll
    for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
      for (int c = 0; c < half; ++c) sum[c] += sum[c + half];
    }
    return sum[0];
  }
  __device__ __forceinline__ static float square_sum(float (&v)[kCount], float mean) {
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      v[c] -= mean;
      sum[c % 2] = fmaf(v[c], v[c], sum[c % 2]);
    }
    return sum[0] + sum[1];
  }
  __device__ __forceinline__ float deviation(float squares) const {
    return rsqrtf(fmaf(squares, p.share, p.eps));
  }
  __device__ __forceinline__ void store_stats(int output, float mean, float rstd) const {
    if (p.stats_ptr != nullptr && threadIdx.x % kWarpSize == 0)
      p.stats_ptr[first_row + output] = make_float2(mean, rstd);
  }
  // y from centred channels, to element `at` of it.
  __device__ __forceinline__ void store_norm(int64_t at, int channel, const float (&centred)[kCount],
                                             float rstd) const {
    float weight[kCount], bias[kCount], y[kCount];
    parameter(p.weight, staged.weight, 1.0f, channel, weight);
    parameter(p.bias, staged.bias, 0.0f, channel, bias);
#pragma unroll
    for (int c = 0; c < kCount; ++c) y[c] = fmaf(centred[c] * rstd, weight[c], bias[c]);
    store_as(p.y_dtype, p.y_ptr, at, y);
  }

  // Row becomes x' - mean on the way.
  template <int kPacks>
  __device__ __forceinline__ void finish(int output, RowPart<kPacks, kCount>& row) const {
    const int channel = lane_channel<kCount>();
    const int channels = p.merge.channels;
    T* out_ptr = merged_ptr(output, channel);
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (is_inside<kCount, kPacks>(k, channel, channels)) {
        const Pack<T, kCount> rounded = to_pack<T>(row[k]);
        store_pack(out_ptr + k * kStep, rounded);
        unpack(rounded, row[k]);
        sum += pack_sum(row[k]);
      }
    }
    const float mean = warp_sum(sum) * p.share;
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (is_inside<kCount, kPacks>(k, channel, channels)) squares += square_sum(row[k], mean);
    }
    const float rstd = deviation(warp_sum(squares));
    store_stats(output, mean, rstd);
    const int64_t at = (first_row + output) * channels + channel;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (is_inside<kCount, kPacks>(k, channel, channels)) {
        store_norm(at + k * kStep, channel + k * kStep, row[k], rstd);
      }
    }
  }

  // The same from memory, where every lane finds what it has written itself.
  template <class Visit>
  __device__ __forceinline__ void each_stored(int output, Visit&& visit) const {
#pragma unroll 1
    for (int channel = lane_channel<kCount>(); channel < p.merge.channels; channel += kStep) {
      float v[kCount];
      unpack(load_pack<T, kCount, false>(merged_ptr(output, channel)), v);
      visit(channel, v);
    }
  }
  __device__ __forceinline__ void finish_stored(int output) const {
    float sum = 0.0f;
    each_stored(output, [&](int, float (&v)[kCount]) { sum += pack_sum(v); });
    const float mean = warp_sum(sum) * p.share;
    float squares = 0.0f;
    each_stored(output, [&](int, float (&v)[kCount]) { squares += square_sum(v, mean); });
    const float rstd = deviation(warp_sum(squares));
    store_stats(output, mean, rstd);
    const int64_t at = (first_row + output) * p.merge.channels;
    each_stored(output, [&](int channel, float (&v)[kCount]) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) v[c] -= mean;
      store_norm(at + channel, channel, v, rstd);
    });
  }
};

// Blocks per multiprocessor that registers must allow; more would spill. A conversion from bfloat16 is an
// integer operation, which the compiler likes to do early.
template <class U, int kCount, int kPacks>
constexpr int min_blocks() {
  if (kPacks == 0) return kCount == 1 ? 2 : 3;
  if (std::is_same_v<U, __half> && kPacks <= 6) return 5;
  return std::is_same_v<U, float> && kCount * kPacks >= 40 ? 3 : 4;
}

template <class T, class U, int kCount, int kPacks>
__global__ __launch_bounds__(kThreads,
                             (min_blocks<U, kCount, kPacks>())) void norm_kernel(const NormParams p) {
  static __shared__ merge_ops::Storage<merge_ops::kFewWarps> shared;
  const GatherParams& merge = p.merge;
  using Rows = NormRows<T, U, kCount, (kPacks > 0)>;
  Staged staged{};
  if constexpr (kPacks > 0) {
    constexpr int kChannels = kPacks * kWarpSize * kCount;
    staged.weight = reinterpret_cast<float*>(dynamic_shared() + merge_ops::ring_bytes<Rows, kPacks>());
    staged.bias = staged.weight + kChannels;
    staged.gamma = staged.bias + kChannels;
  }
  const int blocks = (merge.tokens + merge.block_outputs - 1) / merge.block_outputs;  // per image
  const int64_t b = blockIdx.x / blocks;
  const int first = static_cast<int>(blockIdx.x % blocks) * merge.block_outputs;
  const Rows rows{p, static_cast<const T*>(merge.x.data_ptr) + b * merge.x.batch_stride,
                  static_cast<const U*>(p.branch.data_ptr) + b * p.branch.batch_stride,
                  b * merge.tokens + first, staged};
  merge_ops::merge_rows<kPacks>(merge, rows, shared, b, first, min(merge.block_outputs, merge.tokens - first),
                                dynamic_shared());
}

template <class T, class U>
void launch(const NormParams& p, bool aligned, cudaStream_t stream) {
  const GatherParams& merge = p.merge;
  const int64_t blocks = (merge.tokens + merge.block_outputs - 1) / merge.block_outputs * merge.batch;
  merge_ops::dispatch_packs<T>(merge.channels, aligned, [&](auto count, auto packs) {
    constexpr int kCount = decltype(count)::value;
    constexpr int kPacks = decltype(packs)::value;
    const int vectors = p.gamma.data_ptr == nullptr ? 2 : 3;
    constexpr int kRing = merge_ops::ring_bytes<NormRows<T, U, kCount, (kPacks > 0)>, kPacks>();
    constexpr int kVector = kPacks * kWarpSize * kCount * static_cast<int>(sizeof(float));
    launch_kernel(norm_kernel<T, U, kCount, kPacks>, blocks, kThreads, kRing + vectors * kVector,
                  kRing + 3 * kVector, stream, p);
  });
}

}  // namespace

void launch_norm(const NormParams& p, Dtype dtype, Dtype branch_dtype, bool aligned, cudaStream_t stream) {
  dispatch(branch_dtype, [&](auto tag) {
    using U = typename decltype(tag)::type;
    dtype == Dtype::kFloat ? launch<float, U>(p, aligned, stream) : launch<U, U>(p, aligned, stream);
  });
}

}  // namespace tome::norm
