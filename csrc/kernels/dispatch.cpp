// Which instruction sets this machine runs, and the choice among them.
#include "kernels/dispatch.h"

#include <cstdlib>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "core/check.h"

namespace bitwright {

#define LEVEL(name)          \
  namespace name {           \
  extern const Table kTable; \
  }
BITWRIGHT_LEVELS
#undef LEVEL

namespace {

bool runs(const std::string& isa) {
  if (isa == "base") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (isa == "avx2") return avx2;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (isa == "avxvnni") return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  if (isa == "avx512vnni") return runs("avx512") && __builtin_cpu_supports("avx512vnni");
  if (isa == "avx512bf16") return runs("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (isa == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
#elif defined(__aarch64__) && defined(__linux__)
  if (isa == "dotprod") return (getauxval(AT_HWCAP) >> 20 & 1) != 0;  // HWCAP_ASIMDDP
  if (isa == "bf16") return runs("dotprod") && (getauxval(AT_HWCAP2) >> 13 & 3) == 3;  // I8MM, BF16
#endif
  return false;
}

std::vector<const Table*> usable() {
  std::vector<const Table*> found;
#define LEVEL(name) \
  if (runs(#name)) found.push_back(&name::kTable);
  BITWRIGHT_LEVELS
#undef LEVEL
  return found;
}

const Table& choose() {
  const std::vector<const Table*> tables = usable();
  const char* wanted = std::getenv("BITWRIGHT_ISA");
  if (wanted == nullptr || *wanted == '\0') return *tables.back();
  std::string known;
  for (const Table* table : tables) {
    if (std::string(table->isa) == wanted) return *table;
    known += std::string(known.empty() ? "" : ", ") + table->isa;
  }
  throw std::invalid_argument(
      text("[isa] BITWRIGHT_ISA must be one of ", known, " on this machine, got ", wanted));
}

}  // namespace

const Table& table() {
  static const Table& chosen = choose();
  return chosen;
}

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Table* table : usable()) names.emplace_back(table->isa);
  return names;
}

}  // namespace bitwright
