// All keys of a head in one pass, on warpgroup products: sequences of up to 256 tokens on Hopper.
//
// A block is one warpgroup. It loads keys and values of a head, then takes 64 queries after another: scores
// of all keys at once in registers, the softmax, the product with the values. There is no rescaling and no
// barrier between tiles. Three blocks share a multiprocessor: one loads or computes exponentials while the
// products of another run. Within a tile, the output of the tile before is written while the scores are
// computed, and half of the weights while the product with the other half runs. Keys are padded to 16.
//
// Shared memory: keys, values, bias, 16 queries per warp (then its output), what the warps exchange in a
// tail.
#include <algorithm>

#include "../launch.cuh"
#include "hopper_resident_head.cuh"

namespace tome::attention_ops {
namespace hopper {
namespace {

constexpr int kSplitBlocks = 2;  // of a multiprocessor, until which the queries of a head are split

template <class T, int kKeys>
__global__ __launch_bounds__(kThreads, ResidentPlan<kKeys>::kBlocks) void attention_hopper_resident_kernel(
    const HopperResidentParams plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  ResidentHead<T, kKeys>(plan).attend();
#endif
}

template <class T, int kKeys>
void launch(const HopperResidentParams& plan, cudaStream_t stream) {
  if constexpr (kKeys > kMostKeys) {
    return;
  } else {
    if (plan.attention.keys > kKeys) return launch<T, kKeys + kTileRows>(plan, stream);
    launch_kernel(attention_hopper_resident_kernel<T, kKeys>,
                  plan.attention.batch * plan.attention.heads * plan.splits, kThreads,
                  ResidentPlan<kKeys>::kSharedBytes, ResidentPlan<kKeys>::kSharedBytes, stream, plan, true);
  }
}

}  // namespace

// Few heads take hardly longer for more keys than they have, but a kernel whose code the multiprocessors must
// first fetch takes twice as long as one that they have just run. So all layers share one.
static bool is_few(const AttentionParams& p, int multiprocessors) {
  return p.batch * p.heads <= multiprocessors;
}

bool fits_resident(const AttentionParams& p, int multiprocessors) {
  const float unit = unit_of(p.scale);
  const int least = is_few(p, multiprocessors) ? 0 : kLeastKeys;
  return p.is_aligned && p.head_dim == kDim && p.keys > least && p.keys <= kMostKeys && unit >= kLeastUnit &&
         unit <= kMostUnit;
}

void launch_resident(const AttentionParams& p, Dtype dtype, int multiprocessors, cudaStream_t stream) {
  const int64_t tiles = (p.queries + kWarpgroupRows - 1) / kWarpgroupRows;
  const int64_t splits =
      std::max<int64_t>(1, std::min<int64_t>(tiles, kSplitBlocks * multiprocessors / (p.batch * p.heads)));
  const float unit = unit_of(p.scale);
  const HopperResidentParams plan{p, static_cast<int>(splits), unit, 1.0f / (p.scale * unit)};
  dispatch_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    is_few(p, multiprocessors) ? launch<T, kFewKeys>(plan, stream)
                               : launch<T, kLeastKeys + kTileRows>(plan, stream);
  });
}

}  // namespace hopper
}  // namespace tome::attention_ops
