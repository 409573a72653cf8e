// The rotary embedding of queries and keys: out = x * cos + turned(x) * sin, rounded once, by the row of the
// table that belongs to the place in which a token stands.
//   neighbours are pairs   turned(x) = -x1, x0, -x3, x2, ...
//   halves are pairs       turned(x) = -x[dim / 2], ..., x0, ...
// The gradient is the transposed rotation: for a table that gives both of a pair one angle, the rotation
// back.
//
// A thread owns the same channels, some of either half of a head, of a few heads of one token, so that it
// reads the table once and has several loads under way. Threads of one token are neighbours: what they read
// and write has no gaps, and the table comes from the L1 cache.
#include "../launch.cuh"
#include "../norm/any_dtype.cuh"
#include "position.h"

namespace tome::position {
namespace {

template <int kCount>
struct Angles {
  float sin[2][kCount], cos[2][kCount];  // of the channels in the first half of a head, and in the second
};

// y = x * cos + turned(x) * sin.
template <int kCount>
__device__ __forceinline__ void turn(float (&x)[2][kCount], const Angles<kCount>& angles, bool is_half) {
  const auto turn_pair = [](float& first, float& second, float sin0, float sin1, float cos0, float cos1) {
    const float turned = fmaf(-second, sin0, first * cos0);
    second = fmaf(first, sin1, second * cos1);
    first = turned;
  };
  if (kCount == 1 || is_half) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      turn_pair(x[0][c], x[1][c], angles.sin[0][c], angles.sin[1][c], angles.cos[0][c], angles.cos[1][c]);
    }
  } else {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int c = 0; c + 1 < kCount; c += 2) {
        turn_pair(x[part][c], x[part][c + 1], angles.sin[part][c], angles.sin[part][c + 1],
                  angles.cos[part][c], angles.cos[part][c + 1]);
      }
    }
  }
}

// The transposed rotation is the rotation by what the other one of each pair has for its sine, negated.
template <int kCount>
__device__ __forceinline__ void transpose(Angles<kCount>& angles, bool is_half) {
  const auto swap_pair = [](float& first, float& second) {
    const float other = -first;
    first = -second;
    second = other;
  };
  if (kCount == 1 || is_half) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) swap_pair(angles.sin[0][c], angles.sin[1][c]);
  } else {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int c = 0; c + 1 < kCount; c += 2) swap_pair(angles.sin[part][c], angles.sin[part][c + 1]);
    }
  }
}

__device__ __forceinline__ int64_t place_of(const RotateParams& p, int64_t b, int n) {
  if (p.home.data_ptr != nullptr) return __ldg(p.home.data_ptr + p.home.offset(b, n));
  return p.short_home.data_ptr != nullptr ? __ldg(p.short_home.data_ptr + p.short_home.offset(b, n)) : n;
}

template <class T, int kCount>
__global__ __launch_bounds__(kRotateThreads) void rotate_kernel(const RotateParams p) {
  const unsigned vectors = p.dim / (2 * kCount);
  const unsigned heads = p.q_heads + p.k_heads;
  const unsigned chunks = (heads + kRotateHeads - 1) / kRotateHeads;
  const unsigned units = p.tokens * chunks * vectors;  // of an image
  const unsigned blocks = (units + kRotateThreads - 1) / kRotateThreads;
  const int64_t b = blockIdx.x / blocks;
  const unsigned unit = blockIdx.x % blocks * kRotateThreads + threadIdx.x;
  if (unit >= units) return;
  const int vector = static_cast<int>(unit % vectors);
  const int first = static_cast<int>(unit / vectors % chunks) * kRotateHeads;
  const int n = static_cast<int>(unit / vectors / chunks);
  // Pairs of neighbours lie within a vector, unless it is a single channel.
  const bool is_split = kCount > 1 || p.is_half;
  const int at[2] = {is_split ? vector * kCount : 2 * vector,
                     is_split ? p.dim / 2 + vector * kCount : 2 * vector + 1};

  const bool is_rotated = n >= p.prefix;
  const int64_t row = place_of(p, b, n) - p.prefix;
  // A bad place is seen in the result and never becomes an address.
  const bool is_valid = !is_rotated || (row >= 0 && row < p.rows);
  Angles<kCount> angles;
  const auto load_angles = [&](int head) {
    const int64_t from = b * p.table.batch_stride + head * p.table.head_stride + row * p.table.row_stride;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      norm::load_as(p.table_dtype, p.table.data_ptr, from + at[part] * p.table.channel_stride,
                    angles.sin[part]);
      norm::load_as(p.table_dtype, p.table.data_ptr, from + (p.dim + at[part]) * p.table.channel_stride,
                    angles.cos[part]);
    }
    if (p.is_back) transpose(angles, p.is_half);
  };

  Pack<T, kCount> x[kRotateHeads][2];
#pragma unroll
  for (int i = 0; i < kRotateHeads; ++i) {
    const int head = first + i;
    if (head >= static_cast<int>(heads)) break;
    const bool is_query = head < p.q_heads;
    const Heads& from = is_query ? p.q : p.k;
    const T* ptr = static_cast<const T*>(from.data_ptr) + b * from.batch_stride + n * from.row_stride +
                   (is_query ? head : head - p.q_heads) * from.head_stride;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      x[i][part] = load_pack<T, kCount>(ptr + (kCount == 1 ? at[part] * from.channel_stride : at[part]));
    }
  }
  const bool is_shared = p.table.head_stride == 0;
  if (is_rotated && is_valid && is_shared) load_angles(0);
#pragma unroll
  for (int i = 0; i < kRotateHeads; ++i) {
    const int head = first + i;
    if (head >= static_cast<int>(heads)) break;
    const bool is_query = head < p.q_heads;
    const int own = is_query ? head : head - p.q_heads;
    if (!is_valid) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) x[i][0].value[c] = x[i][1].value[c] = from_float<T>(NAN);
    } else if (is_rotated) {
      if (!is_shared) load_angles(own);
      float v[2][kCount];
      unpack(x[i][0], v[0]);
      unpack(x[i][1], v[1]);
      turn(v, angles, p.is_half);
      x[i][0] = to_pack<T>(v[0]);
      x[i][1] = to_pack<T>(v[1]);
    }
    T* out_ptr = static_cast<T*>(is_query ? p.q_out_ptr : p.k_out_ptr) +
                 ((b * p.tokens + n) * (is_query ? p.q_heads : p.k_heads) + own) * p.dim;
    store_pack(out_ptr + at[0], x[i][0]);
    store_pack(out_ptr + at[1], x[i][1]);
  }
}

template <class T, int kCount>
void launch(const RotateParams& p, cudaStream_t stream) {
  const int64_t blocks = (rotate_units(p, kCount) + kRotateThreads - 1) / kRotateThreads * p.batch;
  launch_kernel(rotate_kernel<T, kCount>, blocks, kRotateThreads, 0, 0, stream, p);
}

}  // namespace

void launch_rotate(const RotateParams& p, Dtype dtype, int count, cudaStream_t stream) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (count == kPackSize<T>) return launch<T, kPackSize<T>>(p, stream);
    count == kFewChannels ? launch<T, kFewChannels>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace tome::position
