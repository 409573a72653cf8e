#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace cute {
struct SM80_16x8x16_F32F16F16F32_TN {
  struct Operands {
    uint32_t a[4], b[2];
  };

  static float half_of(uint32_t word, int i) { return __half2float({static_cast<uint16_t>(word >> 16 * i)}); }

  static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2,
                  uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
    const Operands mine{{a0, a1, a2, a3}, {b0, b1}};
    const float c[4] = {c0, c1, c2, c3};
    float* const d[4] = {&d0, &d1, &d2, &d3};
    emulator::exchange(mine, [&](const Operands* all) {
      const int lane = emulator::lane();
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2);
        const int column = 2 * (lane % 4) + i % 2;
        float sum = c[i];
        for (int k = 0; k < 16; ++k) {
          const float a = half_of(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)], k % 2);
          const float b = half_of(all[column * 4 + k % 8 / 2].b[k / 8], k % 2);
          sum += a * b;
        }
        *d[i] = sum;
      }
      return 0;
    });
  }
};
}  // namespace cute
