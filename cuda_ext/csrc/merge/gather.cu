// out[m] = sum of w_i x_i over the tokens i with slot i = m, in ascending order and in float32. One launch.
// The weight is size_i / total_m for a merge, and 1 for the gradient of an unmerge.
//
// A block owns block_outputs consecutive output rows of one image. It first scans the slots of the image and
// lists, in order, the tokens that fall into its rows; a warp then finds the members of its row by a ballot
// over that short list. When a list overflows (very many tokens merged into few), warps scan the slots
// themselves: the same members in the same order, so the same bits.
#include "../launch.cuh"
#include "members.cuh"

namespace tome::merge_ops {
namespace {

template <class T, int kCount>
__device__ __forceinline__ void store_sum(T* out_ptr, const float (&sum)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int c = 0; c < kCount; ++c) pack.value[c] = from_float<T>(sum[c]);
  store_pack(out_ptr, pack);
}

constexpr int kShortGroup = 16;  // members up to which plain float32 addition is accurate enough

// One pack of a long group, with compensated (Kahan) addition: hundreds of plain float32 additions would lose
// bits that the definition's tree of additions keeps. Several rows are in flight, as nothing else hides
// latency.
template <class T, int kCount>
__device__ __forceinline__ void sum_long_group(const Members& members, const T* x_ptr, T* out_ptr,
                                               float total, bool is_inside) {
  constexpr int kInFlight = 2;
  float sum[kCount], lost[kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) sum[c] = lost[c] = 0.0f;
#pragma unroll 1
  for (int base = 0; base < members.count; base += kWarpSize) {
    unsigned mask = members.among(base);
#pragma unroll 1
    while (mask != 0) {
      Pack<T, kCount> pack[kInFlight];
      float weight[kInFlight];
      const int rows = min(__popc(mask), kInFlight);
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (j < rows) {
          const int i = base + __ffs(mask) - 1;
          mask &= mask - 1;
          weight[j] = members.weight(i, total);
          if (is_inside) pack[j] = load_pack<T, kCount>(x_ptr + members.token(i) * members.p.x.row_stride);
        }
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (j >= rows) break;
        float x[kCount];
        unpack(pack[j], x);
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          const float term = fmaf(weight[j], x[c], -lost[c]);
          const float next = sum[c] + term;
          lost[c] = (next - sum[c]) - term;
          sum[c] = next;
        }
      }
    }
  }
  if (is_inside) store_sum(out_ptr, sum);
}

// Blocks per multiprocessor that registers must allow; more would spill where kPacks is even.
template <int kPacks>
constexpr int kMinBlocks = kPacks % 2 == 0 ? 2 : 3;

// kPacks packs of kCount channels per thread: one pass over the members covers 32 * kPacks * kCount channels.
template <class T, int kCount, int kPacks>
__global__ __launch_bounds__(kThreads, kMinBlocks<kPacks>) void gather_kernel(const GatherParams p) {
  static __shared__ Storage shared;
  const int lane = threadIdx.x % kWarpSize;
  const int blocks = (p.tokens + p.block_outputs - 1) / p.block_outputs;  // per image
  const int64_t b = blockIdx.x / blocks;
  const int first = static_cast<int>(blockIdx.x % blocks) * p.block_outputs;
  const int outputs = min(p.block_outputs, p.tokens - first);
  const int listed = list_members(p, b, first, outputs, shared);

  const bool fits = listed <= kCapacity;
  const int count = fits ? listed : p.length;

  constexpr int kStep = kWarpSize * kCount;
  constexpr int kPassChannels = kPacks * kStep;
  const int passes = max(1, (p.channels + kPassChannels - 1) / kPassChannels);
  const T* image_ptr = static_cast<const T*>(p.x.data_ptr) + b * p.x.batch_stride;
  T* rows_ptr = static_cast<T*>(p.out.data_ptr) + b * p.out.batch_stride + first * p.out.row_stride;
  bool has_long = false;
  for (int unit = threadIdx.x / kWarpSize; unit < outputs * passes; unit += kWarps) {
    const int output = unit / passes;
    const int channel = unit % passes * kPassChannels + lane * kCount;
    const Members members{p, shared, b, output, first + output, count, fits};
    float total;
    const int group = members.measure(total);
    if (p.total_ptr != nullptr && lane == 0 && unit % passes == 0) {
      p.total_ptr[b * p.tokens + first + output] = total;
    }
    if (group > kShortGroup) {
      has_long = true;
      continue;
    }
    const T* x_ptr = image_ptr + channel * p.x.channel_stride;
    T* out_ptr = rows_ptr + output * p.out.row_stride;
    float sum[kPacks][kCount];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum[i][c] = -0.0f;  // what leaves the sign of a lone -0 alone
    }
#pragma unroll 1
    for (int base = 0; base < members.count; base += kWarpSize) {
#pragma unroll 1
      for (unsigned mask = members.among(base); mask != 0; mask &= mask - 1) {
        const int i = base + __ffs(mask) - 1;
        const T* row_ptr = x_ptr + members.token(i) * p.x.row_stride;
        Pack<T, kCount> pack[kPacks];
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
          if (channel + k * kStep < p.channels) {
            pack[k] = load_pack<T, kCount>(row_ptr + k * kStep * p.x.channel_stride);
          }
        }
        const float weight = members.weight(i, total);
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
          float x[kCount];
          unpack(pack[k], x);
#pragma unroll
          for (int c = 0; c < kCount; ++c) sum[k][c] = fmaf(weight, x[c], sum[k][c]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (channel + k * kStep < p.channels) store_sum(out_ptr + channel + k * kStep, sum[k]);
    }
  }
  if (!has_long) return;

  // Long groups come last, in a loop of their own: together the two would need half as many registers again.
  for (int unit = threadIdx.x / kWarpSize; unit < outputs * passes; unit += kWarps) {
    const int output = unit / passes;
    const Members members{p, shared, b, output, first + output, count, fits};
    float total;
    if (members.measure(total) <= kShortGroup) continue;
#pragma unroll 1
    for (int k = 0; k < kPacks; ++k) {
      const int channel = unit % passes * kPassChannels + k * kStep + lane * kCount;
      sum_long_group<T, kCount>(members, image_ptr + channel * p.x.channel_stride,
                                rows_ptr + output * p.out.row_stride + channel, total, channel < p.channels);
    }
  }
}

template <class T, int kCount, int kPacks>
void launch(const GatherParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.tokens + p.block_outputs - 1) / p.block_outputs * p.batch;
  launch_kernel(gather_kernel<T, kCount, kPacks>, blocks, kThreads, 0, 0, stream, p);
}

template <class T>
void launch_aligned(const GatherParams& p, cudaStream_t stream) {
  constexpr int kCount = kPackSize<T>;
  const int packs = p.channels == 0 ? 1 : (p.channels + kWarpSize * kCount - 1) / (kWarpSize * kCount);
  const int passes = (packs + 3) / 4;
  switch ((packs + passes - 1) / passes) {  // as few passes as four packs allow, evenly filled
    case 1:
      return launch<T, kCount, 1>(p, stream);
    case 2:
      return launch<T, kCount, 2>(p, stream);
    case 3:
      return launch<T, kCount, 3>(p, stream);
    default:
      return launch<T, kCount, 4>(p, stream);
  }
}

}  // namespace

void launch_gather(const GatherParams& p, Dtype dtype, bool aligned, cudaStream_t stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    aligned ? launch_aligned<T>(p, stream) : launch<T, 1, 4>(p, stream);
  });
}

}  // namespace tome::merge_ops
