// For the host code of the library, unchanged, on a CPU: read before each of its files. torch's own headers
// come first; behind them a few names of theirs mean the CPU, the operators get a namespace of their own, and
// what divides a launch into blocks is asked by way of plans.cpp.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace emulator {

// How a test wants launches divided; 0 or false: as the library would.
struct Plan {
  int block_outputs = 0;      // output rows of a block that merges or restores
  int teams = 0, splits = 0;  // heads of a block, blocks of a head
  bool is_streamed = false;
};

inline Plan& plan() {
  static Plan instance;
  return instance;
}

constexpr int64_t kMargin = 64;  // poisoned elements on either side of what an operator allocates
constexpr unsigned char kPoison = 0xa5;

struct Allocation {
  torch::stable::Tensor whole;
  unsigned char* data;
  size_t bytes, margin;
};

inline std::vector<Allocation>& allocations() {
  static std::vector<Allocation> list;
  return list;
}

inline AOTITorchError empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                    int32_t device_type, int32_t device, AtenTensorHandle* out) {
  const int64_t count =
      2 * kMargin + std::accumulate(sizes, sizes + dims, int64_t{1}, std::multiplies<int64_t>());
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &count, &stride, dtype, device_type, device, &handle));
  const torch::stable::Tensor whole(handle);
  const size_t size = whole.element_size();
  auto* data = static_cast<unsigned char*>(whole.mutable_data_ptr());
  if (!state().plan_only) std::memset(data, kPoison, count * size);
  allocations().push_back({whole, data, count * size, kMargin * size});
  return aoti_torch__reinterpret_tensor(whole.get(), dims, sizes, strides, kMargin, out);
}

inline AOTITorchError get_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

// A product of halves that is left in float32.
inline AOTITorchError multiply_wide(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b, int32_t) {
  const auto wide = [](AtenTensorHandle handle) {
    AtenTensorHandle own = nullptr;
    aoti_torch_new_tensor_handle(handle, &own);
    return torch::stable::to(torch::stable::Tensor(own), torch::headeronly::ScalarType::Float);
  };
  return aoti_torch_cpu_mm_out(out, wide(a).get(), wide(b).get());
}

}  // namespace emulator

namespace torch::stable::accelerator {
inline DeviceIndex emulated_device() { return -1; }  // that of the CPU
}  // namespace torch::stable::accelerator

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(error) throw std::runtime_error(emulator::state().refused)
#define CUDA CPU
#define tome_cuda tome_emulated
#define is_cuda is_cpu
#define getCurrentDeviceIndex emulated_device
#define aoti_torch_get_current_cuda_stream emulator::get_stream
#define aoti_torch_empty_strided emulator::empty_strided
#define aoti_torch_cuda_mm_out aoti_torch_cpu_mm_out
#define aoti_torch_cuda_addmm_out aoti_torch_cpu_addmm_out
#define aoti_torch_cuda_mm_dtype_out emulator::multiply_wide
#define launch_gather emulated_launch_gather
#define launch_norm emulated_launch_norm
#define launch_restore emulated_launch_restore
#define plan_resident emulated_plan_resident
#define fits_resident emulated_fits_resident
#define fits_whole emulated_fits_whole
