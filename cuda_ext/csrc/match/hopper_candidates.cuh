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
constexpr int kWideBatch = Look::kBoth ? (Look::kSteps > 4 ? 1 : 2) : (Look::kSteps > 4 ? 3 : 5);

// 16 bytes from shared or from device memory: volatile, so that all are asked for before a product waits for
// some, and so that the compiler doesn't select addresses instead.
__device__ __forceinline__ uint4 load_near(uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from));
  return x;
}
__device__ __forceinline__ uint4 load_far(const char* from) {
  uint4 x;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

// Score groups of eight targets, two in one product: the targets of both in its rows, the first one's source
// in even columns, the second one's in odd ones. By both halves that is final; by the high ones those within
// `close` of the row's largest are listed as pairs, for this warp alone, and counted. What is missing at the
// end repeats the last group.
template <class Tiling, class Look>
__device__ __forceinline__ int score_groups(const WideStream<Tiling, Look>& stream, const Candidate* groups,
                                            int first, int count, const char* rows_ptr,
                                            const uint32_t* block_top, float close, Candidate* pairs,
                                            unsigned long long* block_best) {
  constexpr int kBatch = kWideBatch<Look>;
  static_assert(16 * kBatch <= Tiling::kWarpPairs);
  constexpr int kPieces = (Tiling::kSteps + 1) / 2;
  constexpr int kLow = 2 * Tiling::kSteps;  // chunks from the high to the low half
  const int lane = threadIdx.x % kWarpSize;
  const auto group = [&](int i) { return groups[min(first + i, count - 1)]; };
  // The last tiles are still in the ring. Only they hold targets past the end.
  constexpr uint32_t kColumns = Look::kColumns;
  const uint32_t behind = Look::target_column(lane / 4);
  const uint32_t first_near = max(stream.count() - Look::kStages, 0);
  const uint32_t tiles = sm90::shared_address(stream.tiles);
  const auto* const targets = reinterpret_cast<const char*>(stream.share.targets_ptr);
  uint32_t column[2 * kBatch];
#pragma unroll
  for (int i = 0; i < 2 * kBatch; ++i) column[i] = group(i).column;
  Piece target[2 * kBatch][kPieces];
#pragma unroll
  for (int i = 0; i < 2 * kBatch; ++i) {
    const uint32_t from = column[i];
    const uint32_t tile = from / kColumns;
    const uint32_t near = tiles + tile % Look::kStages * Look::Tile::kBytes;
    const char* const far = targets + uint64_t{from + behind} * (4 * Tiling::kPadded);
    const auto load = [&](auto&& load_chunk) {
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        // Behind the last one the source has zeros.
        const int chunk = min(k * 4 + lane % 4, kLow - 1);
        target[i][k].high = load_chunk(chunk);
        if (Look::kBoth) target[i][k].low = load_chunk(chunk + kLow);
      }
    };
    if (tile >= first_near) {
      const int local = (from + behind) % kColumns;
      load([&](int chunk) { return load_near(near + Look::Tile::offset(local, chunk)); });
    } else {
      load([&](int chunk) { return load_far(far + chunk * 16); });
    }
  }
  int found = 0;
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const char* const source_ptr = rows_ptr + group(2 * i + lane / 4 % 2).row * row_bytes(Tiling::kPadded);
    // The corrections have sums of their own: see score_exactly.
    float score[4] = {}, right[4] = {}, left[4] = {};
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const Piece b = load_piece(source_ptr, k * 32 + lane % 4 * 8, Tiling::kPadded);
      const Piece& a = target[2 * i][k];
      const Piece& a8 = target[2 * i + 1][k];
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
    const bool is_even = lane % 2 == 0;
    const float mine_score =
        (is_even ? score[0] : score[3]) + ((is_even ? right[0] : right[3]) + (is_even ? left[0] : left[3]));
    const Candidate mine = group(2 * i + lane % 2);
    const int index = mine.column + Look::target_column(lane / 4);
    if constexpr (Look::kBoth) {
      unsigned long long packed =
          mine_score >= -INFINITY && index < stream.p.targets ? pack_best(mine_score, index) : 0;
#pragma unroll
      for (int step = 4; step < kWarpSize; step *= 2) {
        const unsigned long long other = __shfl_xor_sync(kFullWarp, packed, step);
        packed = other > packed ? other : packed;
      }
      if (lane < 2) atomicMax(block_best + mine.row, packed);
    } else {
      const bool is_close = lane % 4 < 2 && first + 2 * i + lane % 4 < count && index < stream.p.targets &&
                            mine_score >= score_of(block_top[mine.row]) - close;
      const unsigned all = __ballot_sync(kFullWarp, is_close);
      if (is_close) pairs[found + __popc(all & ((1u << lane) - 1))] = {mine.row, index};
      found += __popc(all);
    }
  }
  return found;
}

// Score single targets exactly, eight in one product, on its diagonal.
template <class Tiling>
__device__ __forceinline__ void score_pairs(const Share& share, const Candidate* pairs, int first, int count,
                                            const char* rows_ptr, unsigned long long* block_best) {
  constexpr int kPieces = (Tiling::kSteps + 1) / 2;
  const int lane = threadIdx.x % kWarpSize;
  Candidate mine[kPairBatch];
  Piece target[kPairBatch][kPieces];
#pragma unroll
  for (int i = 0; i < kPairBatch; ++i) {
    mine[i] = pairs[min(first + 8 * i + lane / 4, count - 1)];
    const __half* target_ptr = share.targets_ptr + static_cast<int64_t>(mine[i].column) * 2 * Tiling::kPadded;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      target[i][k] = load_piece(target_ptr, k * 32 + lane % 4 * 8, Tiling::kPadded);
    }
  }
#pragma unroll
  for (int i = 0; i < kPairBatch; ++i) {
    const char* source_ptr = rows_ptr + mine[i].row * row_bytes(Tiling::kPadded);
    float score[4] = {}, right[4] = {}, left[4] = {};
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const Piece b = load_piece(source_ptr, k * 32 + lane % 4 * 8, Tiling::kPadded);
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
