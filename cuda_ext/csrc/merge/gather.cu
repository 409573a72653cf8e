// out[m] = sum of w_i x_i over the tokens i with slot i = m, in ascending order and in float32; w_i = size_i
// / total_m for a merge, 1 for the gradient of an unmerge. One launch.
//
// A block owns block_outputs consecutive output rows of one image. It first scans the slots of the image and
// lists, in order, the tokens that fall into its rows; a warp then finds the members of its row by a ballot
// over that short list. When a list overflows (very many tokens merged into few), warps scan the slots
// themselves: the same members in the same order, so the same bits.
#include "../launch.cuh"
#include "../vector.cuh"
#include "merge.h"

namespace tome::merge_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kCapacity = 512;  // tokens in a block's list; on average a list holds under 2 * 32

struct Storage {
  int token[kCapacity];
  int output[kCapacity];
  float size[kCapacity];
  int warp_count[kWarps];
};

__device__ __forceinline__ float token_size(const GatherParams& p, int64_t b, int token) {
  return p.size.data_ptr == nullptr ? 1.0f : __ldg(p.size.data_ptr + p.size.offset(b, token));
}

__device__ __forceinline__ int token_slot(const GatherParams& p, int64_t b, int token) {
  return __ldg(p.slot.data_ptr + p.slot.offset(b, token));
}

// In unsigned arithmetic, so that no slot, however bad, overflows.
__device__ __forceinline__ bool is_between(int slot, int first, int count) {
  return static_cast<unsigned>(slot) - static_cast<unsigned>(first) < static_cast<unsigned>(count);
}

// List the tokens with slots in [first, first + outputs) in ascending order; returns how many there are.
__device__ __forceinline__ int list_members(const GatherParams& p, int64_t b, int first, int outputs,
                                            Storage& shared) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int segment = (p.length + kThreads - 1) / kThreads * kWarpSize;  // tokens per warp, consecutive
  const int begin = warp * segment;
  const int end = min(begin + segment, p.length);
  int count = 0;
  for (int base = begin; base < end; base += kWarpSize) {
    const int token = base + lane;
    const bool is_mine = token < end && is_between(token_slot(p, b, token), first, outputs);
    count += __popc(__ballot_sync(kFullWarp, is_mine));
  }
  if (lane == 0) shared.warp_count[warp] = count;
  __syncthreads();
  int offset = 0;
  int total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) offset += shared.warp_count[w];
    total += shared.warp_count[w];
  }
  if (total > kCapacity) return total;
  for (int base = begin; base < end; base += kWarpSize) {
    const int token = base + lane;
    const int slot = token < end ? token_slot(p, b, token) : -1;
    const bool is_mine = is_between(slot, first, outputs);
    const unsigned mask = __ballot_sync(kFullWarp, is_mine);
    if (is_mine) {
      const int at = offset + __popc(mask & ((1u << lane) - 1));
      shared.token[at] = token;
      shared.output[at] = slot - first;
      shared.size[at] = token_size(p, b, token);
    }
    offset += __popc(mask);
  }
  __syncthreads();
  return total;
}

// Where a warp finds the members of its output row: in the block's list, or among all tokens.
struct Members {
  const GatherParams& p;
  const Storage& shared;
  int64_t b;
  int output, slot, count;
  bool listed;

  // One bit for each of the 32 candidates from `base` on; the whole warp asks together.
  __device__ __forceinline__ unsigned among(int base) const {
    const int i = base + static_cast<int>(threadIdx.x % kWarpSize);
    bool is_member = false;
    if (i < count) is_member = listed ? shared.output[i] == output : token_slot(p, b, i) == slot;
    return __ballot_sync(kFullWarp, is_member);
  }
  __device__ __forceinline__ int token(int i) const { return listed ? shared.token[i] : i; }
  __device__ __forceinline__ float size(int i) const { return listed ? shared.size[i] : token_size(p, b, i); }
  // How many members there are, and the sum of their sizes.
  __device__ __forceinline__ int measure(float& total) const {
    int group = 0;
    total = 0.0f;
#pragma unroll 1
    for (int base = 0; base < count; base += kWarpSize) {
      const unsigned mask = among(base);
      group += __popc(mask);
      for (unsigned rest = mask; rest != 0; rest &= rest - 1) total += size(base + __ffs(rest) - 1);
    }
    return group;
  }
  __device__ __forceinline__ float weight(int i, float total) const {
    return p.total_ptr == nullptr ? 1.0f : size(i) / total;
  }
};

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
  launch_kernel(gather_kernel<T, kCount, kPacks>, blocks, kThreads, 0, stream, p);
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
