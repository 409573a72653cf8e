// What comes close on Hopper: groups of eight targets are looked at again, by their high halves (what is left
// of them still lies in the ring) or by both, and single targets are scored exactly.
#pragma once

#include "hopper_tiles.cuh"

namespace tome::match {

constexpr int kPairBatch = 2;           // products of pairs that a warp has in flight
constexpr int kPairs = 8 * kPairBatch;  // scored by one warp at once

// Products of groups that a warp has in flight: as many as registers allow. With ten groups per warp one
// round usually does.
template <class Look>
constexpr int kWideBatch = Look::kBoth ? (Look::kSteps > 4 ? 1 : 2) : (Look::kSteps > 4 ? 2 : 5);

// The column of a thread's n-th target in a group.
__device__ __forceinline__ int target_column(int n) { return n % 2 + n / 2 * kProductColumns; }

// The chunk-th 16 bytes of a target: from the ring where it is still there.
template <class Traits, class Look>
__device__ __forceinline__ uint4 load_chunk(const WideStream<Traits, Look>& stream, int column, int chunk) {
  const int tile = column / Look::kColumns;
  const char* from = reinterpret_cast<const char*>(stream.share.targets_ptr +
                                                   static_cast<int64_t>(column) * 2 * Traits::kPadded) +
                     chunk * 16;
  if (tile >= stream.count() - Look::kStages) {
    from = stream.place(tile) + Look::Tile::offset(column % Look::kColumns, chunk);
  }
  return *reinterpret_cast<const uint4*>(from);
}

// Score groups of eight targets, two in one product: the targets of both in its rows, the first one's source
// in even columns, the second one's in odd ones. By both halves that is final; by the high ones those within
// `close` of the row's largest are listed as pairs. What is missing at the end repeats the last group.
template <class Traits, class Look>
__device__ __forceinline__ void score_groups(const WideStream<Traits, Look>& stream, const Candidate* groups,
                                             int first, int count, const char* rows_ptr,
                                             const uint32_t* block_top, float close, Candidate* pairs,
                                             int* pair_count, unsigned long long* block_best) {
  constexpr int kBatch = kWideBatch<Look>;
  constexpr int kPieces = (Traits::kSteps + 1) / 2;
  constexpr int kLow = 2 * Traits::kSteps;  // chunks from the high to the low half
  const int lane = threadIdx.x % kWarpSize;
  Candidate mine[kBatch];
  Piece target[kBatch][2][kPieces];
  const char* source_ptr[kBatch];
  const auto is_there = [&](int k) { return k * 4 + lane % 4 < kLow; };
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const Candidate pair[2] = {groups[min(first + 2 * i, count - 1)],
                               groups[min(first + 2 * i + 1, count - 1)]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = min(pair[half].column + target_column(lane / 4), stream.targets - 1);
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        Piece& piece = target[i][half][k];
        piece = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
        if (!is_there(k)) continue;
        piece.high = load_chunk(stream, column, k * 4 + lane % 4);
        if (Look::kBoth) piece.low = load_chunk(stream, column, k * 4 + lane % 4 + kLow);
      }
    }
    source_ptr[i] = rows_ptr + (lane / 4 % 2 == 0 ? pair[0].row : pair[1].row) * row_bytes(Traits::kPadded);
    mine[i] = lane % 2 == 0 ? pair[0] : pair[1];
  }
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    // The corrections have sums of their own: see score_exactly.
    float score[4] = {}, right[4] = {}, left[4] = {};
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const Piece b = load_piece(source_ptr[i], k * 32 + lane % 4 * 8, Traits::kPadded);
      const Piece& a = target[i][0][k];
      const Piece& a8 = target[i][1][k];
      multiply(score, {a.high.x, a8.high.x, a.high.y, a8.high.y}, b.high.x, b.high.y);
      multiply(score, {a.high.z, a8.high.z, a.high.w, a8.high.w}, b.high.z, b.high.w);
      if constexpr (Look::kBoth) {
        multiply(right, {a.low.x, a8.low.x, a.low.y, a8.low.y}, b.high.x, b.high.y);
        multiply(left, {a.high.x, a8.high.x, a.high.y, a8.high.y}, b.low.x, b.low.y);
        multiply(right, {a.low.z, a8.low.z, a.low.w, a8.low.w}, b.high.z, b.high.w);
        multiply(left, {a.high.z, a8.high.z, a.high.w, a8.high.w}, b.low.z, b.low.w);
      }
    }
    // Row lane / 4 and an even column, or row lane / 4 + 8 and an odd one.
    const int at = lane % 2 == 0 ? 0 : 3;
    const float mine_score =
        (at == 0 ? score[0] : score[3]) + ((at == 0 ? right[0] : right[3]) + (at == 0 ? left[0] : left[3]));
    const int index = mine[i].column + target_column(lane / 4);
    if constexpr (Look::kBoth) {
      unsigned long long packed =
          mine_score >= -INFINITY && index < stream.targets ? pack_best(mine_score, index) : 0;
#pragma unroll
      for (int step = 4; step < kWarpSize; step *= 2) {
        const unsigned long long other = __shfl_xor_sync(kFullWarp, packed, step);
        packed = other > packed ? other : packed;
      }
      if (lane < 2) atomicMax(block_best + mine[i].row, packed);
    } else if (lane % 4 < 2 && first + 2 * i + lane % 4 < count && index < stream.targets &&
               mine_score >= score_of(block_top[mine[i].row]) - close) {
      const int to = atomicAdd(pair_count, 1);
      if (to < Traits::kRows * kRowPairs) pairs[to] = {mine[i].row, index};
    }
  }
}

// Score single targets exactly, eight in one product, on its diagonal.
template <class Traits>
__device__ __forceinline__ void score_pairs(const Share& share, const Candidate* pairs, int first, int count,
                                            const char* rows_ptr, unsigned long long* block_best) {
  constexpr int kPieces = (Traits::kSteps + 1) / 2;
  const int lane = threadIdx.x % kWarpSize;
  Candidate mine[kPairBatch];
  Piece target[kPairBatch][kPieces];
#pragma unroll
  for (int i = 0; i < kPairBatch; ++i) {
    mine[i] = pairs[min(first + 8 * i + lane / 4, count - 1)];
    const __half* target_ptr = share.targets_ptr + static_cast<int64_t>(mine[i].column) * 2 * Traits::kPadded;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      target[i][k] = load_piece(target_ptr, k * 32 + lane % 4 * 8, Traits::kPadded);
    }
  }
#pragma unroll
  for (int i = 0; i < kPairBatch; ++i) {
    const char* source_ptr = rows_ptr + mine[i].row * row_bytes(Traits::kPadded);
    float score[4] = {}, right[4] = {}, left[4] = {};
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const Piece b = load_piece(source_ptr, k * 32 + lane % 4 * 8, Traits::kPadded);
      const Piece& a = target[i][k];
      multiply(score, {a.high.x, 0, a.high.y, 0}, b.high.x, b.high.y);
      multiply(score, {a.high.z, 0, a.high.w, 0}, b.high.z, b.high.w);
      multiply(right, {a.low.x, 0, a.low.y, 0}, b.high.x, b.high.y);
      multiply(right, {a.low.z, 0, a.low.w, 0}, b.high.z, b.high.w);
      multiply(left, {a.high.x, 0, a.high.y, 0}, b.low.x, b.low.y);
      multiply(left, {a.high.z, 0, a.high.w, 0}, b.low.z, b.low.w);
    }
    // Row lane / 4 meets its own source in a column of the same number.
    const bool is_mine = lane % 4 == lane / 8 && first + 8 * i + lane / 4 < count;
    const bool is_odd = lane / 4 % 2 != 0;
    const float exact =
        (is_odd ? score[1] : score[0]) + ((is_odd ? right[1] : right[0]) + (is_odd ? left[1] : left[0]));
    if (is_mine && exact >= -INFINITY) atomicMax(block_best + mine[i].row, pack_best(exact, mine[i].column));
  }
}

}  // namespace tome::match
