// The table of one instruction set: this file, too, is compiled once per level.
#include "kernels/amx.h"
#include "kernels/table.h"

#define BITWRIGHT_STRING_(x) #x
#define BITWRIGHT_STRING(x) BITWRIGHT_STRING_(x)

#if defined(BITWRIGHT_BF16_PAIRS)
#define BITWRIGHT_BF16_DOT(name) name
#else
#define BITWRIGHT_BF16_DOT(name) nullptr
#endif

namespace bitwright::BITWRIGHT_ISA_NAME {

static_assert(kNrF32 % kMrF32 == 0 && kNrF64 % kMrF64 == 0, "a tile must not straddle two panels");

extern const Table kTable;
const Table kTable = {
    BITWRIGHT_STRING(BITWRIGHT_ISA_NAME),
    kMrF32,
    kNrF32,
    kMrF64,
    kNrF64,
    kMrPairs,
    kPairsByRow,
    kDotTokens,
    kTokensByToken,
#define KERNEL(name, arguments) name,
#define KERNEL_OR_NULL(name, arguments) BITWRIGHT_BF16_DOT(name),
#include "kernels/kernels.def"
#undef KERNEL_OR_NULL
#undef KERNEL
};

}  // namespace bitwright::BITWRIGHT_ISA_NAME
