// Eigen's own products, for `bitwright bench` to compare with: a library of its own, compiled for
// the machine that builds it (-DBITWRIGHT_EIGEN=ON), never part of a wheel and never linked to the
// core, whose Eigen is compiled for the platform's floor.
#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <cstdint>

using Index = std::int64_t;
template <class T>
using RowMajor = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

extern "C" {

__attribute__((visibility("default"))) void eigen_threads(int n) { Eigen::setNbThreads(n); }

__attribute__((visibility("default"))) const char* eigen_simd() {
  return Eigen::SimdInstructionSetsInUse();
}

// h (k, k), upper triangle, += x^T x, x (t, k).
__attribute__((visibility("default"))) void eigen_gram(Index t, Index k, const float* x, float* h) {
  const Eigen::Map<const RowMajor<float>> in(x, t, k);
  Eigen::Map<RowMajor<float>> out(h, k, k);
  out.selfadjointView<Eigen::Upper>().rankUpdate(in.transpose());
}

// c (n, k) = a (n, t) b (t, k).
__attribute__((visibility("default"))) void eigen_product(Index n, Index t, Index k, const float* a,
                                                          const float* b, float* c) {
  const Eigen::Map<const RowMajor<float>> left(a, n, t), right(b, t, k);
  Eigen::Map<RowMajor<float>> out(c, n, k);
  out.noalias() = left * right;
}

// h (k, k) becomes its Cholesky factor, in place. 0: not positive definite.
__attribute__((visibility("default"))) int eigen_cholesky(Index k, double* h) {
  Eigen::Map<Eigen::MatrixXd> in(h, k, k);
  const Eigen::LLT<Eigen::Ref<Eigen::MatrixXd>> done(in);
  return done.info() == Eigen::Success ? 1 : 0;
}
}
