// The only header that names torch::stable: tensors, allocation, the current stream, checks.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

#include "dtype.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has the one that tells less
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace tome {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// STD_CUDA_CHECK asks torch for a message also where nothing is wrong.
inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) STD_CUDA_CHECK(error);
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Makes a tensor's device current, for PyTorch and for the CUDA runtime inside this library, which keeps a
// device of its own.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) {
    const auto index = tensor.get_device_index();
    if (torch::stable::accelerator::getCurrentDeviceIndex() != index) guard_.emplace(index);
    check_cuda(cudaSetDevice(index));
  }

 private:
  std::optional<DeviceGuard> guard_;
};

#define TOME_CHECK(...) STD_TORCH_CHECK(__VA_ARGS__)

// PyTorch's current stream: what a caller under torch.cuda.stream() or a graph capture expects. The id of
// torch::stable::accelerator::Stream is not a handle, so it can't be used here.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Allocations go through PyTorch, so that its caching allocator and its graph pools own the memory.
// torch::stable::new_empty would look up the operator by its name each time.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                         strides.data(), code, device_type,
                                                         like.get_device_index(), &out));
  return Tensor(out);
}

// The memory of a tensor, `offset` elements further on, as other sizes and strides have it.
inline Tensor view_of(const Tensor& tensor, std::initializer_list<int64_t> sizes,
                      std::initializer_list<int64_t> strides, int64_t offset) {
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      tensor.get(), static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), offset, &out));
  return Tensor(out);
}

template <size_t kArguments>
Tensor call(const char* name, const char* overload, std::array<StableIValue, kArguments> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A length as the kernels count; the eighth of the range leaves room for padding and sums.
inline int to_int(int64_t value, const char* name) {
  TOME_CHECK(value >= 0 && value <= std::numeric_limits<int>::max() / 8, name, " is out of range: ", value);
  return static_cast<int>(value);
}

inline void check_launch() { check_cuda(cudaGetLastError()); }

inline Dtype floating_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      TOME_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
  return Dtype::kFloat;
}

inline void check_tensor(const Tensor& tensor, const char* name, int64_t dims) {
  TOME_CHECK(tensor.is_cuda(), name, " must be a CUDA tensor");
  TOME_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions, got ", tensor.dim());
}

inline bool is_half(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Half || tensor.scalar_type() == ScalarType::BFloat16;
}

// Of the GPU and dtype of another one, starting at a multiple of so many bytes.
inline bool is_alike(const Tensor& tensor, const Tensor& other, uintptr_t alignment) {
  return tensor.is_cuda() && tensor.get_device_index() == other.get_device_index() &&
         tensor.scalar_type() == other.scalar_type() &&
         reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignment == 0;
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& other, ScalarType dtype) {
  TOME_CHECK(tensor.is_cuda() && tensor.get_device_index() == other.get_device_index(), name,
             " must be on the device of the tokens");
  TOME_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
}

}  // namespace tome
