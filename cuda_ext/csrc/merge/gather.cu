// out[m] = sum of w_i x_i over the tokens i with slot i = m, in ascending order and in float32. One launch.
// The weight is size_i / total_m for a merge, and 1 for the gradient of an unmerge.
//
// A block owns block_outputs consecutive output rows of one image. It first scans the slots of the image and
// lists the tokens that fall into its rows; then a warp sums a row at a time (rows.cuh).
#include "../launch.cuh"
#include "rows.cuh"

namespace tome::merge_ops {
namespace {

template <class T, int kCount_>
struct PlainRows {
  static constexpr int kCount = kCount_;
  using Fetched = Pack<T, kCount>;
  const GatherParams& p;
  const T* image_ptr;
  T* rows_ptr;  // of the block

  __device__ __forceinline__ Fetched fetch(int token, int channel) const {
    const int64_t stride = kCount == 1 ? p.x.channel_stride : 1;
    return load_pack<T, kCount>(image_ptr + token * p.x.row_stride + channel * stride);
  }
  static constexpr int kPackBytes = kWarpSize * static_cast<int>(sizeof(Fetched));
  __device__ __forceinline__ void copy(int token, int channel, char* to) const {
    copy_pack<T, kCount>(image_ptr + token * p.x.row_stride + channel,
                         reinterpret_cast<Fetched*>(to) + threadIdx.x % kWarpSize);
  }
  __device__ __forceinline__ Fetched arrived(const char* from) const {
    return reinterpret_cast<const Fetched*>(from)[threadIdx.x % kWarpSize];
  }
  __device__ __forceinline__ void value(const Fetched& fetched, int, float (&v)[kCount]) const {
    unpack(fetched, v);
  }
  __device__ __forceinline__ void store(int output, int channel, const float (&v)[kCount]) const {
    store_pack(rows_ptr + output * p.out.row_stride + channel, to_pack<T>(v));
  }
  template <int kPacks>
  __device__ __forceinline__ void finish(int output, const RowPart<kPacks, kCount>& row) const {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int channel = k * kWarpSize * kCount + lane_channel<kCount>();
      if (is_inside<kCount, kPacks>(k, lane_channel<kCount>(), p.channels)) store(output, channel, row[k]);
    }
  }
  __device__ __forceinline__ void finish_stored(int) const {}
  __device__ __forceinline__ void prepare() const {}
};

// Blocks per multiprocessor that registers must allow; more would spill.
template <int kCount, int kPacks>
constexpr int kMinBlocks = kCount * kPacks == 0    ? 4
                           : kCount * kPacks <= 16 ? 7
                           : kCount * kPacks <= 24 ? 6
                           : kPacks <= 8           ? 5
                                                   : 4;

template <class T, int kCount, int kPacks>
__global__ __launch_bounds__(kBlockThreads,
                             (kMinBlocks<kCount, kPacks>)) void gather_kernel(const GatherParams p) {
  using Rows = PlainRows<T, kCount>;
  static __shared__ Storage shared;
  const int blocks = (p.tokens + p.block_outputs - 1) / p.block_outputs;  // per image
  const int64_t b = blockIdx.x / blocks;
  const int first = static_cast<int>(blockIdx.x % blocks) * p.block_outputs;
  const Rows rows{p, static_cast<const T*>(p.x.data_ptr) + b * p.x.batch_stride,
                  static_cast<T*>(p.out.data_ptr) + b * p.out.batch_stride + first * p.out.row_stride};
  merge_rows<kPacks>(p, rows, shared, b, first, min(p.block_outputs, p.tokens - first), dynamic_shared());
}

template <class T, int kCount, int kPacks>
void launch(const GatherParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.tokens + p.block_outputs - 1) / p.block_outputs * p.batch;
  const auto bytes = ring_bytes<PlainRows<T, kCount>, kPacks>;
  launch_kernel(gather_kernel<T, kCount, kPacks>, blocks, kBlockThreads, bytes(is_few(p)), bytes(true),
                stream, p);
}

}  // namespace

void launch_gather(const GatherParams& p, Dtype dtype, bool aligned, cudaStream_t stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_packs<T>(p.channels, aligned, [&](auto count, auto packs) {
      constexpr int kCount = decltype(count)::value, kPacks = decltype(packs)::value;
      launch<T, kCount, kPacks>(p, stream);
    });
  });
}

}  // namespace tome::merge_ops
