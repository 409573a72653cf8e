// Kernel launches without the <<< >>> syntax, so that a plain C++ compiler can read the kernels too: the
// tests run them on a CPU, one fibre per thread (tests/cuda_emulator).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tome {

// The dynamic shared memory of the block.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(16) char shared[];
  return shared;
}

// What may go wrong here is found by check_launch() right after.
template <class Params>
void launch_kernel(void (*kernel)(Params), int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
                   const Params& params) {
  constexpr int kGranted = 48 << 10;  // more shared memory has to be asked for
  if (shared_bytes > kGranted) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    // Left alone, the driver may give so much to the L1 cache that one block less fits.
    cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                         cudaSharedmemCarveoutMaxShared);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace tome
