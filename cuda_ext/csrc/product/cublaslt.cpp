#include "cublaslt.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <tuple>

#include "../ops.h"
#include "product.h"

namespace tome::products {
namespace {

// Of the library that PyTorch has loaded: linked, it would tie the wheel to one of its versions.
struct Library {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtMatmulDescInit_internal) init_product = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set_product = nullptr;
  decltype(&cublasLtMatrixLayoutInit_internal) init_layout = nullptr;
  decltype(&cublasLtMatmulPreferenceInit_internal) init_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) find_algorithms = nullptr;
  decltype(&cublasLtMatmul) multiply = nullptr;
  bool is_whole = false;
};

template <class Function>
bool look_up(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  return function != nullptr;
}

Library load() {
  Library found;
  // What people set to keep PyTorch away from this library, or from its choice, is meant for these products
  // too.
  if (std::getenv("DISABLE_ADDMM_CUDA_LT") || std::getenv("CUBLASLT_WORKSPACE_SIZE")) return found;
  void* handle = dlopen("libcublasLt.so." TOME_EXPAND(CUBLAS_VER_MAJOR), RTLD_LAZY | RTLD_NOLOAD);
  found.is_whole = handle != nullptr && look_up(handle, "cublasLtCreate", found.create) &&
                   look_up(handle, "cublasLtMatmulDescInit_internal", found.init_product) &&
                   look_up(handle, "cublasLtMatmulDescSetAttribute", found.set_product) &&
                   look_up(handle, "cublasLtMatrixLayoutInit_internal", found.init_layout) &&
                   look_up(handle, "cublasLtMatmulPreferenceInit_internal", found.init_preference) &&
                   look_up(handle, "cublasLtMatmulPreferenceSetAttribute", found.set_preference) &&
                   look_up(handle, "cublasLtMatmulAlgoGetHeuristic", found.find_algorithms) &&
                   look_up(handle, "cublasLtMatmul", found.multiply);
  return found;
}

const Library& library() {
  static const Library loaded = load();
  return loaded;
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusNone;
}

// One for each device, for all threads and for good; null where there is none and none can be asked for now.
cublasLtHandle_t handle_of(int device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<int, cublasLtHandle_t> handles;
  const std::lock_guard<std::mutex> lock(mutex);
  cublasLtHandle_t& handle = handles[device];
  if (handle == nullptr && (is_capturing(stream) || library().create(&handle) != CUBLAS_STATUS_SUCCESS)) {
    handle = nullptr;
  }
  return handle;
}

struct Shape {
  int device;
  ScalarType dtype;
  int64_t rows, outputs, inputs;

  bool operator<(const Shape& other) const {
    return std::tie(rows, outputs, inputs, dtype, device) <
           std::tie(other.rows, other.outputs, other.inputs, other.dtype, other.device);
  }
};

// As the library sees it matrices lie in columns: out^T = weight x^T.
struct Plan {
  cublasLtHandle_t handle = nullptr;  // where there is an algorithm
  cublasLtMatmulDescOpaque_t product{};
  cublasLtMatrixLayoutOpaque_t weight{}, x{}, out{};
  cublasLtMatmulAlgo_t algorithm{};
  int64_t scratch_bytes = 0;
};

// By the library's function for that kind of object.
template <class Function, class Object, class Attribute, class Value>
bool set(Function function, Object* object, Attribute attribute, Value value) {
  return function(object, attribute, &value, sizeof(value)) == CUBLAS_STATUS_SUCCESS;
}

Plan make_plan(const Shape& shape, cublasLtHandle_t handle, const void* bias) {
  constexpr size_t kMostScratch = 1 << 20;  // as PyTorch has it
  const Library& lib = library();
  const cudaDataType type = shape.dtype == ScalarType::Half ? CUDA_R_16F : CUDA_R_16BF;
  const auto lay = [&](cublasLtMatrixLayoutOpaque_t& layout, int64_t rows, int64_t columns) {
    return lib.init_layout(&layout, sizeof(layout), type, rows, columns, rows) == CUBLAS_STATUS_SUCCESS;
  };
  Plan plan;
  cublasLtMatmulPreferenceOpaque_t preference{};
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  // Parts of a sum are added in float32, as PyTorch does where it may not do else.
  const bool is_found =
      lib.init_product(&plan.product, sizeof(plan.product), CUBLAS_COMPUTE_32F, CUDA_R_32F) ==
          CUBLAS_STATUS_SUCCESS &&
      set(lib.set_product, &plan.product, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T) &&
      set(lib.set_product, &plan.product, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS) &&
      set(lib.set_product, &plan.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias) &&
      lay(plan.weight, shape.inputs, shape.outputs) && lay(plan.x, shape.inputs, shape.rows) &&
      lay(plan.out, shape.outputs, shape.rows) &&
      lib.init_preference(&preference, sizeof(preference)) == CUBLAS_STATUS_SUCCESS &&
      set(lib.set_preference, &preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kMostScratch) &&
      set(lib.set_preference, &preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
          static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)) &&
      lib.find_algorithms(handle, &plan.product, &plan.weight, &plan.x, &plan.out, &plan.out, &preference, 1,
                          &found, &count) == CUBLAS_STATUS_SUCCESS &&
      count == 1 && found.state == CUBLAS_STATUS_SUCCESS;
  if (!is_found) return {};
  plan.algorithm = found.algo;
  plan.scratch_bytes = static_cast<int64_t>(found.workspaceSize);
  plan.handle = handle;
  return plan;
}

// Of this thread, as a plan is written to in every call. Null where there is no handle yet.
Plan* plan_of(const Shape& shape, const void* bias, cudaStream_t stream) {
  constexpr size_t kMostPlans = 1024;  // of images in all sizes there is no end
  thread_local std::map<Shape, Plan> plans;
  const auto known = plans.find(shape);
  if (known != plans.end()) return &known->second;
  const cublasLtHandle_t handle = handle_of(shape.device, stream);
  if (handle == nullptr) return nullptr;
  if (plans.size() >= kMostPlans) plans.clear();
  return &plans.emplace(shape, make_plan(shape, handle, bias)).first->second;
}

}  // namespace

std::optional<Tensor> linear_by_cublaslt(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  constexpr uintptr_t kAlignment = 256;  // what an algorithm is looked for with
  const int device = x.get_device_index();
  const ScalarType dtype = x.scalar_type();
  const auto is_plain = [&](const Tensor& tensor) {
    return is_alike(tensor, x, kAlignment) && tensor.is_contiguous();
  };
  if (!is_half(x) || weight.dim() != 2 || bias.dim() != 1 || !is_plain(x) || !is_plain(weight) ||
      !is_plain(bias) || !library().is_whole) {
    return std::nullopt;
  }
  const int64_t rows = x.size(0) * x.size(1), inputs = x.size(2), outputs = weight.size(0);
  if (rows < 1 || rows >= kManyRows || inputs <= 1 || outputs <= 1 || weight.size(1) != inputs ||
      bias.size(0) != outputs) {
    return std::nullopt;
  }
  const DeviceScope scope(x);
  const cudaStream_t stream = current_stream(x);
  Plan* plan = plan_of({device, dtype, rows, outputs, inputs}, bias.const_data_ptr(), stream);
  if (plan == nullptr || plan->handle == nullptr ||
      !set(library().set_product, &plan->product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.const_data_ptr())) {
    return std::nullopt;
  }
  Tensor out = new_empty(x, {x.size(0), x.size(1), outputs}, dtype);
  std::optional<Tensor> scratch;
  if (plan->scratch_bytes > 0) scratch = new_empty(x, {plan->scratch_bytes}, ScalarType::Byte);
  const float one = 1.0f, zero = 0.0f;
  void* out_ptr = out.mutable_data_ptr();
  const cublasStatus_t status = library().multiply(
      plan->handle, &plan->product, &one, weight.const_data_ptr(), &plan->weight, x.const_data_ptr(),
      &plan->x, &zero, out_ptr, &plan->out, out_ptr, &plan->out, &plan->algorithm,
      scratch.has_value() ? scratch->mutable_data_ptr() : nullptr, plan->scratch_bytes, stream);
  return status == CUBLAS_STATUS_SUCCESS ? std::optional<Tensor>(out) : std::nullopt;
}

}  // namespace tome::products
