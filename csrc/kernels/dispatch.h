// The kernels in use, chosen once: BITWRIGHT_ISA if set, else the widest level this machine runs.
#pragma once

#include <string>
#include <vector>

#include "kernels/table.h"

namespace bitwright {

const Table& table();
// Names of the levels that this build has and this machine can run, narrowest first.
std::vector<std::string> levels();

}  // namespace bitwright
