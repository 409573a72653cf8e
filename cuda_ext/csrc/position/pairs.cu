// out[b, h, i, j] = bias[h, home(i), home(j)] + key_bias(j): the mask of tokens that stand in the places of
// others. Written once; the bias is small and comes out of caches.
//
// A block owns kPairRows rows of an image's heads, a warp every eighth of them, a lane kPairColumns columns,
// whose places it reads once for all of its rows.
#include "../launch.cuh"
#include "../vector.cuh"
#include "position.h"

namespace tome::position {
namespace {

constexpr int kWarps = kPairThreads / kWarpSize;

template <class T>
__global__ __launch_bounds__(kPairThreads) void pairs_kernel(const PairParams p) {
  const unsigned blocks = static_cast<unsigned>(pair_blocks(p));
  const int64_t b = blockIdx.x / blocks;
  const int rows = p.heads * p.tokens;
  const int first =
      static_cast<int>(blockIdx.x % blocks) * kPairRows + static_cast<int>(threadIdx.x / kWarpSize);
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const auto home_of = [&](int token) {
    const int64_t home = __ldg(p.home.data_ptr + p.home.offset(b, token));
    return home < 0 || home >= p.places ? -1 : static_cast<int>(home);
  };
  for (int start = 0; start < p.padded; start += kWarpSize * kPairColumns) {
    const int column = start + lane * kPairColumns;
    if (column >= p.padded) break;
    int place[kPairColumns];
    float extra[kPairColumns];
#pragma unroll
    for (int c = 0; c < kPairColumns; ++c) {
      const bool is_token = column + c < p.tokens;
      place[c] = is_token ? home_of(column + c) : -1;
      extra[c] = is_token && p.key_bias.data_ptr != nullptr
                     ? __ldg(p.key_bias.data_ptr + p.key_bias.offset(b, column + c))
                     : 0.0f;
    }
#pragma unroll 4
    for (int row = first; row < min(rows, first + kPairRows / kWarps * kWarps); row += kWarps) {
      const int h = row / p.tokens;
      const int home = home_of(row % p.tokens);
      const T* from = static_cast<const T*>(p.bias_ptr) + h * p.head_stride + home * p.row_stride;
      float v[kPairColumns];
#pragma unroll
      for (int c = 0; c < kPairColumns; ++c) {
        const bool is_known = home >= 0 && place[c] >= 0;
        const float bias = is_known ? to_float(__ldg(from + place[c] * p.column_stride)) : nanf("");
        v[c] = column + c < p.tokens ? bias + extra[c] : 0.0f;
      }
      T* out_ptr = static_cast<T*>(p.out_ptr) + (b * rows + row) * p.padded + column;
      store_pack(out_ptr, to_pack<T>(v));
    }
  }
}

}  // namespace

void launch_pairs(const PairParams& p, Dtype dtype, cudaStream_t stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_kernel(pairs_kernel<T>, pair_blocks(p) * p.batch, kPairThreads, 0, 0, stream, p);
  });
}

}  // namespace tome::position
