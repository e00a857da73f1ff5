// Decoder blocks, one after the other, for a few tokens: norm, q k v, rotary positions, attention
// over the kept keys, o, norm, gate and up, SiLU, down. Everything between two blocks is float32.
// A task is a range of tokens, or some tokens of the heads that share keys; what it computes does
// not depend on how many there are.
#include <type_traits>

#include "ops.h"
#include "ops/panel.h"

namespace bitwright {

namespace {

constexpr double kTaskNanoseconds = 1e4;  // below two of these no thread is started
constexpr Index kTaskQueries = 16;        // over one head's keys
constexpr Index kScoreRows = 4;           // that `attend` holds at once

template <class F>
void for_tasks(Index tasks, double nanoseconds, const F& f) {
  if (nanoseconds >= 2 * kTaskNanoseconds) return parallel_for(tasks, f);
  for (Index i = 0; i < tasks; ++i) f(i);
}

// Rows of tokens, a few a task.
template <class F>
void for_rows(Index rows, Index width, const F& f) {
  const Index each = std::max<Index>(1, 32768 / width);
  for_tasks(ceil_div(rows, each), double(rows) * double(width) * 0.5, [&](Index task) {
    for (Index i = task * each; i < std::min(rows, (task + 1) * each); ++i) f(i);
  });
}

void widen_to(const float* from, Index count, float* to) { std::copy(from, from + count, to); }
void widen_to(const std::uint16_t* from, Index count, float* to) {
  table().widen_bf16(count, from, to);
}
void narrow_to(const float* from, Index count, float* to) { std::copy(from, from + count, to); }
void narrow_to(const float* from, Index count, std::uint16_t* to) {
  table().narrow_bf16(count, from, to);
}

void rotate(const float* cos, const float* sin, Index width, float* x) {
  const Index half = width / 2;
  for (Index i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// y (rows of tokens, one matrix behind the other) = x W^T + bias.
void project(const Block& block, const std::vector<const Packed*>& weights, const float* x,
             Index tokens, const float* bias, float* y) {
  Index rows = 0;
  for (const Packed* w : weights) rows += w->n;
  Eigen::Map<Eigen::Matrix<float, Eigen::Dynamic, 1>> out(y, tokens * rows);
  linear_f32(Eigen::Map<const RowMajor<float>>(x, tokens, weights[0]->layout.k), weights,
             block.settings.fast, block.settings.per_token, out);
  if (bias == nullptr) return;
  for (const Packed* w : weights) {
    for (Index t = 0; t < tokens; ++t, y += w->n)
      for (Index i = 0; i < w->n; ++i) y[i] += bias[i];
    bias += w->n;
  }
}

// What all blocks of a call share.
template <class T>
struct Call {
  Index batch, tokens, past;
  const float *cos, *sin;
  bool by_sequence;  // cos and sin have rows for each one
  const std::uint8_t* mask;

  Index rows() const { return batch * tokens; }
  Index keys() const { return past + tokens; }
};

template <class T>
class Attended {
 public:
  Attended(const Call<T>& call, const Block& block, const KeyValues<T>& store, float* q, float* out)
      : call_(call),
        block_(block),
        store_(store),
        q_(q),
        out_(out),
        share_(block.settings.heads / block.settings.kv_heads),
        room_(store.rows / (call.batch * block.settings.kv_heads)) {}

  // q, k, v of every token, q and k normed and turned, k and v kept.
  void place(const float* k, const float* v) const {
    const Index width = block_.width, kv = block_.settings.kv_heads, heads = block_.settings.heads;
    for_rows(call_.rows(), (heads + kv) * width, [&](Index row) {
      const Index token = row % call_.tokens, sequence = row / call_.tokens;
      for (Index h = 0; h < heads; ++h) prepare(row, q_ + (row * heads + h) * width, 0);
      Buffer<float> key(width);
      for (Index h = 0; h < kv; ++h) {
        const Index from = (row * kv + h) * width;
        const Index to = ((sequence * kv + h) * room_ + call_.past + token) * width;
        std::copy(k + from, k + from + width, key.get());
        prepare(row, key.get(), 1);
        narrow_to(key.get(), width, store_.keys + to);
        narrow_to(v + from, width, store_.values + to);
      }
    });
  }

  void run() const {
    const Index kv = block_.settings.kv_heads;
    // Heads that share keys go together, unless that leaves threads idle.
    const bool apart = call_.batch * kv * ceil_div(call_.tokens * share_, kTaskQueries) <
                       2 * Index{thread_count().load()};
    const Index share = apart ? 1 : share_, each = std::max<Index>(1, kTaskQueries / share);
    const Index parts = ceil_div(call_.tokens, each), groups = block_.settings.heads / share;
    const double cost = double(call_.rows()) * double(call_.keys()) * double(block_.width) *
                        double(block_.settings.heads) * 0.1;
    for_tasks(call_.batch * groups * parts, cost, [&](Index task) {
      const Index part = task % parts, group = task / parts % groups;
      attend_to(task / parts / groups, group * share, share, part * each,
                std::min(call_.tokens, (part + 1) * each));
    });
  }

 private:
  void prepare(Index row, float* x, Index which) const {
    const Index width = block_.width;
    if (block_.head_norms)
      table().rms_norm(width, x, block_.gains + 2 * block_.hidden + which * width,
                       block_.settings.epsilon, x);
    if (!block_.settings.rotary) return;
    const Index at = (call_.by_sequence ? row : row % call_.tokens) * width;
    rotate(call_.cos + at, call_.sin + at, width, x);
  }

  // Tokens begin .. end - 1 of a sequence, heads first .. first + share - 1.
  void attend_to(Index sequence, Index first, Index share, Index begin, Index end) const {
    const Index width = block_.width, heads = block_.settings.heads;
    const Index stride = ceil_div(call_.keys(), 16) * 16;
    const float* query[kTaskQueries];
    float* out[kTaskQueries];
    Index visible[kTaskQueries];
    const std::uint8_t* mask[kTaskQueries];
    Buffer<float> scores(kScoreRows * stride);
    const Index kept = (sequence * block_.settings.kv_heads + first / share_) * room_ * width;
    Attention a{0,
                width,
                stride,
                query,
                out,
                visible,
                call_.mask == nullptr ? nullptr : mask,
                store_.keys + kept,
                store_.values + kept,
                std::is_same_v<T, std::uint16_t>,
                block_.settings.scale,
                scores.get()};
    for (Index t = begin; t < end; ++t)
      for (Index h = first; h < first + share; ++h) {
        const Index row = sequence * call_.tokens + t, at = (row * heads + h) * width;
        query[a.rows] = q_ + at;
        out[a.rows] = out_ + at;
        visible[a.rows] = call_.mask == nullptr ? call_.past + t + 1 : call_.keys();
        if (call_.mask != nullptr) mask[a.rows] = call_.mask + row * call_.keys();
        if (++a.rows == kTaskQueries) flush(a);
      }
    flush(a);
  }
  static void flush(Attention& a) {
    table().attend(a);
    a.rows = 0;
  }

  const Call<T>& call_;
  const Block& block_;
  const KeyValues<T>& store_;
  float *q_, *out_;
  Index share_, room_;
};

// x (rows x hidden) += what the half of the block behind a norm gives; `normed` has been computed.
void add_rows(Index rows, Index width, const float* y, float* x) {
  for_rows(rows, width, [&](Index row) {
    for (Index i = row * width; i < (row + 1) * width; ++i) x[i] += y[i];
  });
}

void norm_rows(const Block& block, Index rows, Index which, const float* x, float* y) {
  const Index width = block.hidden;
  for_rows(rows, width, [&](Index row) {
    table().rms_norm(width, x + row * width, block.gains + which * width, block.settings.epsilon,
                     y + row * width);
  });
}

template <class T>
void run_block(const Call<T>& call, const Block& b, const KeyValues<T>& store, float* x,
               float* normed, float* wide) {
  const Index rows = call.rows(), h = b.hidden, nq = b.settings.heads * b.width,
              nk = b.settings.kv_heads * b.width;
  const float* bias = b.biases;
  const auto next_bias = [&](Index count) {
    const float* mine = bias;
    if (bias != nullptr) bias += count;
    return mine;
  };
  norm_rows(b, rows, 0, x, normed);
  project(b, b.inputs, normed, rows, next_bias(nq + 2 * nk), wide);
  const Attended<T> attention(call, b, store, wide, normed);
  attention.place(wide + rows * nq, wide + rows * (nq + nk));
  attention.run();
  project(b, {b.o}, normed, rows, next_bias(h), wide);
  add_rows(rows, h, wide, x);
  norm_rows(b, rows, 1, x, normed);
  project(b, b.gates, normed, rows, next_bias(2 * b.inner), wide);
  for_rows(rows, 8 * b.inner, [&](Index row) {
    table().silu_gate(b.inner, wide + row * b.inner, wide + (rows + row) * b.inner);
  });
  project(b, {b.down}, wide, rows, next_bias(h), normed);
  add_rows(rows, h, normed, x);
}

template <class T>
void check(In<T> x, const std::vector<const Block*>& blocks, In<T> cos, In<T> sin,
           In<std::uint8_t> mask, const std::vector<const KeyValues<T>*>& stores, Index batch,
           Index past, const Out<T>& y) {
  const Index rows = x.rows();
  require(!blocks.empty() && blocks.size() == stores.size(),
          "[blocks] wanted blocks and as many stores, got ", blocks.size(), " and ", stores.size());
  require(batch > 0 && rows % batch == 0 && past >= 0, "[blocks] wanted x of ", batch,
          " sequences alike, after 0 or more tokens, got ", rows, " rows after ", past);
  require(y.rows() == rows && y.cols() == x.cols(), "[blocks] y must be as x, got ", y.rows(),
          " x ", y.cols());
  const Index tokens = rows / batch, keys = past + tokens;
  const bool masked = mask.rows() != 0 || mask.cols() != 0;
  require(!masked || (mask.rows() == rows && mask.cols() == keys), "[blocks] mask must be ", rows,
          " x ", keys, ", got ", mask.rows(), " x ", mask.cols());
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const Block& b = *blocks[i];
    require(x.cols() == b.hidden, "[blocks] x must have ", b.hidden, " columns, got ", x.cols());
    for (const auto& turn : {cos, sin})
      require(!b.settings.rotary ||
                  (turn.cols() == b.width && (turn.rows() == tokens || turn.rows() == rows)),
              "[blocks] cos and sin must be ", tokens, " or ", rows, " x ", b.width, ", got ",
              turn.rows(), " x ", turn.cols());
    const Index least = batch * b.settings.kv_heads * keys;
    require(stores[i]->width == b.width && stores[i]->rows >= least &&
                stores[i]->rows % (batch * b.settings.kv_heads) == 0,
            "[blocks] keys and values must have room for ", least, " rows of ", b.width, ", got ",
            stores[i]->rows, " of ", stores[i]->width);
  }
}

template <class T>
void run(In<T> x, const std::vector<const Block*>& blocks, In<T> cos, In<T> sin,
         In<std::uint8_t> mask, const std::vector<const KeyValues<T>*>& stores, Index batch,
         Index past, Out<T> y) {
  check<T>(x, blocks, cos, sin, mask, stores, batch, past, y);
  const Index rows = x.rows(), h = x.cols();
  if (rows == 0) return;
  Index side = 0, middle = 0;
  for (const Block* b : blocks) {
    side = std::max({side, b->hidden, b->settings.heads * b->width});
    middle = std::max({middle, (b->settings.heads + 2 * b->settings.kv_heads) * b->width,
                       2 * b->inner, b->hidden});
  }
  Buffer<float> memory(rows * (h + side + middle) + 2 * cos.size() + 64);
  float *now = memory.get(), *normed = now + rows * h, *wide = normed + rows * side;
  float *turn = wide + rows * middle, *turned = turn + cos.size();
  for (Index i = 0; i < cos.rows(); ++i) {
    widen_to(cos.data() + i * cos.outerStride(), cos.cols(), turn + i * cos.cols());
    widen_to(sin.data() + i * sin.outerStride(), sin.cols(), turned + i * sin.cols());
  }
  for (Index i = 0; i < rows; ++i) widen_to(x.data() + i * x.outerStride(), h, now + i * h);
  const Call<T> call{batch,
                     rows / batch,
                     past,
                     turn,
                     turned,
                     cos.rows() == rows,
                     mask.size() == 0 ? nullptr : mask.data()};
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    run_block(call, *blocks[i], *stores[i], now, normed, wide);
    for_rows(rows, h, [&](Index row) {
      narrow_to(now + row * h, h, y.data() + row * h);
      if constexpr (!std::is_same_v<T, float>) widen_to(y.data() + row * h, h, now + row * h);
    });
  }
}

}  // namespace

Block::Block(const std::vector<const Packed*>& matrices, InVec<float> gain, InVec<float> bias,
             const BlockSettings& how)
    : settings(how) {
  require(matrices.size() == 7, "[blocks] wanted q, k, v, o, gate, up and down, got ",
          matrices.size(), " matrices");
  inputs = {matrices[0], matrices[1], matrices[2]};
  o = matrices[3];
  gates = {matrices[4], matrices[5]};
  down = matrices[6];
  hidden = o->n;
  inner = down->layout.k;
  const Index heads = how.heads, kv = how.kv_heads, nq = matrices[0]->n, nk = matrices[1]->n;
  require(heads > 0 && kv > 0 && heads % kv == 0 && nq % heads == 0,
          "[blocks] wanted heads that divide ", nq, " rows and are a multiple of those of k, got ",
          heads, " and ", kv);
  width = nq / heads;
  require(!how.rotary || width % 2 == 0, "[blocks] wanted an even width of heads, got ", width);
  const Index rows[] = {nq, kv * width, kv * width, hidden, inner, inner, hidden};
  const Index columns[] = {hidden, hidden, hidden, nq, hidden, hidden, inner};
  for (std::size_t i = 0; i < 7; ++i)
    require(matrices[i]->n == rows[i] && matrices[i]->layout.k == columns[i], "[blocks] matrix ", i,
            " of q, k, v, o, gate, up, down must be ", rows[i], " x ", columns[i], ", got ",
            matrices[i]->n, " x ", matrices[i]->layout.k);
  head_norms = gain.size() == 2 * hidden + 2 * width;
  require(head_norms || gain.size() == 2 * hidden, "[blocks] gains must be ", 2 * hidden, " or ",
          2 * hidden + 2 * width, ", got ", gain.size());
  const Index all = nq + 2 * nk + 2 * hidden + 2 * inner;
  require(bias.size() == 0 || bias.size() == all, "[blocks] biases must be 0 or ", all, ", got ",
          bias.size());
  gains = gain.data();
  biases = bias.size() == 0 ? nullptr : bias.data();
}

void blocks_f32(In<float> x, const std::vector<const Block*>& blocks, In<float> cos, In<float> sin,
                In<std::uint8_t> mask, const std::vector<const KeyValues<float>*>& stores,
                Index batch, Index past, Out<float> y) {
  run<float>(x, blocks, cos, sin, mask, stores, batch, past, y);
}

void blocks_u16(In<std::uint16_t> x, const std::vector<const Block*>& blocks, In<std::uint16_t> cos,
                In<std::uint16_t> sin, In<std::uint8_t> mask,
                const std::vector<const KeyValues<std::uint16_t>*>& stores, Index batch, Index past,
                Out<std::uint16_t> y) {
  run<std::uint16_t>(x, blocks, cos, sin, mask, stores, batch, past, y);
}

}  // namespace bitwright
