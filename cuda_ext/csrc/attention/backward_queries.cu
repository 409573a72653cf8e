// The gradient of queries whose keys pass through shared memory in tiles, and delta: sequences of any length.
//
// A block owns 64 queries of one head (128 at head dimensions up to 64), a share per warp, and walks over the
// keys in tiles of 64 as the forward kernel does.
//
// Shared memory: per warp its queries and the gradients of their output; per stage keys, values, bias.
#include "../launch.cuh"
#include "backward_keys.cuh"

namespace tome::attention_ops {
namespace {

constexpr int kStageKeys = 64;
constexpr int kStageBlocks = kStageKeys / kBlockKeys;

template <int kHeadDim>
struct QueriesPlan {
  using Block = KeyBlock<kHeadDim>;
  static constexpr int kRowTiles = kHeadDim <= 64 ? 2 : 1;
  static constexpr int kRows = kRowTiles * kTileRows;  // of a warp
  static constexpr int kKeyStages = kHeadDim <= 96 ? 3 : 2;
  static constexpr int kWarpBytes = 2 * kRows * RowLayout<kHeadDim>::kBytes;
  static constexpr int kFirstStage = kWarps * kWarpBytes;
  static constexpr int kStageBytes = kStageBlocks * Block::kBytes;
  static constexpr int kBehindStages = kFirstStage + kKeyStages * kStageBytes;
};

template <class T, int kHeadDim>
__global__ __launch_bounds__(kThreads, 2) void attention_backward_queries_kernel(const BackwardParams plan) {
  using Plan = QueriesPlan<kHeadDim>;
  using Block = KeyBlock<kHeadDim>;
  using Layout = RowLayout<kHeadDim>;
  constexpr int kRowTiles = Plan::kRowTiles;
  static_assert(kStageKeys <= kThreads && 2 * kStageBlocks == kWarps);
  const AttentionParams& p = plan.forward;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const unsigned head = blockIdx.x / static_cast<unsigned>(plan.splits);
  const int b = head / static_cast<unsigned>(p.heads);
  const int h = head % static_cast<unsigned>(p.heads);
  const int first = (blockIdx.x % static_cast<unsigned>(plan.splits) * kWarps + warp) * Plan::kRows;
  char* shared = dynamic_shared();
  char* queries = shared + warp * Plan::kWarpBytes;
  char* grads = queries + Plan::kRows * Layout::kBytes;

  // Each warp copies the keys or the values of one block of a stage.
  const bool is_values = warp % 2 != 0;
  const Heads& from = is_values ? p.v : p.k;
  float size = 0.0f;  // read one round before its logarithm is taken
  const auto read_size = [&](int key) {
    if (threadIdx.x < kStageKeys) size = key_size(p, b, key + threadIdx.x);
  };
  int filled = Plan::kFirstStage;
  const auto fill = [&](int key) {
    if (key < p.keys) {
      const int row = key + warp / 2 * kBlockKeys;
      copy_rows<T, kHeadDim, kBlockKeys>(
          rows_address<T>(from, b, h, row), from.row_stride, p.keys - row, p.is_aligned,
          shared + filled + warp / 2 * Block::kBytes + (is_values ? Block::kValues : 0));
      if (threadIdx.x < kStageKeys) store_bias<kHeadDim>(p, shared + filled, threadIdx.x, size);
      read_size(key + kStageKeys);
      filled += Plan::kStageBytes;
      if (filled == Plan::kBehindStages) filled = Plan::kFirstStage;
    }
    cute::cp_async_fence();
  };

  copy_rows<T, kHeadDim, Plan::kRows>(rows_address<T>(p.q, b, h, first), p.q.row_stride, p.queries - first,
                                      p.is_aligned, queries);
  copy_rows<T, kHeadDim, Plan::kRows>(rows_address<T>(plan.grad, b, h, first), plan.grad.row_stride,
                                      p.queries - first, p.is_aligned, grads);
  read_size(0);
#pragma unroll
  for (int stage = 0; stage < Plan::kKeyStages - 1; ++stage) fill(stage * kStageKeys);
  cute::cp_async_wait<Plan::kKeyStages - 2>();
  __syncthreads();

  Operand<kHeadDim> query[kRowTiles], grad[kRowTiles];
  float lse[kRowTiles][2], delta[kRowTiles][2];
  float grad_q[kRowTiles][kHeadDim / 8][4] = {};
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    query[m].load(queries + m * kTileRows * Layout::kBytes);
    grad[m].load(grads + m * kTileRows * Layout::kBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * kTileRows + half * 8 + lane / 4;
      const int at = first + row;
      lse[m][half] =
          at < p.queries ? __ldg(p.lse_ptr + static_cast<int64_t>(head) * p.queries + at) * kLog2E : INFINITY;
      const T* out_ptr = rows_address<T>(plan.out, b, h, min(at, p.queries - 1));
      delta[m][half] = dot_rows<T, kHeadDim>(
          [&](int i) { return load_pack<T, kChunkChannels>(out_ptr + i * kChunkChannels); },
          [&](int i) { return shared_chunk<T, kHeadDim>(grads, row, i); });
      if (at < p.queries && lane % 4 == 0) {
        plan.delta_ptr[static_cast<int64_t>(head) * p.queries + at] = delta[m][half];
      }
    }
  }

  // 16 keys of the block at `block`.
  const float c = p.scale * kLog2E;
  const auto step = [&](const char* block, int first_key) {
    const char* keys = block + first_key * Layout::kBytes;
    const auto* bias = reinterpret_cast<const float4*>(block + Block::kBias + first_key * 8) + lane % 4;
    float weight[1][kRowTiles][2][4], slope[1][kRowTiles][2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float4 start = bias[n * 4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        weight[0][m][n][0] = start.x;
        weight[0][m][n][1] = start.y;
        weight[0][m][n][2] = start.z;
        weight[0][m][n][3] = start.w;
      }
    }
    multiply_rows<T, kHeadDim, true>(weight, query, nullptr, keys);
    multiply_rows<T, kHeadDim, true>(slope, grad, nullptr, keys + Block::kValues);
    uint32_t operand[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& x = slope[0][m][i / 4][i % 4];
        x = fast_exp2(fmaf(weight[0][m][i / 4][i % 4], c, -lse[m][i / 2 % 2])) * (x - delta[m][i / 2 % 2]);
      }
      pack_operand<T>(slope[0][m], operand[m]);
    }
    multiply_onto<T, kHeadDim>(grad_q, operand, keys);
  };
  int used = Plan::kFirstStage;
#pragma unroll 1
  for (int key = 0; key < p.keys; key += kStageKeys) {
    fill(key + (Plan::kKeyStages - 1) * kStageKeys);
    if (first < p.queries) {
      const int keys = min(kStageKeys, p.keys - key);
#pragma unroll 1
      for (int i = 0; i < keys; i += kKeyStep) {
        step(shared + used + i / kBlockKeys * Block::kBytes, i % kBlockKeys);
      }
    }
    used += Plan::kStageBytes;
    if (used == Plan::kBehindStages) used = Plan::kFirstStage;
    cute::cp_async_wait<Plan::kKeyStages - 2>();
    __syncthreads();  // the next stage is full, and everyone is done with the one that is filled next
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    const int row = first + m * kTileRows;
    store_gradient<T, kHeadDim>(grad_q[m], p.scale, plan.grad_q, b, h, row, p.queries - row);
  }
}

}  // namespace

void launch_backward_queries(const BackwardParams& params, Dtype dtype, int max_shared_bytes,
                             cudaStream_t stream) {
  dispatch_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_head_dim(params.forward.head_dim, [&](auto head_dim) {
      constexpr int kHeadDim = decltype(head_dim)::value;
      constexpr int kBlockRows = kWarps * QueriesPlan<kHeadDim>::kRows;
      BackwardParams plan = params;
      plan.splits = (params.forward.queries + kBlockRows - 1) / kBlockRows;
      launch_kernel(attention_backward_queries_kernel<T, kHeadDim>,
                    params.forward.batch * params.forward.heads * plan.splits, kThreads,
                    QueriesPlan<kHeadDim>::kBehindStages, max_shared_bytes, stream, plan);
    });
  });
}

}  // namespace tome::attention_ops
