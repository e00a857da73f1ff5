// The inner block of the inverse-free GPTQ sweep (docs/solver.md 3.3), one row per lane: nothing
// but elementwise work and one multiply-add chain per later column, in ascending column order.
#include "kernels/rounding.h"
#include "kernels/simd.h"
#include "kernels/table.h"

namespace bitwright::BITWRIGHT_ISA_NAME {

namespace {

template <bool kOpen, bool kTable, bool kOffset>
inline void sweep(const FeedbackBlock& block) {
  VF loss[kVectors];
  for (int v = 0; v < kVectors; ++v) loss[v] = load<VF>(block.loss + v * kF32);
  for (std::int64_t p = 0; p < block.columns; ++p) {
    const float* r = block.r + p * block.ldr;
    const VF pivot = broadcast<VF>(r[p]);
    VF error[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t at = p * kNrF32 + v * kF32;
      const VF w = load<VF>(block.w + at);
      const VF target = w + load<VF>(block.a + at) / pivot;
      VF value = target;
      if (!kOpen) {
        const VF s = load<VF>(block.scale[p] + v * kF32), z = load<VF>(block.zero[p] + v * kF32);
        const VF shifted = kOffset ? target + z : target;
        const Rounded nearest = to_grid<kTable>(shifted / s, kOffset ? VF{} : z, block.coding);
        value = nearest.level * s;
        if (kOffset) value = value - z;
        const VF residual = pivot * (target - value);
        loss[v] = loss[v] + residual * residual;
        store(block.codes + at, __builtin_convertvector(nearest.code, VI));
      }
      error[v] = w - value;
      store(block.e + at, error[v]);
    }
    for (std::int64_t j = p + 1; j < block.columns; ++j) {
      const VF factor = broadcast<VF>(r[j]);
      float* a = block.a + j * kNrF32;
      for (int v = 0; v < kVectors; ++v)
        store(a + v * kF32, fma(error[v], factor, load<VF>(a + v * kF32)));
    }
  }
  for (int v = 0; v < kVectors; ++v) store(block.loss + v * kF32, loss[v]);
}

}  // namespace

void feedback(const FeedbackBlock& block) {
  if (block.open)
    sweep<true, false, false>(block);
  else if (block.coding.levels != nullptr)
    sweep<false, true, false>(block);
  else if (block.coding.offset)
    sweep<false, false, true>(block);
  else
    sweep<false, false, false>(block);
}

}  // namespace bitwright::BITWRIGHT_ISA_NAME
