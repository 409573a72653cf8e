// A last tile of up to 16 queries in the kernel whose keys all lie in shared memory: a product of 64 rows
// would cost as much as that of a full tile.
//
// All warps work on the same queries, by mma.sync. Each takes every fourth group of 16 keys for the scores;
// the warps exchange the highest scores, then weights and their sums, through shared memory, and each takes
// 16 channels of the output. Sums run in an order that does not depend on timing.
#pragma once

#include "hopper_products.cuh"
#include "softmax.cuh"

namespace tome::attention_ops::hopper {

// Where the tail finds its operands in shared memory, and where it puts what the warps exchange.
struct TailMemory {
  const char* keys;
  const char* values;
  const char* bias;
  char* weights;  // 32 bytes per key
  char* rows;     // per row and warp the highest score, then the sum of weights
};

constexpr int kTailRows = kTileRows;
constexpr int kTailBytes = 2 * kWarps * kTailRows * 4;

// `q` and `unit` are the left operands of the products with keys and with their bias. Nothing may still read
// the place of the weights when this is called. `keep` is told base and sum of every row, once.
template <class T, int kDim, int kKeys, class F>
__device__ __forceinline__ void attend_tail(const uint32_t (&q)[kDim / 16][4], const uint32_t (&unit)[4],
                                            const TailMemory& memory, int warp, float c, T* out_ptr,
                                            int64_t row_stride, int rows, F&& keep) {
  using Layout = RowLayout<kDim>;
  constexpr int kGroups = kKeys / kKeyStep;
  constexpr int kMost = (kGroups + kWarps - 1) / kWarps;  // groups of a warp
  constexpr int kGroupBytes = kKeyStep * Layout::kBytes;
  const int lane = threadIdx.x % kWarpSize;
  const int quad = lane / 4;  // four threads hold the rows `quad` and `quad` + 8
  const auto has_group = [&](int i) { return (i + 1) * kWarps <= kGroups || i * kWarps + warp < kGroups; };

  float score[kMost][2][4];
  float highest[2] = {-INFINITY, -INFINITY};
  const int first_key = Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (!has_group(i)) break;
    const int group = i * kWarps + warp;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) score[i][n][j] = 0.0f;
      const uint32_t bias =
          reinterpret_cast<const uint32_t*>(memory.bias)[(group * 2 + n) * kWarpSize + lane];
      attention_ops::multiply<T>(score[i][n], unit, bias, bias);
    }
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t b[4];
      load_matrices(memory.keys + group * kGroupBytes + Layout::further(first_key, 2 * k), b);
      attention_ops::multiply<T>(score[i][0], q[k], b[0], b[1]);
      attention_ops::multiply<T>(score[i][1], q[k], b[2], b[3]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) highest[j / 2 % 2] = fmaxf(highest[j / 2 % 2], score[i][j / 4][j % 4]);
  }
  auto* highest_ptr = reinterpret_cast<float*>(memory.rows);
  auto* sum_ptr = highest_ptr + kWarps * kTailRows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    highest[half] = quad_max(highest[half]);
    if (lane % 4 == 0) highest_ptr[(half * 8 + quad) * kWarps + warp] = highest[half];
  }
  __syncthreads();

  float offset[2];
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 all = reinterpret_cast<const float4*>(highest_ptr)[half * 8 + quad];
    offset[half] = exponent_offset(fmaxf(fmaxf(all.x, all.y), fmaxf(all.z, all.w)), c);
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (!has_group(i)) break;
    uint32_t weight[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float (&four)[4] = score[i][j / 2];
      const float left = fast_exp2(fmaf(four[j % 2 * 2], c, offset[j % 2]));
      const float right = fast_exp2(fmaf(four[j % 2 * 2 + 1], c, offset[j % 2]));
      sum[j % 2] += left + right;
      weight[j] = pack_pair<T>(left, right);
    }
    reinterpret_cast<uint4*>(memory.weights)[(i * kWarps + warp) * kWarpSize + lane] =
        make_uint4(weight[0], weight[1], weight[2], weight[3]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = quad_sum(sum[half]);
    if (lane % 4 == 0) sum_ptr[(half * 8 + quad) * kWarps + warp] = sum[half];
  }
  __syncthreads();

  constexpr int kColumns = kDim / kWarps;  // of a warp
  static_assert(kColumns == 16, "one load of values is two products");
  float out[2][2][4] = {};  // of even and of odd groups: two chains of products
  const char* values = memory.values + Layout::offset(lane % 16, 2 * warp + lane / 16);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const uint4 weight = reinterpret_cast<const uint4*>(memory.weights)[group * kWarpSize + lane];
    const uint32_t a[4] = {weight.x, weight.y, weight.z, weight.w};
    uint32_t b[4];
    load_transposed(values + group * kGroupBytes, b);
    attention_ops::multiply<T>(out[group % 2][0], a, b[0], b[1]);
    attention_ops::multiply<T>(out[group % 2][1], a, b[2], b[3]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 8 + quad;
    const float4 all = reinterpret_cast<const float4*>(sum_ptr)[row];
    const float total = (all.x + all.y) + (all.z + all.w);
    const float factor = fast_reciprocal(total);
    if (warp == 0 && lane % 4 == 0 && row < rows) keep(row, -offset[half], total);
    store_row<T, kColumns>([&](int j, int i) { return out[0][j][2 * half + i] + out[1][j][2 * half + i]; },
                           factor, out_ptr + row * row_stride + warp * kColumns, row < rows);
  }
}

}  // namespace tome::attention_ops::hopper
