// One table of kernels per instruction set, filled from kernels.def. No header of the standard
// library with code in it: the files that include this are compiled for several instruction sets.
#pragma once

#include <cstdint>

#include "kernels/packed.h"
#include "kernels/types.h"

namespace bitwright {

struct Table {
  const char* isa;
  int mr_f32, nr_f32, mr_f64, nr_f64;
  int mr_pairs;         // of tile_bf16
  bool pairs_by_row;    // its left operand
  int dot_tokens;       // of dot_tile, at most
  int tokens_by_token;  // of it, stored one after another; 0: it takes none so
  int pair_tokens;      // of dot_pair, at most
#define KERNEL(name, arguments) void(*name) arguments;
#define KERNEL_WITH(feature, name, arguments) KERNEL(name, arguments)
#include "kernels/kernels.def"
#undef KERNEL_WITH
#undef KERNEL
};

#ifdef BITWRIGHT_ISA_NAME
namespace BITWRIGHT_ISA_NAME {
#define KERNEL(name, arguments) void name arguments;
#define KERNEL_WITH(feature, name, arguments) KERNEL(name, arguments)
#include "kernels/kernels.def"
#undef KERNEL_WITH
#undef KERNEL
}  // namespace BITWRIGHT_ISA_NAME
#endif

}  // namespace bitwright
