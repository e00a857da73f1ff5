// Views of the caller's memory: the C++ side allocates no Python object and copies no argument.
#pragma once

#include <Eigen/Core>
#include <cstdint>

namespace bitwright {

template <class T>
using RowMajor = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using In = const Eigen::Ref<const RowMajor<T>>&;
template <class T>
using Out = Eigen::Ref<RowMajor<T>>;
template <class T>
using InVec = const Eigen::Ref<const Eigen::Matrix<T, Eigen::Dynamic, 1>>&;
template <class T>
using OutVec = Eigen::Ref<Eigen::Matrix<T, Eigen::Dynamic, 1>>;

using Index = Eigen::Index;
static_assert(sizeof(Index) == 8, "a matrix of a 70B model has more than 2^31 elements");

inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

}  // namespace bitwright
