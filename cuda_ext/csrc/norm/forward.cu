// x'[m] = sum of w_i (x_i + gamma * branch_i) over the tokens i with slot i = m, rounded once; y =
// layer_norm(x'). One launch: everything is read once and written once. Blocks, members and the order of the
// sums are those of a merge (merge/rows.cuh); a row stays in the registers of its warp until y is written.
//
// y is the norm of x' as rounded, so that it doesn't depend on the path that summed the row, and its gradient
// can be taken at x'. The variance is the mean of centred squares.
//
// Without a branch there is nothing to add or to merge: y = layer_norm(x) in one read and one write.
#include <type_traits>

#include "../launch.cuh"
#include "rows.cuh"

namespace tome::norm {
namespace {

// Blocks per multiprocessor that registers must allow; more would spill. A conversion from bfloat16 is an
// integer operation, which the compiler likes to do early.
template <class U, int kCount, int kPacks>
constexpr int min_blocks() {
  if (kPacks == 0) return kCount == 1 ? 2 : 3;
  constexpr bool kIsPlain = std::is_same_v<U, __half> || std::is_same_v<U, NoBranch>;
  if (kIsPlain && kPacks <= 6 && kCount * kPacks < 40) return 5;
  return std::is_same_v<U, float> && kCount * kPacks >= 40 ? 3 : 4;
}

template <class T, class U, int kCount, int kPacks>
__global__ __launch_bounds__(kThreads,
                             (min_blocks<U, kCount, kPacks>())) void norm_kernel(const NormParams p) {
  static __shared__ merge_ops::Storage shared;
  const GatherParams& merge = p.merge;
  using Rows = NormRows<T, U, kCount, (kPacks > 0)>;
  Staged staged{};
  // Rows of any width read the parameters from memory each time: they would not fit.
  if constexpr (kPacks > 0) {
    constexpr int kChannels = kPacks * kWarpSize * kCount;
    staged.weight =
        reinterpret_cast<float*>(dynamic_shared() + merge_ops::ring_bytes<Rows, kPacks>(is_few(merge)));
    staged.bias = staged.weight + kChannels;
    staged.gamma = staged.bias + kChannels;
  }
  await_previous();
  const int blocks = (merge.tokens + merge.block_outputs - 1) / merge.block_outputs;  // per image
  const int64_t b = blockIdx.x / blocks;
  const int first = static_cast<int>(blockIdx.x % blocks) * merge.block_outputs;
  const Rows rows{
      p,
      static_cast<const T*>(merge.x.data_ptr) + b * merge.x.batch_stride,
      static_cast<const U*>(p.branch.data_ptr) + b * p.branch.batch_stride - p.skip * p.branch.row_stride,
      first,
      b * merge.tokens + first,
      staged};
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
    // gamma's place comes last, so that without it the block takes less.
    const int vectors = p.gamma.data_ptr == nullptr ? 2 : 3;
    const auto ring = merge_ops::ring_bytes<NormRows<T, U, kCount, (kPacks > 0)>, kPacks>;
    constexpr int kVector = kPacks * kWarpSize * kCount * static_cast<int>(sizeof(float));
    launch_kernel(norm_kernel<T, U, kCount, kPacks>, blocks, kThreads,
                  ring(is_few(merge)) + vectors * kVector, ring(true) + 3 * kVector, stream, p, true);
  });
}

}  // namespace

void launch_norm(const NormParams& p, Dtype dtype, Dtype branch_dtype, bool aligned, cudaStream_t stream) {
  if (p.branch.data_ptr == nullptr) {
    return dispatch(dtype,
                    [&](auto tag) { launch<typename decltype(tag)::type, NoBranch>(p, aligned, stream); });
  }
  dispatch(branch_dtype, [&](auto tag) {
    using U = typename decltype(tag)::type;
    // x is float32 under autocast, whatever the branch is; else both have one dtype.
    dtype == Dtype::kFloat ? launch<float, U>(p, aligned, stream) : launch<U, U>(p, aligned, stream);
  });
}

}  // namespace tome::norm
