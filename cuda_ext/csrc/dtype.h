// Element types, and the switch from a run-time dtype to a template argument.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tome {

enum class Dtype { kFloat, kHalf, kBFloat16 };

template <class T>
struct TypeTag {
  using type = T;
};

template <class F>
void dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(TypeTag<float>{});
    case Dtype::kHalf:
      return f(TypeTag<__half>{});
    case Dtype::kBFloat16:
      return f(TypeTag<__nv_bfloat16>{});
  }
}

constexpr int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

constexpr int kAccessBytes = 16;  // the widest load or store of one thread

// A view can be read `boundary` bytes at a time when every row starts on such a boundary and has no gaps.
inline bool is_aligned(const void* data_ptr, int64_t element_bytes, int64_t channel_stride, int64_t channels,
                       std::initializer_list<int64_t> strides, int64_t boundary = kAccessBytes) {
  if (channel_stride != 1 || reinterpret_cast<uintptr_t>(data_ptr) % boundary != 0) return false;
  if (channels * element_bytes % boundary != 0) return false;
  for (const int64_t stride : strides) {
    if (stride * element_bytes % boundary != 0) return false;
  }
  return true;
}

}  // namespace tome
