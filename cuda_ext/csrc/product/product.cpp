// Host side of products: whether they can run and pay, tiles, output, launch; else PyTorch's functions.
#include "product.h"

#include "../ops.h"

namespace tome {
namespace {

using products::Gelu;
using products::ProductParams;

// Fitted to log2(Phi(-v) / Phi(v)) / v, the errors weighed by those of PyTorch's two roundings in each dtype,
// of which the result has less in every range (tests/test_linear_gelu.py).
constexpr Gelu kErfHalf{{-2.30128303f, -1.06564434e-01f, 8.90788943e-04f, 2.21912399e-05f, -7.49920311e-07f}};
constexpr Gelu kErfBFloat16{
    {-2.29986454f, -1.08215934e-01f, 1.28878993e-03f, -8.14833121e-06f, -4.95278586e-08f}};
// -2 sqrt(2 / pi) log2(e), and that times 0.044715.
constexpr Gelu kTanh{{-2.30220819f, -0.102943239f, 0.0f, 0.0f, -2e-38f}};

// One multiprocessor takes a tile after the other, so what counts is how many tiles the busiest one has, and
// how wide they are. Of narrow tiles shared memory is read more often.
int64_t cost(int64_t rows, int64_t outputs, int64_t width, int64_t multiprocessors) {
  constexpr int64_t kRows = 128;
  const auto tiles = ((rows + kRows - 1) / kRows) * ((outputs + width - 1) / width);
  const int64_t price = width == products::kWideOutputs ? 100 : 107;
  return (tiles + multiprocessors - 1) / multiprocessors * width * price;
}

bool is_wide(const ProductParams& p) {
  return cost(p.rows, p.outputs, products::kWideOutputs, p.multiprocessors) <=
         cost(p.rows, p.outputs, products::kOutputs, p.multiprocessors);
}

// Whether the product beats that of cuBLAS: there, many rows and few inputs take 5 to 10 % longer.
bool pays(const ProductParams& p) {
  constexpr int kManyRows = 16384, kManyInputs = 1280;
  const int lost = (products::kWideOutputs - p.outputs % products::kWideOutputs) % products::kWideOutputs;
  return p.rows >= kManyRows && p.inputs <= kManyInputs && 16 * lost < p.outputs;
}

bool starts_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAccessBytes == 0;
}

bool is_half(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Half || tensor.scalar_type() == ScalarType::BFloat16;
}

// From one row of x to the next; 0 where they don't follow each other evenly.
int64_t row_stride(const Tensor& x) {
  if (x.size(0) * x.size(1) <= 1) return x.size(2);
  const int64_t stride = x.size(1) > 1 ? x.stride(1) : x.stride(0);
  return x.size(0) > 1 && x.size(1) > 1 && x.stride(0) != x.size(1) * stride ? 0 : stride;
}

// predicates.py says the same, but for what only an address tells.
bool fits(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const auto is_alike = [&](const Tensor& tensor) {
    return tensor.is_cuda() && tensor.get_device_index() == x.get_device_index() &&
           tensor.scalar_type() == x.scalar_type() && starts_aligned(tensor);
  };
  if (!is_half(x) || !is_alike(x) || !is_alike(weight) || weight.dim() != 2) return false;
  const int64_t inputs = x.size(2), outputs = weight.size(0), stride = row_stride(x);
  const bool fits_bias = !bias.has_value() || (is_alike(*bias) && bias->dim() == 1 &&
                                               bias->size(0) == outputs && bias->is_contiguous());
  return fits_bias && weight.size(1) == inputs && weight.is_contiguous() && inputs > 0 && inputs % 8 == 0 &&
         outputs % 8 == 0 && x.stride(2) == 1 && stride >= inputs && stride % 8 == 0;
}

const Gelu& gelu_of(ScalarType dtype, bool is_tanh) {
  if (is_tanh) return kTanh;
  return dtype == ScalarType::Half ? kErfHalf : kErfBFloat16;
}

// What a launch needs but the output; nothing where the product can't run.
std::optional<ProductParams> product_params(const Tensor& x, const Tensor& weight,
                                            const std::optional<Tensor>& bias) {
  check_tensor(x, "x", 3);
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

Tensor linear_gelu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool is_tanh,
                   int64_t tile) {
  const DeviceScope scope(x);
  TOME_CHECK(tile >= -1 && tile <= 1, "tile must be -1, 0 or 1, got ", tile);
  std::optional<ProductParams> p = product_params(x, weight, bias);
  TOME_CHECK(p.has_value() || tile == -1, "no product of these tensors on this GPU, so tile must be -1, got ",
             tile);
  if constexpr (kHasHopper) {
    if (p.has_value() && (tile != -1 || p->rows >= products::kLeastRows)) {
      p->gelu = gelu_of(x.scalar_type(), is_tanh);
      const bool wide = tile == -1 ? is_wide(*p) : tile == 0;
      return multiply(*p, x, wide ? products::launch_hopper_gelu_wide : products::launch_hopper_gelu);
    }
  }
  return gelu(linear(x, weight, bias), is_tanh);
}

Tensor linear_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if constexpr (kHasHopper) {
    const std::optional<ProductParams> p = product_params(x, weight, bias);
    if (p.has_value() && pays(*p)) return multiply(*p, x, products::launch_hopper_linear_wide);
  }
  return linear(x, weight, bias);
}

}  // namespace tome
