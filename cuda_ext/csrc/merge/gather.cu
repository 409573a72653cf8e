// out[m] = sum of w_i x_i over the tokens i with slot i = m, in ascending order and in float32; w_i = size_i /
// total_m for a merge, 1 for the gradient of an unmerge. One launch.
//
// A block owns block_outputs consecutive output rows of one image. It first scans the slots of the image and
// lists, in order, the tokens that fall into its rows; a warp then finds the members of its row by a ballot over
// that short list. When a list overflows (very many tokens merged into few), warps scan the slots themselves:
// the same members in the same order, so the same bits.
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

// The members of one output row, in ascending order; the whole warp walks together.
struct Walk {
  const GatherParams& p;
  const Storage& shared;
  int64_t b;
  int first, output, count;
  bool listed;
  int base = -kWarpSize;
  unsigned mask = 0;

  __device__ __forceinline__ bool next(int& token, float& size) {
    while (mask == 0) {
      base += kWarpSize;
      if (base >= count) return false;
      const int i = base + static_cast<int>(threadIdx.x % kWarpSize);
      bool is_member = false;
      if (i < count) is_member = listed ? shared.output[i] == output : token_slot(p, b, i) == first + output;
      mask = __ballot_sync(kFullWarp, is_member);
    }
    const int i = base + __ffs(mask) - 1;
    mask &= mask - 1;
    token = listed ? shared.token[i] : i;
    size = listed ? shared.size[i] : token_size(p, b, i);
    return true;
  }
};

// kPacks packs of kCount channels per thread: one pass over the members covers 32 * kPacks * kCount channels.
template <class T, int kCount, int kPacks>
__global__ __launch_bounds__(kThreads, 1) void gather_kernel(const GatherParams p) {
  static __shared__ Storage shared;
  const int lane = threadIdx.x % kWarpSize;
  const int blocks = (p.tokens + p.block_outputs - 1) / p.block_outputs;  // per image
  const int64_t b = blockIdx.x / blocks;
  const int first = static_cast<int>(blockIdx.x % blocks) * p.block_outputs;
  const int outputs = min(p.block_outputs, p.tokens - first);
  const int total_members = list_members(p, b, first, outputs, shared);
  const bool listed = total_members <= kCapacity;
  const int count = listed ? total_members : p.length;

  constexpr int kPassChannels = kWarpSize * kPacks * kCount;
  const int passes = (p.channels + kPassChannels - 1) / kPassChannels;
  const T* x_ptr = static_cast<const T*>(p.x.data_ptr) + b * p.x.batch_stride;
  for (int unit = threadIdx.x / kWarpSize; unit < outputs * passes; unit += kWarps) {
    const int output = unit / passes;
    const int channel = unit % passes * kPassChannels + lane * kCount;
    const Walk start{p, shared, b, first, output, count, listed};
    int token[2];
    float size[2];
    float total = 0.0f;
    if (p.total_ptr != nullptr) {
      for (Walk walk = start; walk.next(token[0], size[0]);) total += size[0];
      if (lane == 0 && unit % passes == 0) p.total_ptr[b * p.tokens + first + output] = total;
    }
    float sum[kPacks][kCount];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum[i][c] = -0.0f;  // what leaves the sign of a lone -0 alone
    }
    Walk walk = start;
    while (walk.next(token[0], size[0])) {
      // Two members at a time: their loads overlap.
      const int members = walk.next(token[1], size[1]) ? 2 : 1;
      Pack<T, kCount> pack[2][kPacks];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
          const int at = channel + i * kWarpSize * kCount;
          if (j < members && at < p.channels) {
            pack[j][i] = load_pack<T, kCount>(x_ptr + token[j] * p.x.row_stride + at * p.x.channel_stride);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (j >= members) break;
        const float weight = p.total_ptr == nullptr ? 1.0f : size[j] / total;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
#pragma unroll
          for (int c = 0; c < kCount; ++c) sum[i][c] = fmaf(weight, to_float(pack[j][i].value[c]), sum[i][c]);
        }
      }
    }
    T* out_ptr = static_cast<T*>(p.out.data_ptr) + b * p.out.batch_stride + (first + output) * p.out.row_stride;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = channel + i * kWarpSize * kCount;
      if (at >= p.channels) break;
      Pack<T, kCount> pack;
#pragma unroll
      for (int c = 0; c < kCount; ++c) pack.value[c] = from_float<T>(sum[i][c]);
      store_pack(out_ptr + at, pack);
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
  const int packs = (p.channels + kWarpSize * kCount - 1) / (kWarpSize * kCount);
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
