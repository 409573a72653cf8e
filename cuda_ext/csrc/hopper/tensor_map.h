// Maps by which Hopper's copy engine finds boxes of a tensor, and writes them to shared memory as
// hopper/tile.cuh has it.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../dtype.h"

namespace tome::sm90 {

// cuTensorMapEncodeTiled belongs to the driver's library, which a machine without a GPU doesn't have: asking
// for it at run time keeps the extension loadable there. Null where the driver has none.
inline auto encode_tiled() {
  static const auto function = []() -> decltype(&cuTensorMapEncodeTiled) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    const bool is_found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return is_found ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found) : nullptr;
  }();
  return function;
}

// A [batch, heads, rows, columns] tensor of 16-bit numbers as it lies, its columns without gaps.
struct MappedTensor {
  const void* data_ptr;
  int64_t columns, rows, heads, batch;
  int64_t row_bytes, head_bytes, batch_bytes;  // strides
  CUtensorMapDataType dtype;
  CUtensorMapFloatOOBfill outside;  // what is read of rows and columns that aren't there
};

// A map whose boxes are `box_rows` rows of a panel. False where the driver knows no maps, or none of such
// strides.
inline bool make_map(CUtensorMap& map, const MappedTensor& tensor, int panel, int box_rows) {
  if (encode_tiled() == nullptr) return false;
  const int64_t sizes[4] = {tensor.columns, tensor.rows, tensor.heads, tensor.batch};
  const int64_t strides[3] = {tensor.row_bytes, tensor.head_bytes, tensor.batch_bytes};
  cuuint64_t map_sizes[4], map_strides[3];
  for (int i = 0; i < 4; ++i) map_sizes[i] = static_cast<cuuint64_t>(sizes[i]);
  for (int i = 0; i < 3; ++i) {
    // The stride of a dimension of one may be anything; the map wants a multiple of 16 bytes.
    map_strides[i] = static_cast<cuuint64_t>(sizes[i + 1] == 1 ? kAccessBytes : strides[i]);
  }
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(panel), static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = panel == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : panel == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                   : CU_TENSOR_MAP_SWIZZLE_32B;
  return encode_tiled()(&map, tensor.dtype, 4, const_cast<void*>(tensor.data_ptr), map_sizes, map_strides,
                        box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, tensor.outside) == CUDA_SUCCESS;
}

}  // namespace tome::sm90
