// Which instruction sets this machine runs, and the choice among them. AMX needs the processor, the
// system's state of it (XCR0) and its leave (arch_prctl), and is taken if one product of pairs and
// one of bytes, in numbers that every order of adding gives exactly, are those of the level below.
#include "kernels/dispatch.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
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

#if defined(__x86_64__)
bool has_tiles() {
#if defined(BITWRIGHT_AMX_EMULATED)
  return true;
#elif defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kTile = 1U << 24, kBf16 = 1U << 22, kInt8 = 1U << 25, kState = 3U << 17;
  constexpr long kAskForState = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kTile) == 0 || (d & kBf16) == 0 || (d & kInt8) == 0) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & kState) == kState && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

bool pairs_agree() {
  constexpr int kPairs = 21, kRows = 16, kColumns = 48;
  std::vector<std::uint32_t> left(kRows * kPairs), turned(left.size()), right(kPairs * kColumns);
  const auto pair = [](int i) {
    const auto word = [](int j) {
      const float value = static_cast<float>(j % 15 - 7);
      std::uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      return bits >> 16;
    };
    return word(i * 7) | word(i * 11 + 3) << 16;
  };
  for (int p = 0; p < kPairs; ++p) {
    for (int i = 0; i < kRows; ++i) left[i * kPairs + p] = turned[p * kRows + i] = pair(p + 5 * i);
    for (int j = 0; j < kColumns; ++j) right[p * kColumns + j] = pair(3 * p + j);
  }
  std::vector<float> tiles(kRows * kColumns, 1.0F), want = tiles;
  amx::kTable.tile_bf16(kPairs, left.data(), kPairs, right.data(), tiles.data(), kColumns);
  const Table& below = avx512bf16::kTable;
  for (int i = 0; i < kRows; i += below.mr_pairs)
    below.tile_bf16(kPairs, turned.data() + i, kRows, right.data(), &want[i * kColumns], kColumns);
  return tiles == want;
}

bool bytes_agree() {
  PanelLayout layout = {};
  layout.k = layout.group = 96;
  layout.groups = 1;
  layout.group_strips = layout.strips = 6;
  layout.width = 8;
  layout.unit = 1.0F;
  layout.codes_at = 64;
  layout.bytes = 64 + 96 * kPanelRows;
  std::vector<std::uint8_t> panel(layout.bytes);
  std::vector<float> scale(kPanelRows, 1.0F), ones(kPanelRows, 1.0F), none(kPanelRows, 0.0F);
  std::memcpy(panel.data(), scale.data(), 64);
  for (std::size_t i = 64; i < panel.size(); ++i) panel[i] = static_cast<std::uint8_t>(i * 37);
  constexpr int kTokens = 8;
  std::vector<std::int32_t> token(kTokens * 24 + 12), strip(token.size());
  for (int t = 0; t < kTokens; ++t)
    for (int j = 0; j < 24; ++j)
      token[t * 24 + j] = strip[j * kTokens + t] =
          static_cast<std::int32_t>(unsigned(t * 24 + j) * 0x1F35B2C7U);
  std::vector<float> tiles(kTokens * kPanelRows), want(tiles.size());
  DotTokens x = {kTokens,     true, true,    64,      token.data(), ones.data(),
                 none.data(), 0,    nullptr, nullptr, nullptr};
  amx::kTable.dot_tile(layout, panel.data(), x, tiles.data(), kPanelRows);
  x.by_token = false;
  x.quads = strip.data();
  avx512bf16::kTable.dot_tile(layout, panel.data(), x, want.data(), kPanelRows);
  return tiles == want;
}
#endif

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
  if (isa == "amx") return runs("avx512bf16") && has_tiles() && pairs_agree() && bytes_agree();
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

// Whether 512 bits take two cycles.
bool halves() {
#if defined(__x86_64__)
  static const bool found = [] {
    __builtin_cpu_init();
    return table().nr_f32 == 48 && __builtin_cpu_is("amdfam19h");
  }();
  return found;
#else
  return false;
#endif
}

// The level that is forced, null where none is.
const char* forced() {
  const char* wanted = std::getenv("BITWRIGHT_ISA");
  return wanted == nullptr || *wanted == '\0' ? nullptr : wanted;
}

const Table& choose() {
  const std::vector<const Table*> tables = usable();
  const char* wanted = forced();
  if (wanted == nullptr) return *tables.back();
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

const Table& table_of([[maybe_unused]] std::int64_t rows, [[maybe_unused]] int threads) {
#if defined(__x86_64__)
  const auto turns = [&](int nr) {
    const std::int64_t panels = (rows + nr - 1) / nr;
    return (panels + threads - 1) / threads * nr;
  };
  static const bool may = halves() && forced() == nullptr;
  const Table& narrow = avx2::kTable;
  if (may && 4 * turns(narrow.nr_f32) <= 3 * turns(table().nr_f32)) return narrow;
#endif
  return table();
}

int chain_columns() { return halves() ? 512 : 128; }

std::vector<std::string> levels() {
  std::vector<std::string> names;
  for (const Table* table : usable()) names.emplace_back(table->isa);
  return names;
}

}  // namespace bitwright
