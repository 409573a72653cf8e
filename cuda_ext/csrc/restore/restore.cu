// out[i] = x[s] + gamma * branch[s], rounded once, where s is what a chain of slot maps makes of i; or x[s]
// as it is where there is no branch. One launch for any number of merges.
//
// A block owns block_rows consecutive rows of the output. A thread for each of them follows the maps: one
// dependent load per merge, so that they are waited for once per block and not once per row. Then a warp
// copies a row at a time.
#include "../launch.cuh"
#include "../norm/any_dtype.cuh"
#include "restore.h"

namespace tome::restoring {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPacks = 2;  // of a lane under way; four spill
constexpr int kBadSlot = -1;

// Where a chain leads from token i; kBadSlot where a map leads out of the next one, so that no slot, however
// bad, becomes an address.
__device__ __forceinline__ int follow(const Chain& chain, int64_t b, int i) {
#pragma unroll 1
  for (int k = 0; k < chain.count; ++k) {
    if (static_cast<unsigned>(i) >= static_cast<unsigned>(chain.length[k])) return kBadSlot;
    i = __ldg(chain.slot[k].data_ptr + chain.slot[k].offset(b, i));
  }
  return i;
}

__global__ __launch_bounds__(kFollowThreads) void follow_kernel(const FollowParams p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFollowThreads + threadIdx.x;
  const int length = p.chain.length[0];
  if (at < p.batch * length) p.out_ptr[at] = follow(p.chain, at / length, static_cast<int>(at % length));
}

template <class T, class U, int kCount>
__global__ __launch_bounds__(kThreads, 4) void restore_kernel(const RestoreParams p) {
  static __shared__ int slots[kMaxBlockRows];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * p.block_rows;
  const int64_t left = p.batch * p.length - first;
  const int rows = left < p.block_rows ? static_cast<int>(left) : p.block_rows;
  await_previous();
  if (static_cast<int>(threadIdx.x) < rows) {
    const int64_t row = first + threadIdx.x;
    slots[threadIdx.x] = follow(p.chain, row / p.length, static_cast<int>(row % p.length));
  }
  __syncthreads();
  const bool has_branch = p.branch.data_ptr != nullptr;
  const int64_t x_stride = kCount == 1 ? p.x.channel_stride : 1;
  const int64_t branch_stride = kCount == 1 ? p.branch.channel_stride : 1;
  constexpr int kStep = kWarpSize * kCount;
#pragma unroll 1
  for (int i = threadIdx.x / kWarpSize; i < rows; i += kWarps) {
    const int slot = slots[i];
    const bool is_valid = static_cast<unsigned>(slot) < static_cast<unsigned>(p.tokens);
    const int64_t b = (first + i) / p.length;
    const T* x_ptr = static_cast<const T*>(p.x.data_ptr) + b * p.x.batch_stride + slot * p.x.row_stride;
    const U* branch_ptr =
        static_cast<const U*>(p.branch.data_ptr) + b * p.branch.batch_stride + slot * p.branch.row_stride;
    T* out_ptr = static_cast<T*>(p.out_ptr) + (first + i) * p.channels;
#pragma unroll 1
    for (int base = threadIdx.x % kWarpSize * kCount; base < p.channels; base += kPacks * kStep) {
      Pack<T, kCount> x[kPacks];
      Pack<U, kCount> branch[kPacks];
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int at = base + k * kStep;
        if (!is_valid || at >= p.channels) continue;
        x[k] = load_pack<T, kCount>(x_ptr + at * x_stride);
        if (has_branch) branch[k] = load_pack<U, kCount>(branch_ptr + at * branch_stride);
      }
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int at = base + k * kStep;
        if (at >= p.channels) break;
        if (!is_valid) {  // a bad slot is seen in the result
#pragma unroll
          for (int c = 0; c < kCount; ++c) x[k].value[c] = from_float<T>(NAN);
        } else if (has_branch) {  // as merge_add_norm adds, so that whoever adds first changes no bit
          float v[kCount], added[kCount], gamma[kCount];
          unpack(x[k], v);
          unpack(branch[k], added);
          if (p.gamma.data_ptr != nullptr) norm::load_vector(p.gamma, at, gamma);
#pragma unroll
          for (int c = 0; c < kCount; ++c) {
            v[c] = p.gamma.data_ptr == nullptr ? v[c] + added[c] : fmaf(gamma[c], added[c], v[c]);
          }
          x[k] = to_pack<T>(v);
        }
        store_pack(out_ptr + at, x[k]);
      }
    }
  }
}

template <class T, class U>
void launch(const RestoreParams& p, bool aligned, cudaStream_t stream) {
  const int64_t blocks = (p.batch * p.length + p.block_rows - 1) / p.block_rows;
  launch_kernel(aligned ? restore_kernel<T, U, kPackSize<T>> : restore_kernel<T, U, 1>, blocks, kThreads, 0,
                0, stream, p, true);
}

}  // namespace

void launch_follow(const FollowParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.batch * p.chain.length[0] + kFollowThreads - 1) / kFollowThreads;
  launch_kernel(follow_kernel, blocks, kFollowThreads, 0, 0, stream, p);
}

void launch_restore(const RestoreParams& p, Dtype dtype, Dtype branch_dtype, bool aligned,
                    cudaStream_t stream) {
  dispatch(branch_dtype, [&](auto tag) {
    using U = typename decltype(tag)::type;
    dtype == Dtype::kFloat ? launch<float, U>(p, aligned, stream) : launch<U, U>(p, aligned, stream);
  });
}

}  // namespace tome::restoring
