// The kernels in use, chosen once: BITWRIGHT_ISA if set, else the widest level this machine runs.
#pragma once

#include <string>
#include <vector>

#include "kernels/table.h"

namespace bitwright {

const Table& table();
// The table for panels of so many rows on so many threads: that of 256 bits in the place of that of
// 512 where a core takes two cycles for 512 (Zen 4), panels half as wide leave a quarter or more of
// the lanes out (refinement takes up to 1.4 times as long a lane in them), and no level is forced.
// Both give the same bits.
const Table& table_of(std::int64_t rows, int threads);
// Columns of a chain that a tile takes at a time: 128, its right operand in half of L1; 512 where a
// core takes two cycles for 512 bits (Zen 4), since L2 keeps pace with that and results spare three
// of four ways to memory: Gram of 4096 x 4096 .672 -> .657 s, refinement .934 -> .900. No bit
// depends on it.
int chain_columns();
// Names of the levels that this build has and this machine can run, narrowest first.
std::vector<std::string> levels();

}  // namespace bitwright
