// pack, unpack, encode, decode and fit over every bit width and odd shapes.
#include <cmath>

#include "check.h"

namespace bitwright_tests {

namespace {

void round_trip(Index rows, Index k, int bits) {
  const RowMajor<std::uint8_t> codes = random_codes(rows, k, bits, unsigned(rows + k));
  const RowMajor<std::uint32_t> words = for_every_thread_count([&] {
    RowMajor<std::uint32_t> out(rows, ceil_div(k * bits, 32));
    pack(codes, bits, out);
    return out;
  });
  bool bits_agree = true;
  for (Index i = 0; i < k * bits; ++i)
    bits_agree = bits_agree && (words(rows - 1, i / 32) >> (i % 32) & 1U) ==
                                   (unsigned(codes(rows - 1, i / bits)) >> (i % bits) & 1U);
  CHECK(bits_agree);
  RowMajor<std::uint8_t> back(rows, k);
  unpack(words, bits, back);
  CHECK(back == codes);
}

void refusals() {
  RowMajor<std::uint8_t> codes = RowMajor<std::uint8_t>::Constant(300, 40, 15);
  RowMajor<std::uint32_t> words(300, 5), narrow(300, 4);
  for (int threads = 1; threads <= 3; ++threads) {
    thread_count().store(threads);
    codes(150, 7) = 16;
    CHECK(contains(refusal([&] { pack(codes, 4, words); }), "code 16 at (150, 7) does not fit"));
    codes(150, 7) = 15;
    CHECK(refusal([&] { pack(codes, 4, words); }).empty());
  }
  CHECK(contains(refusal([&] { pack(codes, 4, narrow); }), "words must be 300 x 5"));
  CHECK(contains(refusal([&] { unpack(narrow, 4, codes); }), "words must be 300 x 5"));
  CHECK(contains(refusal([&] { unpack(words, 9, codes); }), "bits must be 1 to 8, got 9"));
}

void fit_and_round(const Size& size, int bits, bool symmetric, bool search) {
  RowMajor<float> w = normal(size.n, size.k, unsigned(bits), 0.05F);
  w.row(size.n / 2).setZero();
  const Index groups = ceil_div(size.k, size.group);
  FitSettings settings{{bits, {}, {}}, size.group, symmetric,          0,
                       "bf16",         1.0F,       search ? 2.4 : 2.0, search};
  Vector<float> factors(3), weight = Vector<float>::Ones(search ? size.k : 0);
  factors << 1.0F, 0.9F, 0.8F;
  RowMajor<std::uint8_t> codes(size.n, size.k);
  RowMajor<float> zeros(size.n, groups);
  const RowMajor<float> none(size.n, 0), scales = for_every_thread_count([&] {
                                           RowMajor<float> out(size.n, groups);
                                           fit(w, weight, settings, factors, none, out, zeros);
                                           return out;
                                         });
  encode(w, scales, zeros, size.group, {bits, {}, {}}, codes);
  RowMajor<float> values(size.n, size.k);
  decode(codes, scales, zeros, size.group, {}, values);
  CHECK((scales.array() >= 0x1p-14F).all() && values.allFinite());
  CHECK((codes.array() < (1 << bits)).all() || bits == 8);
  CHECK(values.row(size.n / 2).isZero(0.0F));
  bool near = true;  // half a step; bf16 scales move the end of the range by 2^-9 of it
  for (Index i = 0; i < size.n; ++i)
    for (Index j = 0; j < size.k; ++j)
      near = near && std::abs(w(i, j) - values(i, j)) <=
                         scales(i, j / size.group) * (0.5F + float(1 << bits) * 0x1p-8F);
  CHECK(near || search || bits == 1);
}

}  // namespace

void codes() {
  for (int bits = 1; bits <= 8; ++bits) {
    for (const Size& size : kSizes) round_trip(size.n, size.k, bits);
    round_trip(130, 33, bits);
    round_trip(3, 64, bits);
  }
  refusals();
}

void scales() {
  for (const Size& size : kSizes)
    for (int bits = 1; bits <= 8; ++bits)
      for (const bool symmetric : {true, false})
        for (const bool search : {false, true}) fit_and_round(size, bits, symmetric, search);
  const RowMajor<float> w = RowMajor<float>::Constant(2, 8, std::nanf(""));
  RowMajor<float> s = RowMajor<float>::Ones(2, 1), z = RowMajor<float>::Zero(2, 1), none(2, 0);
  RowMajor<std::uint8_t> c(2, 8);
  CHECK(contains(refusal([&] { encode(w, s, z, 8, {4, {}, {}}, c); }), "W must not be NaN"));
  CHECK(contains(refusal([&] { fit(w, kNone, {{4, {}, {}}, 8}, kNone, none, s, z); }),
                 "W must be finite"));
  CHECK(
      contains(refusal([&] { encode(w, s, z, 4, {4, {}, {}}, c); }), "must be 2 x 2 for a 2 x 8"));
}

}  // namespace bitwright_tests
