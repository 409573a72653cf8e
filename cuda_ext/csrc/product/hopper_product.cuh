// out = x weight^T + bias, or the GELU of it, by CUTLASS's persistent products for Hopper: one warpgroup
// streams tiles of x and weight through a ring in shared memory, two others multiply. These take turns
// ("pingpong"), each with an output tile of its own, so that what one does with its sums runs under the
// product of the other.
#pragma once

#include <cutlass/cutlass.h>
// above what needs its macros
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "../activation/gelu.cuh"
#include "../launch.cuh"
#include "product.h"

namespace tome::products {
namespace {

using Gelu = activation::Gelu<activation::kFewTerms>;

// What an epilogue computes of sums and biases. CUTLASS asks the scalar for the arguments' type.
template <class T>
struct GeluOfSum {
  using Arguments = Gelu;
};
template <int kCount>
struct GeluOfSum<cutlass::Array<float, kCount>> {
  using Values = cutlass::Array<float, kCount>;
  using Arguments = Gelu;
  CUTLASS_DEVICE Values operator()(const Values& sums, const Values& bias, const Gelu& g) const {
    Values out;
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = activation::gelu(sums[i] + bias[i], g);
    return out;
  }
};

// T: of x, weight, bias and out. Where there are many rows two blocks with tiles of the same outputs share
// what they load of weight, and tiles follow each other along rows of out, so that x is read from memory
// once.
template <class T, int kTileRows, int kTileOutputs, bool kHasGelu>
struct Product {
  // rows, outputs, inputs of a step
  using Tile = cute::Shape<cute::Int<kTileRows>, cute::Int<kTileOutputs>, cute::_64>;
  using Cluster = cute::Shape<cute::Int<kTileRows / 64>, cute::_1, cute::_1>;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  using Sm90 = cutlass::arch::Sm90;
  using TensorOp = cutlass::arch::OpClassTensorOp;
  static constexpr int kAlignment = kAccessBytes / sizeof(T);
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

  using Bias =
      cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, T, float,
                                                  cute::Stride<cute::_0, cute::_1, cute::_0>, kAlignment>;
  template <template <class> class Function>
  using Of =
      cutlass::epilogue::fusion::Sm90EVT<cutlass::epilogue::fusion::Sm90Compute<Function, T, float, kRound>,
                                         cutlass::epilogue::fusion::Sm90AccFetch, Bias>;
  using Fusion = std::conditional_t<kHasGelu, Of<GeluOfSum>, Of<cutlass::plus>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      Sm90, TensorOp, Tile, Cluster, cute::Shape<cute::_64, cute::_64>, float, float, void, RowMajor,
      kAlignment, T, RowMajor, kAlignment, cutlass::epilogue::TmaWarpSpecialized, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      Sm90, TensorOp, T, RowMajor, kAlignment, T, ColumnMajor, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue, void>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static bool launch(const ProductParams& p, cudaStream_t stream) {
    const auto* x_ptr = static_cast<const T*>(p.x_ptr);
    const auto* weight_ptr = static_cast<const T*>(p.weight_ptr);
    auto* out_ptr = static_cast<T*>(p.out_ptr);
    typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                       {p.rows, p.outputs, p.inputs, 1},
                                       {x_ptr, {p.row_stride, {}, 0}, weight_ptr, {p.inputs, {}, 0}},
                                       {{}, nullptr, {}, out_ptr, {p.outputs, {}, 0}}};
    const auto* bias_ptr = static_cast<const T*>(p.bias_ptr);
    if constexpr (kHasGelu) {
      arguments.epilogue.thread = {{}, {bias_ptr, T(0), {}}, p.gelu};
    } else {
      arguments.epilogue.thread = {{}, {bias_ptr, T(0), {}}, {}};
    }
    arguments.hw_info.sm_count = p.multiprocessors;
    using Order = decltype(arguments.scheduler.raster_order);
    arguments.scheduler.raster_order = Order::AlongN;
    if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess) return false;
    const void* kernel = reinterpret_cast<const void*>(cutlass::device_kernel<Kernel>);
    if (ask_for_shared(kernel, Kernel::SharedStorageSize) != cudaSuccess) return false;
    auto params = Kernel::to_underlying_arguments(arguments, nullptr);
    return Gemm::run(params, stream) == cutlass::Status::kSuccess;
  }
};

template <int kTileRows, int kTileOutputs, bool kHasGelu>
bool launch_product(const ProductParams& params, Dtype dtype, cudaStream_t stream) {
  const auto launch = dtype == Dtype::kHalf
                          ? Product<cutlass::half_t, kTileRows, kTileOutputs, kHasGelu>::launch
                          : Product<cutlass::bfloat16_t, kTileRows, kTileOutputs, kHasGelu>::launch;
  return launch(params, stream);
}

}  // namespace
}  // namespace tome::products
