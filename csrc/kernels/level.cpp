// The table of one instruction set: this file, too, is compiled once per level.
#include "kernels/amx.h"
#include "kernels/int8.h"
#include "kernels/table.h"

#define BITWRIGHT_STRING_(x) #x
#define BITWRIGHT_STRING(x) BITWRIGHT_STRING_(x)

#if defined(BITWRIGHT_BF16_PAIRS)
#define BITWRIGHT_WITH_BF16(name) name
#else
#define BITWRIGHT_WITH_BF16(name) nullptr
#endif
#if defined(BITWRIGHT_PAIR)
#define BITWRIGHT_WITH_PAIR(name) name
#else
#define BITWRIGHT_WITH_PAIR(name) nullptr
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
    kPairTokens,
#define KERNEL(name, arguments) name,
#define KERNEL_WITH(feature, name, arguments) BITWRIGHT_WITH_##feature(name),
#include "kernels/kernels.def"
#undef KERNEL_WITH
#undef KERNEL
};

}  // namespace bitwright::BITWRIGHT_ISA_NAME
