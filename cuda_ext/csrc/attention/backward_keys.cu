// Gradients of keys and values; of up to some two hundred keys that of the queries as well.
//
// A block owns a head, or a share of its keys: 32 or 16 per warp, whose gradients stay in registers while all
// queries pass by in stages of 32, three under way. Weights are computed transposed, keys in rows, so that in
// registers they already are the left operands of both products that follow. Where a block has all keys of a
// head, dS stays in shared memory, and at the end each warp multiplies it with the keys for its own queries:
// no sums between warps, no atomics, the same bits on every run.
//
// Shared memory: KeysPlan.
#include <algorithm>

#include "../launch.cuh"
#include "backward_keys.cuh"

namespace tome::attention_ops {
namespace {

// The head of a block.
struct Place {
  int b, h;
};

template <class T, int kHeadDim, bool kIsWhole, int kMostWarps, int kBlocks>
__global__ __launch_bounds__(kMostWarps* kWarpSize,
                             kBlocks) void attention_backward_keys_kernel(const BackwardParams plan) {
  using Plan = KeysPlan<kHeadDim, kIsWhole>;
  constexpr int kRowBytes = RowLayout<kHeadDim>::kBytes;
  constexpr int kKeyTiles = KeysShape<kHeadDim>::kKeyTiles;
  constexpr int kWarpKeys = Plan::kWarpKeys;
  const AttentionParams& p = plan.forward;
  const int warps = plan.warps;
  const auto warp = [] { return static_cast<int>(forget(threadIdx.x) / kWarpSize); };
  const auto lane = [] { return static_cast<int>(forget(threadIdx.x) % kWarpSize); };
  // Found by divisions, which take longer than reading it again.
  const auto place = [] { return *reinterpret_cast<const Place*>(dynamic_shared()); };
  const auto first_key = [&] {
    const unsigned split = kIsWhole ? 0 : forget(blockIdx.x) % static_cast<unsigned>(plan.splits);
    return (static_cast<int>(split) * warps + warp()) * kWarpKeys;
  };
  char* shared = dynamic_shared();
  const auto keys = [&] { return shared + Plan::kKeys + warp() * kWarpKeys * kRowBytes; };
  const auto values = [&] { return keys() + warps * kWarpKeys * kRowBytes; };
  const auto slopes = [&] { return shared + Plan::slopes(warps); };
  const auto stages = [&] { return shared + Plan::stages(warps, p.queries); };
  const auto tiles = [&] { return (p.queries + kTileRows - 1) / kTileRows; };
  const auto rounds = [&] { return (p.queries + kStageRows - 1) / kStageRows; };
  const auto outs = [&](int round) {
    return stages() + kStages * Plan::kStageBytes + round % 2 * Plan::kRows;
  };
  const auto fill = [&](int round, int index, const Place& at) {
    if (round < rounds()) {
      char* stage = stages() + index * Plan::kStageBytes;
      constexpr int kCopies = kStageRows / kCopyRows;
      for (int i = warp(); i < (kIsWhole ? 3 : 2) * kCopies; i += warps) {
        const Heads& from = i < kCopies ? p.q : i < 2 * kCopies ? plan.grad : plan.out;
        const int row = round * kStageRows + i % kCopies * kCopyRows;
        char* to = i < 2 * kCopies ? stage + i * kCopyRows * kRowBytes
                                   : outs(round) + (i - 2 * kCopies) * kCopyRows * kRowBytes;
        copy_rows<T, kHeadDim, kCopyRows>(rows_address<T>(from, at.b, at.h, row), from.row_stride,
                                          p.queries - row, p.is_aligned, to);
      }
      if (threadIdx.x < kStageRows) {
        auto* to = reinterpret_cast<float*>(stage + Plan::kNumbers) + threadIdx.x;
        const int query = round * kStageRows + threadIdx.x;
        const int64_t from = (static_cast<int64_t>(at.b) * p.heads + at.h) * p.queries + query;
        if (query < p.queries) {
          cute::SM80_CP_ASYNC_CACHEALWAYS<float>::copy(p.lse_ptr[from], to[0]);
          if (!kIsWhole) cute::SM80_CP_ASYNC_CACHEALWAYS<float>::copy(plan.delta_ptr[from], to[kStageRows]);
        } else {
          to[0] = INFINITY;  // no weight
          to[kStageRows] = 0.0f;
        }
      }
    }
    cute::cp_async_fence();
  };
  // Of a stage that everybody sees.
  const auto find_deltas = [&](int round, char* stage) {
    for (int first = warp() * 8; first < kStageRows; first += warps * 8) {
      const int row = first + lane() / 4;
      const auto chunk_of = [row](const char* rows_ptr) {
        return [=](int i) { return shared_chunk<T, kHeadDim>(rows_ptr, row, i); };
      };
      const float sum = dot_rows<T, kHeadDim>(chunk_of(stage + Plan::kRows), chunk_of(outs(round)));
      if (lane() % 4 == 0) reinterpret_cast<float*>(stage + Plan::kNumbers)[kStageRows + row] = sum;
    }
  };

  const unsigned head = blockIdx.x / static_cast<unsigned>(kIsWhole ? 1 : plan.splits);
  const Place own = {static_cast<int>(head / static_cast<unsigned>(p.heads)),
                     static_cast<int>(head % static_cast<unsigned>(p.heads))};
  if (threadIdx.x == 0) *reinterpret_cast<Place*>(shared) = own;
  copy_rows<T, kHeadDim, kWarpKeys>(rows_address<T>(p.k, own.b, own.h, first_key()), p.k.row_stride,
                                    p.keys - first_key(), p.is_aligned, keys());
  copy_rows<T, kHeadDim, kWarpKeys>(rows_address<T>(p.v, own.b, own.h, first_key()), p.v.row_stride,
                                    p.keys - first_key(), p.is_aligned, values());
  fill(0, 0, own);
  fill(1, 1, own);
  KeyRows<T, kHeadDim> state;
#pragma unroll
  for (int i = 0; i < 2 * kKeyTiles; ++i) {
    state.bias[i / 2][i % 2] = __log2f(key_size(p, own.b, first_key() + i * 8 + lane() / 4));
  }
  cute::cp_async_wait<1>();
  __syncthreads();
  state.start(keys(), values());
  if (kIsWhole) find_deltas(0, stages());

  const float c = p.scale * kLog2E;
  static_assert(kStages == 3);
  int used = 0;
#pragma unroll 1
  for (int round = 0; round < rounds(); ++round) {
    cute::cp_async_wait<0>();
    // The next stage is full, this one has its deltas, values are in registers, and the stage that is filled
    // now is free.
    __syncthreads();
    fill(round + 2, used == 0 ? kStages - 1 : used - 1, place());
    char* stage = stages() + used * Plan::kStageBytes;
    used = used + 1 == kStages ? 0 : used + 1;
    if (kIsWhole && round + 1 < rounds()) find_deltas(round + 1, stages() + used * Plan::kStageBytes);
    const auto step = [&](int part, auto parts) {
      const int tile = round * (kStageRows / kTileRows) + part;
      const char* queries = stage + part * kTileRows * kRowBytes;
      state.template step<kIsWhole, decltype(parts)::value>(
          keys(), values(), queries, queries + Plan::kRows,
          reinterpret_cast<const float*>(stage + Plan::kNumbers) + part * kTileRows, c,
          slopes() + (warp() * kKeyTiles * tiles() + tile) * kTileBytes, tiles() * kTileBytes);
    };
    if constexpr (Plan::kParts == 2) {
      if ((round + 1) * kStageRows - kTileRows < p.queries) {
        step(0, Count<2>{});
      } else {
        step(0, Count<1>{});
      }
    } else {
#pragma unroll 1
      for (int part = 0; part < kStageRows / kTileRows; ++part) {
        if (round * kStageRows + part * kTileRows >= p.queries) break;
        step(part, Count<1>{});
      }
    }
  }
  const Place at = place();
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m) {
    const int row = first_key() + m * kTileRows;
    store_gradient<T, kHeadDim>(state.grad_k[m], p.scale, plan.grad_k, at.b, at.h, row, p.keys - row);
    store_gradient<T, kHeadDim>(state.grad_v[m], 1.0f, plan.grad_v, at.b, at.h, row, p.keys - row);
  }
  if constexpr (kIsWhole) {
    __syncthreads();
    const int key_tiles = (p.keys + kTileRows - 1) / kTileRows;
    const char* own_slopes = slopes() + threadIdx.x % kWarpSize * kAccessBytes;
#pragma unroll 1
    for (int tile = warp() * kKeyTiles; tile < tiles(); tile += warps * kKeyTiles) {
      float grad_q[kKeyTiles][kHeadDim / 8][4] = {};
#pragma unroll 2
      for (int step = 0; step < key_tiles; ++step) {
        uint32_t slope[kKeyTiles][4];
#pragma unroll
        for (int m = 0; m < kKeyTiles; ++m) {  // behind the last tile another one's: it is not stored
          const int from = step * tiles() + min(tile + m, tiles() - 1);
          load_transposed(own_slopes + from * kTileBytes, slope[m]);
        }
        multiply_onto<T, kHeadDim>(grad_q, slope, shared + Plan::kKeys + step * kTileRows * kRowBytes);
      }
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m) {
        const int row = (tile + m) * kTileRows;
        store_gradient<T, kHeadDim>(grad_q[m], p.scale, plan.grad_q, at.b, at.h, row, p.queries - row);
      }
    }
  }
}

template <class T, int kHeadDim, bool kIsWhole, int kMostWarps, int kBlocks>
void launch(const BackwardParams& plan, int max_shared_bytes, cudaStream_t stream) {
  launch_kernel(attention_backward_keys_kernel<T, kHeadDim, kIsWhole, kMostWarps, kBlocks>,
                plan.forward.batch * plan.forward.heads * plan.splits, plan.warps * kWarpSize,
                KeysPlan<kHeadDim, kIsWhole>::bytes(plan.warps, plan.forward.queries), max_shared_bytes,
                stream, plan);
}

}  // namespace

BackwardParams plan_backward(const BackwardParams& params, bool is_whole) {
  BackwardParams plan = params;
  dispatch_head_dim(params.forward.head_dim, [&](auto head_dim) {
    using Shape = KeysShape<decltype(head_dim)::value>;
    constexpr int kWarpKeys = Shape::kKeyTiles * kTileRows;
    const int all = (params.forward.keys + kWarpKeys - 1) / kWarpKeys;
    plan.splits = is_whole ? 1 : (all + Shape::kFewWarps - 1) / Shape::kFewWarps;
    plan.warps = (all + plan.splits - 1) / plan.splits;
  });
  return plan;
}

bool fits_whole(const BackwardParams& plan, int max_shared_bytes) {
  const AttentionParams& p = plan.forward;
  constexpr int kMostQueries = 4096;  // whose bytes an int holds
  bool fits = false;
  dispatch_head_dim(p.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    fits = plan.warps <= KeysShape<kHeadDim>::kMostWarps && p.queries <= kMostQueries &&
           KeysPlan<kHeadDim, true>::bytes(plan.warps, p.queries) <= max_shared_bytes;
  });
  return fits;
}

void launch_backward_keys(const BackwardParams& plan, Dtype dtype, bool is_whole, int max_shared_bytes,
                          cudaStream_t stream) {
  dispatch_half(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_head_dim(plan.forward.head_dim, [&](auto head_dim) {
      constexpr int kHeadDim = decltype(head_dim)::value;
      using Shape = KeysShape<kHeadDim>;
      if (!is_whole) {
        launch<T, kHeadDim, false, Shape::kFewWarps, 2>(plan, max_shared_bytes, stream);
      } else if (plan.warps <= Shape::kFewWarps) {
        launch<T, kHeadDim, true, Shape::kFewWarps, 2>(plan, max_shared_bytes, stream);
      } else {
        launch<T, kHeadDim, true, Shape::kMostWarps, 1>(plan, max_shared_bytes, stream);
      }
    });
  });
}

}  // namespace tome::attention_ops
