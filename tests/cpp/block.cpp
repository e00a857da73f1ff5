// Decoder blocks: tokens at once or one by one, on any number of threads, give the same bits; the
// keys and values behind them are left alone; what does not fit is refused. And the head.
#include "check.h"

namespace bitwright_tests {

namespace {

struct Shape {
  Index hidden, heads, kv_heads, width, inner;
};

RowMajor<float> turned(Index t, Index width, float phase) {
  RowMajor<float> x(t, width);
  for (Index i = 0; i < t; ++i)
    for (Index j = 0; j < width; ++j)
      x(i, j) = std::cos(static_cast<float>(i * (1 + j % (width / 2))) * 0.1F + phase);
  return x;
}

// A block of random matrices, with the memory that it points to.
class Made {
 public:
  Made(const Shape& s, bool fast, bool more) : shape_(s) {
    const Index q = s.heads * s.width, k = s.kv_heads * s.width;
    const Index sizes[7][2] = {{q, s.hidden},      {k, s.hidden},       {k, s.hidden},
                               {s.hidden, q},      {s.inner, s.hidden}, {s.inner, s.hidden},
                               {s.hidden, s.inner}};
    Index biases = 0;
    for (const auto& size : sizes) {
      add(size[0], size[1]);
      biases += size[0];
    }
    for (std::size_t i = 0; i < 7; ++i) packed_.emplace_back(panels_[i], sizes[i][0], layouts_[i]);
    for (const Packed& one : packed_) matrices_.push_back(&one);
    gains_ = normal(1, 2 * s.hidden + (more ? 2 * s.width : 0), 3).transpose();
    biases_ = normal(1, more ? biases : 0, 4).transpose();
    settings_ = {s.heads, s.kv_heads, 1e-5F, 0.3F, true, fast, false};
  }
  Block block() const { return {matrices_, gains_, biases_, settings_}; }
  Block of(Index heads) const {
    BlockSettings other = settings_;
    other.heads = heads;
    return {matrices_, gains_, biases_, other};
  }

 private:
  void add(Index n, Index k) {
    const Grid grid{4, {}, {}};
    const Index group = std::min<Index>(k, 32);
    layouts_.push_back(panel_layout(grid, k, group, true, "bf16"));
    const RowMajor<float> scales = RowMajor<float>::Constant(n, ceil_div(k, group), 0x1p-5F);
    const RowMajor<float> zeros = RowMajor<float>::Constant(n, scales.cols(), 8.0F);
    panels_.emplace_back(ceil_div(n, kPanelRows), layouts_.back().bytes);
    pack_linear(random_codes(n, k, 4, static_cast<unsigned>(n + k)), scales, zeros, 4,
                layouts_.back(), panels_.back());
  }
  Shape shape_;
  std::vector<PanelLayout> layouts_;
  std::vector<RowMajor<std::uint8_t>> panels_;
  std::vector<Packed> packed_;
  std::vector<const Packed*> matrices_;
  Vector<float> gains_, biases_;
  BlockSettings settings_;
};

const RowMajor<std::uint8_t> kNoMask;

RowMajor<float> tokens(const Shape& s, const Made& made, Index t, Index step,
                       const RowMajor<std::uint8_t>& mask = kNoMask) {
  const RowMajor<float> x = normal(t, s.hidden, 5);
  const RowMajor<float> cos = turned(t, s.width, 0.0F), sin = turned(t, s.width, 1.0F);
  const Index room = t + 3;
  RowMajor<float> keys = RowMajor<float>::Constant(s.kv_heads * room, s.width, 7.0F);
  RowMajor<float> values = keys, y(t, s.hidden);
  const Block block = made.block();
  const KeyValues<float> store(keys, values);
  for (Index begin = 0; begin < t; begin += step) {
    const Index count = std::min(step, t - begin);
    blocks_f32(x.middleRows(begin, count), {&block}, cos.middleRows(begin, count),
               sin.middleRows(begin, count), mask, {&store}, 1, begin, y.middleRows(begin, count));
  }
  for (Index h = 0; h < s.kv_heads; ++h)
    CHECK((keys.middleRows(h * room + t, 3).array() == 7.0F).all() &&
          (values.middleRows(h * room + t, 3).array() == 7.0F).all());
  return y;
}

void shaped(const Shape& s) {
  for (const bool fast : {false, true}) {
    for (const bool more : {false, true}) {
      const Made made(s, fast, more);
      const RowMajor<float> want = for_every_thread_count([&] { return tokens(s, made, 19, 19); });
      CHECK(want.allFinite());
      for (const Index step : {1, 2, 7}) CHECK(tokens(s, made, 19, step) == want);
      RowMajor<std::uint8_t> mask = RowMajor<std::uint8_t>::Zero(19, 19);
      for (Index i = 0; i < 19; ++i) mask.row(i).head(i + 1).setOnes();
      CHECK(tokens(s, made, 19, 19, mask) == want);
    }
  }
}

void refusals() {
  const Shape s{32, 4, 2, 8, 64};
  const Made made(s, false, true);
  const Block block = made.block();
  RowMajor<float> x = normal(2, 32, 1), turns = normal(2, 8, 2), keys(4, 8), values(4, 8), y(2, 32);
  const KeyValues<float> store(keys, values);
  const auto refuse = [&](In<float> in, In<float> turn, Index batch, Index past) {
    return refusal(
        [&] { blocks_f32(in, {&block}, turn, turn, kNoMask, {&store}, batch, past, y); });
  };
  CHECK(refuse(x, turns, 1, 0).empty());
  CHECK(contains(refuse(x.leftCols(31), turns, 1, 0), "y must be as x"));
  CHECK(contains(refuse(x, turns.leftCols(6), 1, 0), "cos and sin must be 2 or 2 x 8"));
  CHECK(contains(refuse(x, turns, 1, 1), "must have room for 6 rows of 8, got 4 of 8"));
  CHECK(contains(refuse(x, turns, 3, 0), "x of 3 sequences alike"));
  CHECK(contains(refusal([&] { made.of(3); }), "heads that divide 32 rows"));
}

void heads() {
  RowMajor<std::uint16_t> w(101, 37);
  for (Index i = 0; i < w.size(); ++i) w.data()[i] = static_cast<std::uint16_t>(0x3f00 + i % 256);
  const RowMajor<float> x = normal(3, 37, 6);
  const RowMajor<float> y = for_every_thread_count([&] {
    RowMajor<float> out(3, 101);
    head_f32(x, w, out);
    return out;
  });
  RowMajor<float> wide(101, 37);
  table().widen_bf16(w.size(), w.data(), wide.data());
  CHECK((y - x * wide.transpose()).cwiseAbs().maxCoeff() < 1e-4F);
  RowMajor<std::uint16_t> words = RowMajor<std::uint16_t>::Constant(2, 37, 0x3f80), out(2, 101);
  head_u16(words, w, out);
  CHECK(out.row(0) == out.row(1));
  RowMajor<float> narrow(3, 100);
  CHECK(contains(refusal([&] { head_f32(x, w, narrow); }), "y must be 3 x 101"));
}

}  // namespace

void block() {
  for (const Shape& s : {Shape{32, 4, 2, 8, 64}, Shape{48, 3, 1, 64, 80}, Shape{40, 2, 2, 18, 33},
                         Shape{16, 20, 1, 6, 20}})
    shaped(s);
  refusals();
  heads();
}

}  // namespace bitwright_tests
