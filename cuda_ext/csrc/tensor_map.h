// Maps by which Hopper's copy engine finds boxes of a tensor.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

namespace tome {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// cuTensorMapEncodeTiled belongs to the driver's library, which a machine without a GPU doesn't have: asking
// for it at run time keeps the extension loadable there. Null where the driver has none.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    const bool is_found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return is_found ? reinterpret_cast<EncodeTiled>(found) : nullptr;
  }();
  return function;
}

}  // namespace tome
