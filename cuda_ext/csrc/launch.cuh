// Kernel launches without the <<< >>> syntax, so that a plain C++ compiler can read the kernels too: the
// tests run them on a CPU, one fibre per thread (tests/cuda_emulator).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <utility>

namespace tome {

// The dynamic shared memory of the block.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(16) char shared[];
  return shared;
}

// A block may use 48 KiB of shared memory, static and dynamic together, without asking. A kernel's static
// share isn't known here, so every kernel keeps its own below this reserve (tests/test_cuda_library.py).
constexpr int kGrantedBytes = 48 << 10;
constexpr int kStaticReserve = 9 << 10;

// Asks once for each kernel, device and thread: with few images the host is what a launch waits for. What was
// refused is asked for again the next time.
inline cudaError_t ask_for_shared(const void* kernel, int bytes) {
  thread_local std::map<std::pair<const void*, int>, int> granted;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  int& most = granted[{kernel, device}];
  if (bytes <= most) return cudaSuccess;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  // Left alone, the driver may give so much to the L1 cache that one block less fits.
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) most = bytes;
  return error;
}

// A launch that starts early is prepared while the last blocks of the kernel before it end, or from where
// each of its blocks has let it. Until then it may touch nothing in device memory, as memory is used again in
// the order of the stream: every thread waits first. Whoever comes later relies on that too, as for it this
// kernel alone counts. Without compute capability 9.0, or a launch that asks for it, both mean nothing.
__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// In a graph an early launch becomes an edge of its own kind, which only kernels have: where branches meet,
// or nothing was launched yet, it stays an ordinary one.
inline bool may_start_early(cudaStream_t stream) {
  thread_local std::map<int, int> majors;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  int& major = majors[device];
  if (major == 0) cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major < 9) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  size_t before = 1;
  const cudaError_t error =
      cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, nullptr, nullptr, &before);
  return error == cudaSuccess && (status == cudaStreamCaptureStatusNone || before == 1);
}

// `most_shared_bytes`: the most that any launch of this kernel on this GPU may need. The whole of it is asked
// for, so that a smaller launch can't take back what another one was promised. CUDA keeps what went wrong for
// check_launch(), which the caller's host code calls right after. `starts_early`: for kernels that
// await_previous().
template <class Params>
void launch_kernel(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes,
                   int most_shared_bytes, cudaStream_t stream, const Params& params,
                   bool starts_early = false) {
  if (shared_bytes > kGrantedBytes - kStaticReserve &&
      ask_for_shared(reinterpret_cast<const void*>(kernel), most_shared_bytes) != cudaSuccess) {
    return;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  if (starts_early && may_start_early(stream)) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace tome
