// The C++ table of contents: every op, its contract, its formula. Matrices are row-major, W is (n,
// k) = (out, in); `group` columns share a scale, G = ceil(k / group); value w = (code - zero) *
// scale, or of a table level * scale, or with offsets code * scale - zero. steps: of two-level
// scales, (n, blocks), those of offsets behind them; else n x 0. Each op has a plain NumPy twin of
// the same name in tests/ref. Errors are std::invalid_argument; W, E, H and R are refused unless
// finite and at most 2^56, scales unless not 0.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/view.h"
#include "kernels/packed.h"

namespace bitwright {

// A number format: integers of `bits` bits around a zero point, or a table of levels (ascending, at
// most 2^bits) where code i stands for levels[i] and the zero point is 0. A value above middles[i]
// takes level i + 1 or a higher one. offset: `zero` is in the units of W.
struct Grid {
  int bits = 4;
  std::vector<float> levels, middles;
  bool offset = false;
};

// How scales and zero points of a group are chosen; see FitOptions in kernels/types.h.
struct FitSettings {
  Grid grid;
  Index group = 128;
  bool symmetric = true;
  int zero_min = 0;
  std::string scale_grid = "bf16";  // "bf16" | "fp16" | "fp32" | "e8m0" | "e4m3"
  float global_scale = 1.0F;        // scales are stored values divided by it
  double power = 2.0;               // 2 or 2.4
  bool search = false;              // try start * factors, else absmax / min-max as they are
  int zero_span = 1;                // search, asymmetric: zero points z0 - span .. z0 + span
  bool negative = false;            // search, symmetric: scales of either sign
  Index block = 0;                  // two levels: so many groups of a row share a step, and a scale
  int scale_bits = 0;               // is 1 .. 2^scale_bits - 1 of it (symmetric: a bit less)
};

// words[r] holds codes[r] as a bitstream, least significant bit first: code i in bits [i b, i b +
// b).
void pack(In<std::uint8_t> codes, int bits, Out<std::uint32_t> words);
void unpack(In<std::uint32_t> words, int bits, Out<std::uint8_t> codes);

// Scales on their grid, zeros in [zero_min, 2^b - 1] or offsets; of two levels multiples of
// `steps`. weight: (k) or empty; scores are weighted by it.
void fit(In<float> w, InVec<float> weight, const FitSettings& settings, InVec<float> factors,
         In<float> steps, Out<float> scales, Out<float> zeros);
// code = clamp(rint(w / scale) + zero, 0, 2^b - 1), ties to even; with offsets clamp(rint((w +
// zero) / scale), 0, 2^b - 1).
void encode(In<float> w, In<float> scales, In<float> zeros, Index group, const Grid& grid,
            Out<std::uint8_t> codes);
// fit without a search, encode and pack in one: integer grids with zero points, one level of
// scales.
void round_pack_f32(In<float> w, const FitSettings& settings, Out<float> scales, Out<float> zeros,
                    Out<std::uint32_t> words);
void round_pack_u16(In<std::uint16_t> w, bool bf16, const FitSettings& settings, Out<float> scales,
                    Out<float> zeros, Out<std::uint32_t> words);
// w = (code - zero) * scale, or levels[code] * scale, or code * scale - zero.
void decode(In<std::uint8_t> codes, In<float> scales, In<float> zeros, Index group,
            const Grid& grid, Out<float> w);

// H += X^T X over the rows of X (t, k): float32 products and sums over 512 rows, double above.
// Only the upper triangle is kept up; mirror() completes it. u16: bf16 or fp16 words. pairs: bf16
// words by the machine's own product of pairs, where multiplies_bf16(): the products are exact all
// the same, the order and rounding of their sums is the instruction's.
void gram_f32(In<float> x, Out<double> h);
void gram_u16(In<std::uint16_t> x, bool bf16, bool pairs, Out<double> h);
void mirror(Out<double> h);
// C (h, k) += (before - after)^T X, all of it, in the same precision (bf16 pairs: of the
// difference, too): how what was `before` (t, h) changed to `after`, as far as X (t, k) tells. With
// after = X, how the inputs drifted.
void cross_f32(In<float> before, In<float> after, In<float> x, Out<double> c);
void cross_u16(In<std::uint16_t> before, In<std::uint16_t> after, In<std::uint16_t> x, bool bf16,
               bool pairs, Out<double> c);
// Per column of X: absolute += sum |x|; abs_max, minimum, maximum are widened.
void column_stats_f32(In<float> x, OutVec<double> absolute, OutVec<float> abs_max,
                      OutVec<float> minimum, OutVec<float> maximum);
void column_stats_u16(In<std::uint16_t> x, bool bf16, OutVec<double> absolute,
                      OutVec<float> abs_max, OutVec<float> minimum, OutVec<float> maximum);

// R upper triangular with R R^T = H[order, order] + damping I, computed in double
// (docs/solver.md 3.2). Columns marked dead have nothing but the damping (1 without) on the
// diagonal. false: a pivot was not positive.
bool factor(In<double> h, InVec<std::int32_t> order, InVec<std::uint8_t> dead, double damping,
            Out<float> r);
// Inverse-free GPTQ with fixed scales (docs/solver.md 3.3): columns in `order`, R from factor().
// loss (n): sum over columns of (R_kk (t_k - q_k))^2 = e (H + damping) e^T of each row.
void gptq(In<float> w, In<float> r, InVec<std::int32_t> order, In<float> scales, In<float> zeros,
          Index group, const Grid& grid, Out<std::uint8_t> codes, OutVec<double> loss);

// The same with scales and zero points chosen inside the sweep (docs/solver.md 6.3): for each
// group, the candidate of `fit`, from the range of the group's targets u = w + a R_gg^-1, with the
// least loss after the group's own feedback. Groups must be whole in `order`, which lists each
// one's columns together.
void gptq_search(In<float> w, In<float> r, InVec<std::int32_t> order, const FitSettings& settings,
                 InVec<float> factors, In<float> steps, Out<float> scales, Out<float> zeros,
                 Out<std::uint8_t> codes, OutVec<double> loss);
// Revises codes and scales in place after the sweep (docs/solver.md 7): minimises e H_d e^T of each
// row, H_d = H + damping I (dead columns as in factor), by passes in the order of `pattern`: c
// coordinate descent over codes, l least squares over scales (and offsets, and steps), each step
// taken only where it gains.
// A row rests after a c that, like its last l, gained no more than `tolerance` of its loss; loss
// (n) is what remains.
void refine(In<float> w, In<double> h, InVec<std::uint8_t> dead, double damping,
            const FitSettings& settings, const std::string& pattern, double tolerance,
            Out<float> steps, Out<float> scales, Out<float> zeros, Out<std::uint8_t> codes,
            OutVec<double> loss);
// delta (n, k) = (W C + D) (R R^T)^-1, columns in natural order (docs/solver.md 9): W + alpha delta
// is the target that makes up for inputs which drifted, C = (X - X') X'^T / tokens, and for a sum
// that the outputs are added to, D = (S - S') X'^T / tokens; D n x k, or 0 x 0: none.
void drift(In<float> w, In<double> c, In<double> d, In<float> r, InVec<std::int32_t> order,
           Out<float> delta);

// tr(E H E^T), float32 products, double sums over rows.
double quadratic(In<float> e, In<double> h);
// For each row s of column_scales (A, k): tr(E H E^T) with E = W - fit-and-round(W diag(s))
// diag(1/s).
void awq_scale(In<float> w, In<double> h, In<float> column_scales, const FitSettings& settings,
               OutVec<double> losses);
// Per row and group the range shrunk by that factor of `factors` with the least e_g H_gg e_g^T.
void awq_clip(In<float> w, In<double> h, const FitSettings& settings, InVec<float> factors,
              Out<float> scales, Out<float> zeros);

// y (t, n) = x (t, k) W^T with W = decode(codes, ...), float32, k ascending.
void qlinear(In<float> x, In<std::uint8_t> codes, In<float> scales, In<float> zeros, Index group,
             Out<float> y);

// How a matrix of `grid` lies in panels of 16 rows (kernels/packed.h), its scales (and offsets)
// kept as `scale` words: "bf16" | "fp16" | "fp32"; and one that does, the caller's memory.
PanelLayout panel_layout(const Grid& grid, Index k, Index group, bool symmetric,
                         const std::string& scale);
struct Packed {
  const std::uint8_t* panels;
  Index n;
  PanelLayout layout;
  Packed(In<std::uint8_t> bytes, Index rows, const PanelLayout& how);
};
// Rows of a matrix to panels (ceil(rows / 16), layout.bytes), and back. Refused: codes above `bits`
// bits, scales and offsets that are no such words, zero points that a symmetric scheme has not.
void pack_linear(In<std::uint8_t> codes, In<float> scales, In<float> zeros, int bits,
                 const PanelLayout& layout, Out<std::uint8_t> panels);
// The same of codes packed as by `pack`, words (rows, ceil(k bits / 32)).
void pack_linear_u32(In<std::uint32_t> words, In<float> scales, In<float> zeros, int bits,
                     const PanelLayout& layout, Out<std::uint8_t> panels);
void unpack_linear(In<std::uint8_t> panels, const PanelLayout& layout, Out<std::uint8_t> codes,
                   Out<float> scales, Out<float> zeros);
// y_i (t, n_i) = x (t, k) W_i^T, one behind the other in y. Exact: W dequantized to float32, one
// multiply-add chain, k ascending. fast: x as int8, codes times scales of the largest |x| / 127 of
// a segment (128 columns of a group at most), a second digit where that stands out among the
// token's; or per_token (segments of 1024 columns at most), one scale. Sums over a segment are
// integers; of those a group's sum is a chain, from what its zero points take away on, and y one of
// the groups' by their weight scales, ascending; levels of tables as multiples of the smallest
// positive one where they are, else of the largest / 127. u16: bf16.
void linear_f32(In<float> x, const std::vector<const Packed*>& weights, bool fast, bool per_token,
                OutVec<float> y);
void linear_u16(In<std::uint16_t> x, const std::vector<const Packed*>& weights, bool fast,
                bool per_token, OutVec<std::uint16_t> y);

// A decoder block of the Llama kind on packed matrices, the caller's memory:
//   x += o(attention(q, k, v of rms(x)));  x += down(silu(gate) up),  gate, up of rms(x)
// matrices: q, k, v, o, gate, up, down. gains: of the two norms, then of q's and k's heads where
// those have norms. biases: of the matrices in that order, or none. heads share keys and values in
// runs. rotary: cos and sin turn q and k, x_i cos + (-x_(i + width/2), x_(i - width/2)) sin.
struct BlockSettings {
  Index heads, kv_heads;
  float epsilon, scale;  // of the norms; of the scores
  bool rotary, fast, per_token;
};
struct Block {
  std::vector<const Packed*> inputs, gates;  // q, k, v; gate, up
  const Packed *o, *down;
  const float *gains, *biases;  // biases: or null
  bool head_norms;
  Index hidden, width, inner;
  BlockSettings settings;
  Block(const std::vector<const Packed*>& matrices, InVec<float> gain, InVec<float> bias,
        const BlockSettings& how);
};
// Keys and values of a block, (batch * kv_heads * room, width) each, the caller's memory.
template <class T>
struct KeyValues {
  T *keys, *values;
  Index rows, width;
  KeyValues(Out<T> k, Out<T> v)
      : keys(k.data()), values(v.data()), rows(std::min(k.rows(), v.rows())), width(k.cols()) {
    require(k.rows() == v.rows() && k.cols() == v.cols(), "[blocks] keys and values must be alike");
  }
};
// y = x (batch * t, hidden) through the blocks; the keys and values of its tokens are written
// behind the first `past` of each sequence and head. cos, sin: (t or batch * t, width). mask: which
// of the past + t keys each token sees, (batch * t, past + t); or 0 x 0, those up to its own.
// Floats inside a block, rounded to x's type behind each.
void blocks_f32(In<float> x, const std::vector<const Block*>& blocks, In<float> cos, In<float> sin,
                In<std::uint8_t> mask, const std::vector<const KeyValues<float>*>& stores,
                Index batch, Index past, Out<float> y);
void blocks_u16(In<std::uint16_t> x, const std::vector<const Block*>& blocks, In<std::uint16_t> cos,
                In<std::uint16_t> sin, In<std::uint8_t> mask,
                const std::vector<const KeyValues<std::uint16_t>*>& stores, Index batch, Index past,
                Out<std::uint16_t> y);

// y (t, n) = x (t, k) W^T for a few tokens, W of bf16 words, as a head keeps them: float32 sums of
// every 16th product, ascending, then added pairwise.
void head_f32(In<float> x, In<std::uint16_t> w, Out<float> y);
void head_u16(In<std::uint16_t> x, In<std::uint16_t> w, Out<std::uint16_t> y);

// What the machine can do at most, measured by `bitwright bench`. x = x a + b, `rounds` times in
// registers for each element, 2 operations each; of bf16 pairs x = x + a b + a b with a and b
// rounded to bf16, 4 operations (refused where the level has no such product). Columns are a
// multiple of 1536 bytes. sums (r): of each row's words modulo 2^64, one read of x.
void chain_f32(Index rounds, double a, double b, Out<float> x);
void chain_f64(Index rounds, double a, double b, Out<double> x);
void chain_bf16(Index rounds, double a, double b, Out<float> x);
void word_sum(In<std::uint64_t> x, OutVec<std::uint64_t> sums);
// x += the sum of four int8 products, code * byte each, modulo 2^32, `rounds` times in registers: 8
// operations each; 0 <= code <= 15, columns as above.
void dot_chain(Index rounds, int code, int byte, Out<std::int32_t> x);

}  // namespace bitwright
