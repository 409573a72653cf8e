// Host side of linear_gelu: whether the product can run, its tiles, output, launch; else PyTorch's two steps.
#include "gelu.h"

#include <iterator>

#include "../ops.h"

namespace tome {
namespace {

using gelu_ops::Gelu;
using gelu_ops::GeluParams;

// Fitted to log2(Phi(-v) / Phi(v)) / v, the errors weighed as each dtype rounds a result: at most 0.1 of half
// a unit in its last place, and in float16 of the least number (tests/test_linear_gelu.py).
constexpr Gelu kErfHalf{{-2.30116994f, -5.10611568e-03f, -9.68690837e-02f, -4.45259313e-03f, -2.18644339e-04f,
                         1.27456863e-03f, -2.73082509e-04f, 1.76532032e-05f},
                        5.8f};
constexpr Gelu kErfBFloat16{{-2.29905935f, -2.04492399e-02f, -6.61408942e-02f, -3.19368477e-02f,
                             1.25983515e-02f, -1.96762450e-03f, 1.48837706e-04f, -4.48787470e-06f},
                            8.0f};
// -2 sqrt(2 / pi) log2(e), and that times 0.044715.
constexpr Gelu kTanh{{-2.30220819f, 0.0f, -0.102943239f}, 10.0f};

// A tile, and the order of tiles.
struct Choice {
  gelu_ops::Launch* launch;
  bool by_rows;
};

Choice chosen(int64_t tile) {
  if constexpr (kHasHopper) {
    constexpr Choice kTiles[] = {{gelu_ops::launch_hopper_128x192_1x2, false},
                                 {gelu_ops::launch_hopper_128x128_2x1, true}};
    const auto count = static_cast<int64_t>(std::size(kTiles));
    TOME_CHECK(tile >= 0 && tile < count, "no tile ", tile, " of ", count);
    return kTiles[tile];
  }
  TOME_CHECK(false, "tile must be -1 where there are no kernels for Hopper, got ", tile);
  return {};
}

// Which of them a shape takes. Of wider tiles shared memory is read less often; an edge of a tile is lost
// work, and so is a last wave of few blocks.
int64_t fastest(int64_t rows, int64_t outputs) {
  constexpr int64_t kManyRows = 16384;
  return rows >= kManyRows && outputs % 192 == 0 ? 0 : 1;
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

}  // namespace

Tensor linear_gelu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool is_tanh,
                   int64_t tile) {
  check_tensor(x, "x", 3);
  const DeviceScope scope(x);
  const int64_t rows = x.size(0) * x.size(1);
  const bool is_forced = tile != -1;
  const bool can_run = runs_hopper(x.get_device_index()) && fits(x, weight, bias);
  TOME_CHECK(can_run || !is_forced, "no product of these tensors on this GPU, so tile must be -1, got ",
             tile);
  if (!can_run || (rows < gelu_ops::kLeastRows && !is_forced)) return gelu(linear(x, weight, bias), is_tanh);
  GeluParams p{};
  p.rows = to_int(rows, "the number of rows");
  p.inputs = to_int(x.size(2), "the number of channels");
  p.outputs = to_int(weight.size(0), "the number of outputs");
  p.row_stride = row_stride(x);
  const Choice choice = chosen(is_forced ? tile : fastest(rows, p.outputs));
  Tensor out = new_empty(x, {x.size(0), x.size(1), p.outputs}, x.scalar_type());
  if (out.numel() == 0) return out;
  p.x_ptr = x.const_data_ptr();
  p.weight_ptr = weight.const_data_ptr();
  p.bias_ptr = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.out_ptr = out.mutable_data_ptr();
  p.gelu = gelu_of(x.scalar_type(), is_tanh);
  p.multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, x.get_device_index());
  p.by_rows = choice.by_rows;
  const bool launched = choice.launch(p, floating_dtype(x, "x"), current_stream(x));
  check_launch();
  TOME_CHECK(launched, "the product of [", p.rows, ", ", p.inputs, "] and [", p.outputs, ", ", p.inputs,
             "] can't be launched");
  return out;
}

}  // namespace tome
