// Which targets of a long image may be a source's best? A first look at all of them with the products of the
// high halves alone, then a second, exact one at the few that come close.
//
// |score - high*high'| <= kCorrection, so a row's best target lies within twice that of the row's largest
// high*high'. A thread sees kThreadTargets targets of a row per step (a group), and remembers the largest
// products of its two best groups with their numbers, and that of the third. On random keys about one group
// per row remains. Where a third does, all groups of that thread are looked at again.
#pragma once

#include "score.cuh"
#include "targets.cuh"

namespace tome::match {

constexpr int kBatch = 2;          // products of candidates that a warp has in flight
constexpr int kThreadTargets = 4;  // of one row: two neighbours, and two 8 columns behind

// The high halves of a warp's sources: in registers where their depth is known, else read again and again.
template <int kSteps>
struct Sources {
  uint32_t value[kSteps][kScanTiles][4];

  __device__ __forceinline__ explicit Sources(const char* const (&source_ptr)[kScanTiles]) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int m = 0; m < kScanTiles; ++m) load_matrices(source_ptr[m] + k * 2 * kProductDepth, value[k][m]);
    }
  }
  __device__ __forceinline__ void get(int k, int m, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = value[k][m][i];
  }
};

template <>
struct Sources<0> {
  const char* row_ptr[kScanTiles];

  __device__ __forceinline__ explicit Sources(const char* const (&source_ptr)[kScanTiles]) {
#pragma unroll
    for (int m = 0; m < kScanTiles; ++m) row_ptr[m] = source_ptr[m];
  }
  __device__ __forceinline__ void get(int k, int m, uint32_t (&a)[4]) const {
    load_matrices(row_ptr[m] + k * 2 * kProductDepth, a);
  }
};

// high*high' of 32 sources and 16 targets. Of score[m][n][i], row 16 m + 8 (i / 2) + lane / 4 and column
// 8 n + 2 (lane % 4) + i % 2.
template <int kSteps>
__device__ __forceinline__ void score_high(const Sources<kSteps>& sources, const char* target_ptr, int steps,
                                           float (&score)[kScanTiles][2][4]) {
#pragma unroll
  for (int i = 0; i < kScanTiles * 8; ++i) score[i / 8][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll(kSteps > 0 ? kSteps : 2)
  for (int k = 0; k < (kSteps > 0 ? kSteps : steps); ++k) {
    uint32_t b[4];
    load_matrices(target_ptr + k * 2 * kProductDepth, b);
#pragma unroll
    for (int m = 0; m < kScanTiles; ++m) {
      uint32_t a[4];
      sources.get(k, m, a);
      multiply(score[m][0], a, b[0], b[1]);
      multiply(score[m][1], a, b[2], b[3]);
    }
  }
}

// What a thread remembers of its groups. The lowest bits of `best` give way to the group's number: as many as
// the largest number needs, so the error of that is known and no length is too large.
template <int kRows>
struct Seen {
  float best[kRows], second[kRows], third[kRows];

  __device__ __forceinline__ Seen() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) best[i] = second[i] = third[i] = -INFINITY;
  }

  // The largest product of a group of row i; NaN loses against any number, and stays NaN with a number in its
  // lowest bits.
  __device__ __forceinline__ void note(int i, float largest, uint32_t group, uint32_t mask) {
    const float numbered = __uint_as_float((__float_as_uint(largest) & ~mask) | group);
    const float beaten = fminf(best[i], numbered);
    best[i] = fmaxf(best[i], numbered);
    third[i] = fmaxf(third[i], fminf(second[i], beaten));
    second[i] = fmaxf(second[i], beaten);
  }
};

// Note the groups of score_high.
__device__ __forceinline__ void note_groups(Seen<2 * kScanTiles>& seen,
                                            const float (&score)[kScanTiles][2][4], uint32_t group,
                                            uint32_t mask) {
#pragma unroll
  for (int i = 0; i < 2 * kScanTiles; ++i) {
    const auto& s = score[i / 2];
    const int first = i % 2 * 2;
    seen.note(i, fmaxf(fmaxf(s[0][first], s[0][first + 1]), fmaxf(s[1][first], s[1][first + 1])), group,
              mask);
  }
}

// All bits that the numbers below `groups` use.
__device__ __forceinline__ uint32_t group_mask(int groups) {
  return groups > 1 ? 0xffffffffu >> __clz(groups - 1) : 0;
}

// How far below the largest numbered product of its row the best target may lie: an error of the product and
// a lost number on either side. Products are at most kMetricScale^2, with 2^-23 of that in their last bit.
__device__ __forceinline__ float closeness(uint32_t mask, float error) {
  return 2.0f * (error + static_cast<float>(mask + 1) * (kMetricScale * kMetricScale * 0x1p-23f));
}

// A thread's share of a row in one step of score_exactly: eight channels of either half.
struct Piece {
  uint4 high, low;
};

// Rows lie in the metric or in shared memory.
__device__ __forceinline__ Piece load_piece(const void* row_ptr, int channel, int depth) {
  const Piece nothing{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
  if (channel >= depth) return nothing;
  const auto* from = reinterpret_cast<const __half*>(row_ptr) + channel;
  return {*reinterpret_cast<const uint4*>(from), *reinterpret_cast<const uint4*>(from + depth)};
}

// All three products of 16 sources in shared memory with 8 targets in the metric, kBatch times. A thread
// names the rows it reads: sources lane / 4 and lane / 4 + 8, and target lane / 4. The channels of a product
// are taken in another order, the same on both sides, so that a thread's share lies together. Equal rows get
// equal bits.
template <int kSteps>
__device__ __forceinline__ void score_exactly(const char* const (&source_ptr)[kBatch][2],
                                              const __half* const (&target_ptr)[kBatch], int padded,
                                              float (&score)[kBatch][4]) {
  constexpr int kDepth = 2 * kProductDepth;                      // of two products
  constexpr int kMaxPieces = kSteps > 0 ? (kSteps + 1) / 2 : 1;  // in flight
  const int depth = kSteps > 0 ? kSteps * kProductDepth : padded;
  const int first = threadIdx.x % 4 * 8;
  // The corrections have sums of their own, added once: they are small, and tensor cores cut off what lies
  // below the last bit of a running sum.
  float right[kBatch][4] = {}, left[kBatch][4] = {};
#pragma unroll
  for (int i = 0; i < 4 * kBatch; ++i) score[i / 4][i % 4] = 0.0f;
#pragma unroll 1
  for (int base = 0; base < depth; base += kMaxPieces * kDepth) {
    Piece target[kBatch][kMaxPieces];
#pragma unroll
    for (int i = 0; i < kBatch * kMaxPieces; ++i) {
      target[i / kMaxPieces][i % kMaxPieces] =
          load_piece(target_ptr[i / kMaxPieces], base + i % kMaxPieces * kDepth + first, depth);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int k = 0; k < kMaxPieces; ++k) {
        const int channel = base + k * kDepth + first;
        const Piece a = load_piece(source_ptr[i][0], channel, depth);
        const Piece a8 = load_piece(source_ptr[i][1], channel, depth);
        const Piece b = target[i][k];
        multiply(score[i], {a.high.x, a8.high.x, a.high.y, a8.high.y}, b.high.x, b.high.y);
        multiply(right[i], {a.high.x, a8.high.x, a.high.y, a8.high.y}, b.low.x, b.low.y);
        multiply(left[i], {a.low.x, a8.low.x, a.low.y, a8.low.y}, b.high.x, b.high.y);
        multiply(score[i], {a.high.z, a8.high.z, a.high.w, a8.high.w}, b.high.z, b.high.w);
        multiply(right[i], {a.high.z, a8.high.z, a.high.w, a8.high.w}, b.low.z, b.low.w);
        multiply(left[i], {a.low.z, a8.low.z, a.low.w, a8.low.w}, b.high.z, b.high.w);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4 * kBatch; ++i) score[i / 4][i % 4] += right[i / 4][i % 4] + left[i / 4][i % 4];
}

// The better of two neighbouring targets, packed; 0, below every score, where both are NaN or past the end.
__device__ __forceinline__ unsigned long long pack_pair(float left, float right, int index, int columns) {
  const unsigned long long a = left >= -INFINITY && index < columns ? pack_best(left, index) : 0;
  const unsigned long long b = right >= -INFINITY && index + 1 < columns ? pack_best(right, index + 1) : 0;
  return a > b ? a : b;
}

// A group of a row that must be looked at again: the row in the block, and the first of its targets.
struct Candidate {
  int row, column;
};

// Score groups of four targets, two in one product: the first one's source in rows 0 to 7 and targets in
// columns 0 to 3, the second one's behind them. What is missing at the end of the list repeats its last
// group.
template <int kSteps>
__device__ __forceinline__ void score_candidates(const Candidate* candidates, int first, int count,
                                                 const Params& p, const Share& share, const char* rows_ptr,
                                                 unsigned long long* block_best) {
  const int lane = threadIdx.x % kWarpSize;
  const char* source_ptr[kBatch][2];
  const __half* target_ptr[kBatch];
  Candidate mine[kBatch];  // threads 0 and 1 will hold the first group's scores, 2 and 3 the second one's
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const Candidate pair[2] = {candidates[min(first + 2 * i, count - 1)],
                               candidates[min(first + 2 * i + 1, count - 1)]};
    const int target = lane / 4 % kThreadTargets;
    const int column =
        (lane < kWarpSize / 2 ? pair[0].column : pair[1].column) + target % 2 + target / 2 * kProductColumns;
    source_ptr[i][0] = rows_ptr + pair[0].row * row_bytes(p.padded);
    source_ptr[i][1] = rows_ptr + pair[1].row * row_bytes(p.padded);
    target_ptr[i] = share.targets_ptr + static_cast<int64_t>(min(column, p.targets - 1)) * 2 * p.padded;
    mine[i] = lane % 4 < 2 ? pair[0] : pair[1];
  }
  float score[kBatch][4];
  score_exactly<kSteps>(source_ptr, target_ptr, p.padded, score);
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    const int half = lane % 4 < 2 ? 0 : 2;
    unsigned long long packed = pack_pair(half ? score[i][2] : score[i][0], half ? score[i][3] : score[i][1],
                                          mine[i].column + lane % 2 * kProductColumns, p.targets);
    const unsigned long long other = __shfl_xor_sync(kFullWarp, packed, 1);
    packed = other > packed ? other : packed;
    if (lane == 0 || lane == 2) atomicMax(block_best + mine[i].row, packed);
  }
}

}  // namespace tome::match
