// Host side of products: whether they can run and pay, tiles, output, launch; else cuBLASLt or PyTorch.
#include "product.h"

#include <algorithm>
#include <array>

#include "../matmul.h"
#include "../ops.h"

namespace tome {
namespace {

using products::ProductParams;
using products::TileShape;

// A tile of linear_gelu, and what a place in it costs: of small ones shared memory is read more often.
struct Choice {
  TileShape shape;
  int64_t price;
};
constexpr std::array<Choice, 3> kGelus{
    {{products::kWide, 100}, {products::kTall, 107}, {products::kFlat, 138}}};

// How many tiles the busiest multiprocessor takes, one after the other.
int64_t turns(const TileShape& tile, const ProductParams& p) {
  const int64_t cluster = tile.rows / 64, cluster_rows = cluster * tile.rows;
  const int64_t tiles =
      (p.rows + cluster_rows - 1) / cluster_rows * cluster * ((p.outputs + tile.outputs - 1) / tile.outputs);
  return (tiles + p.multiprocessors - 1) / p.multiprocessors;
}

int64_t cost(const Choice& choice, const ProductParams& p) {
  return turns(choice.shape, p) * choice.shape.rows * choice.shape.outputs * choice.price;
}

// Between the few rows of an image, which save a launch, and many, the product of cuBLAS and a GELU behind it
// take up to 20 % less time.
bool pays_with_gelu(const ProductParams& p) {
  return p.rows >= products::kLeastRows || turns(products::kFlat, p) <= 1;
}

// Whether the product of many rows beats that of cuBLAS: there, few inputs take 5 to 10 % longer.
bool pays(const ProductParams& p) {
  constexpr int kManyInputs = 1280;
  const int lost = (products::kWide.outputs - p.outputs % products::kWide.outputs) % products::kWide.outputs;
  return p.inputs <= kManyInputs && 16 * lost < p.outputs;
}

// From one row of x to the next; 0 where they don't follow each other evenly.
int64_t row_stride(const Tensor& x) {
  if (x.size(0) * x.size(1) <= 1) return x.size(2);
  const int64_t stride = x.size(1) > 1 ? x.stride(1) : x.stride(0);
  return x.size(0) > 1 && x.size(1) > 1 && x.stride(0) != x.size(1) * stride ? 0 : stride;
}

// predicates.py says the same, but for what only an address tells.
bool fits(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const auto fits_x = [&](const Tensor& tensor) { return is_alike(tensor, x, kAccessBytes); };
  if (!is_half(x) || !fits_x(x) || !fits_x(weight) || weight.dim() != 2) return false;
  const int64_t inputs = x.size(2), outputs = weight.size(0), stride = row_stride(x);
  const bool fits_bias = !bias.has_value() || (fits_x(*bias) && bias->dim() == 1 &&
                                               bias->size(0) == outputs && bias->is_contiguous());
  return fits_bias && weight.size(1) == inputs && weight.is_contiguous() && inputs > 0 && inputs % 8 == 0 &&
         outputs % 8 == 0 && x.stride(2) == 1 && stride >= inputs && stride % 8 == 0;
}

// What a launch needs but the output; nothing where the product can't run.
std::optional<ProductParams> product_params(const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& bias) {
  if (!runs_hopper(x.get_device_index()) || !fits(x, weight, bias)) return std::nullopt;
  ProductParams p{};
  p.rows = to_int(x.size(0) * x.size(1), "the number of rows");
  p.inputs = to_int(x.size(2), "the number of channels");
  p.outputs = to_int(weight.size(0), "the number of outputs");
  p.row_stride = row_stride(x);
  p.x_ptr = x.const_data_ptr();
  p.weight_ptr = weight.const_data_ptr();
  p.bias_ptr = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, x.get_device_index());
  return p;
}

Tensor multiply(ProductParams p, const Tensor& x, products::Launch* launch) {
  Tensor out = new_empty(x, {x.size(0), x.size(1), p.outputs}, x.scalar_type());
  if (out.numel() == 0) return out;
  p.out_ptr = out.mutable_data_ptr();
  const bool launched = launch(p, floating_dtype(x, "x"), current_stream(x));
  check_launch();
  TOME_CHECK(launched, "the product of [", p.rows, ", ", p.inputs, "] and [", p.outputs, ", ", p.inputs,
             "] can't be launched");
  return out;
}

}  // namespace

Tensor linear_with_gelu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        GeluKind kind, int64_t tile) {
  check_tensor(x, "x", 3);
  const DeviceScope scope(x);
  TOME_CHECK(tile >= -1 && tile < static_cast<int64_t>(kGelus.size()), "tile must be in [-1, ", kGelus.size(),
             "), got ", tile);
  if constexpr (kHasHopper) {
    std::optional<ProductParams> p = product_params(x, weight, bias);
    if (p.has_value() && (tile != -1 || pays_with_gelu(*p))) {
      p->gelu = activation::gelu_of<activation::kFewTerms>(kind, floating_dtype(x, "x"));
      constexpr products::Launch* kLaunches[]{products::launch_hopper_gelu_wide, products::launch_hopper_gelu,
                                              products::launch_hopper_gelu_flat};
      const auto best = std::min_element(kGelus.begin(), kGelus.end(),
                                         [&](auto& a, auto& b) { return cost(a, *p) < cost(b, *p); });
      return multiply(*p, x, kLaunches[tile == -1 ? best - kGelus.begin() : tile]);
    }
  }
  TOME_CHECK(tile == -1, "no product of these tensors on this GPU, so tile must be -1, got ", tile);
  return gelu(linear(x, weight, bias), kind, true);
}

Tensor linear_gelu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool is_tanh,
                   int64_t tile) {
  return linear_with_gelu(x, weight, bias, is_tanh ? GeluKind::kTanh : GeluKind::kErf, tile);
}

Tensor linear_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_tensor(x, "x", 3);
  const DeviceScope scope(x);
  if constexpr (kHasHopper) {
    if (x.size(0) * x.size(1) >= products::kManyRows) {
      const std::optional<ProductParams> p = product_params(x, weight, bias);
      if (p.has_value() && pays(*p)) return multiply(*p, x, products::launch_hopper_linear_wide);
    }
  }
  return linear(x, weight, bias);
}

}  // namespace tome
