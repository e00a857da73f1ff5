// Bitstreams, least significant bit first, in 32-bit words: the packer of most checkpoint formats.
#include "core/check.h"
#include "core/parallel.h"
#include "ops.h"
#include "ops/bitstream.h"

namespace bitwright {

namespace {

constexpr Index kRowsPerTask = 64;

void check(const char* op, Index rows, Index k, int bits, Index word_rows, Index words) {
  require(bits >= 1 && bits <= 8, "[", op, "] bits must be 1 to 8, got ", bits);
  const Index want = ceil_div(k * bits, 32);
  require(word_rows == rows && words == want, "[", op, "] words must be ", rows, " x ", want,
          " for ", rows, " x ", k, " codes of ", bits, " bits, got ", word_rows, " x ", words);
}

template <class F>
void each_row(Index rows, const F& f) {
  parallel_for(ceil_div(rows, kRowsPerTask), [&](Index task) {
    for (Index r = task * kRowsPerTask; r < std::min(rows, (task + 1) * kRowsPerTask); ++r) f(r);
  });
}

}  // namespace

void pack(In<std::uint8_t> codes, int bits, Out<std::uint32_t> words) {
  check("pack", codes.rows(), codes.cols(), bits, words.rows(), words.cols());
  const std::uint8_t all = std::uint8_t(0xFF >> (8 - bits));
  each_row(codes.rows(), [&](Index r) {
    const std::uint8_t* from = codes.data() + r * codes.outerStride();
    for (Index i = 0; i < codes.cols(); ++i)
      require(from[i] <= all, "[pack] code ", int(from[i]), " at (", r, ", ", i,
              ") does not fit in ", bits, " bits");
    write_bits(from, codes.cols(), bits, words.data() + r * words.outerStride());
  });
}

void unpack(In<std::uint32_t> words, int bits, Out<std::uint8_t> codes) {
  check("unpack", codes.rows(), codes.cols(), bits, words.rows(), words.cols());
  each_row(codes.rows(), [&](Index r) {
    read_bits(words.data() + r * words.outerStride(), codes.cols(), bits,
              codes.data() + r * codes.outerStride());
  });
}

}  // namespace bitwright
