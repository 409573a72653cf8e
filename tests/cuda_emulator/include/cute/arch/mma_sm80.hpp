#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace cute {
inline float half_of(uint32_t word, int i) { return __half2float({static_cast<uint16_t>(word >> 16 * i)}); }
inline float bfloat_of(uint32_t word, int i) {
  return __bfloat162float({static_cast<uint16_t>(word >> 16 * i)});
}

// D = A B + C of 16 rows and 8 columns over 16 (or with kDepth = 8 over 8) numbers each.
template <int kDepth, float (*kNumber)(uint32_t, int)>
struct Product {
  struct Operands {
    uint32_t a[kDepth / 4], b[kDepth / 8];
  };

  static void run(const Operands& mine, float* const (&d)[4], const float (&c)[4]) {
    emulator::exchange(mine, [&](const Operands* all) {
      const int lane = emulator::lane();
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2);
        const int column = 2 * (lane % 4) + i % 2;
        float sum = c[i];
        for (int k = 0; k < kDepth; ++k) {
          const float a = kNumber(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)], k % 2);
          const float b = kNumber(all[column * 4 + k % 8 / 2].b[k / 8], k % 2);
          sum += a * b;
        }
        *d[i] = sum;
      }
      return 0;
    });
  }
};

template <float (*kNumber)(uint32_t, int)>
struct Deep {
  static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2,
                  uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
    Product<16, kNumber>::run({{a0, a1, a2, a3}, {b0, b1}}, {&d0, &d1, &d2, &d3}, {c0, c1, c2, c3});
  }
};
template <float (*kNumber)(uint32_t, int)>
struct Flat {
  static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t b0, float c0,
                  float c1, float c2, float c3) {
    Product<8, kNumber>::run({{a0, a1}, {b0}}, {&d0, &d1, &d2, &d3}, {c0, c1, c2, c3});
  }
};

using SM80_16x8x16_F32F16F16F32_TN = Deep<half_of>;
using SM80_16x8x8_F32F16F16F32_TN = Flat<half_of>;
using SM80_16x8x16_F32BF16BF16F32_TN = Deep<bfloat_of>;
using SM80_16x8x8_F32BF16BF16F32_TN = Flat<bfloat_of>;
}  // namespace cute
