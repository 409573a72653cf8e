// A row of merge_add_norm, as merge/rows.cuh asks for it: a token's row is x + gamma * branch, and a finished
// row is rounded, written, and normalised. Without a branch the row is x itself, which is only read.
#pragma once

#include <type_traits>

#include "../merge/rows.cuh"
#include "staged.cuh"

namespace tome::norm {

using merge_ops::copy_pack;
using merge_ops::is_inside;
using merge_ops::lane_channel;
using merge_ops::RowPart;

// The dtype of a branch that isn't there.
struct NoBranch {};

template <class T, class U, int kCount_, bool kStaged>
struct NormRows {
  static constexpr bool kHasBranch = !std::is_same_v<U, NoBranch>;
  static constexpr int kCount = kCount_;
  static constexpr int kStep = kWarpSize * kCount;
  struct Fetched {
    Pack<T, kCount> x;
    Pack<U, kCount> branch;
  };
  const NormParams& p;
  const T* x_ptr;       // of the image
  const U* branch_ptr;  // what the first token would have, also where it has nothing
  int first;            // output of the block
  int64_t first_row;    // the same among the rows of all images
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
  // gamma is needed for the first row already, weight and bias for its end.
  __device__ __forceinline__ void prepare() const {
    if constexpr (kStaged) {
      stage<kCount>(p, staged);
      __syncthreads();
    }
  }
  __device__ __forceinline__ Fetched fetch(int token, int channel) const {
    const View& x = p.merge.x;
    const int64_t x_stride = kCount == 1 ? x.channel_stride : 1;
    Fetched fetched;
    fetched.x = load_pack<T, kCount>(x_ptr + token * x.row_stride + channel * x_stride);
    if constexpr (kHasBranch) {
      const int64_t stride = kCount == 1 ? p.branch.channel_stride : 1;
      fetched.branch =
          token < p.skip ? Pack<U, kCount>{}
                         : load_pack<U, kCount>(branch_ptr + token * p.branch.row_stride + channel * stride);
    }
    return fetched;
  }
  // In shared memory x of all lanes lies before branch.
  static constexpr int kXBytes = kWarpSize * static_cast<int>(sizeof(Pack<T, kCount>));
  static constexpr int kPackBytes =
      kXBytes + (kHasBranch ? kWarpSize * static_cast<int>(sizeof(Pack<U, kCount>)) : 0);
  __device__ __forceinline__ void copy(int token, int channel, char* to) const {
    const int lane = threadIdx.x % kWarpSize;
    copy_pack<T, kCount>(x_ptr + token * p.merge.x.row_stride + channel,
                         reinterpret_cast<Pack<T, kCount>*>(to) + lane);
    if constexpr (kHasBranch) {
      auto* const branch_to = reinterpret_cast<Pack<U, kCount>*>(to + kXBytes) + lane;
      if (token < p.skip) {
        *branch_to = {};
      } else {
        copy_pack<U, kCount>(branch_ptr + token * p.branch.row_stride + channel, branch_to);
      }
    }
  }
  __device__ __forceinline__ Fetched arrived(const char* from) const {
    const int lane = threadIdx.x % kWarpSize;
    Fetched fetched;
    fetched.x = reinterpret_cast<const Pack<T, kCount>*>(from)[lane];
    if constexpr (kHasBranch) fetched.branch = reinterpret_cast<const Pack<U, kCount>*>(from + kXBytes)[lane];
    return fetched;
  }
  // Whether there is a gamma is asked per pack, opaquely: else the compiler would write the loop twice.
  __device__ __forceinline__ void value(const Fetched& fetched, int channel, float (&v)[kCount]) const {
    unpack(fetched.x, v);
    if constexpr (kHasBranch) {
      float branch[kCount];
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
  }
  __device__ __forceinline__ T* merged_ptr(int output, int channel) const {
    return static_cast<T*>(p.merge.out.data_ptr) + (first_row + output) * p.merge.channels + channel;
  }
  __device__ __forceinline__ void store(int output, int channel, const float (&v)[kCount]) const {
    if constexpr (kHasBranch) store_pack(merged_ptr(output, channel), to_pack<T>(v));
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
    [[maybe_unused]] T* const out_ptr = merged_ptr(output, channel);
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (is_inside<kCount, kPacks>(k, channel, channels)) {
        if constexpr (kHasBranch) {  // from here on as rounded, as whoever reads x' has it
          const Pack<T, kCount> rounded = to_pack<T>(row[k]);
          store_pack(out_ptr + k * kStep, rounded);
          unpack(rounded, row[k]);
        }
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

  // The same from memory, where every lane finds what it has written itself, or x where nothing was.
  template <class Visit>
  __device__ __forceinline__ void each_stored(int output, Visit&& visit) const {
#pragma unroll 1
    for (int channel = lane_channel<kCount>(); channel < p.merge.channels; channel += kStep) {
      float v[kCount];
      if constexpr (kHasBranch) {
        unpack(load_pack<T, kCount, false>(merged_ptr(output, channel)), v);
      } else {  // without a branch there is no map either
        unpack(fetch(first + output, channel).x, v);
      }
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

}  // namespace tome::norm
