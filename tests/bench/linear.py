"""Products of packed weights: decode against a streaming read, prefill against the peak of int8
products in registers, both measured beside them in this process; and torch and onnxruntime.

python tests/bench/linear.py [--seconds 1] [--threads 1] [--shapes 4096x4096 ...] [--only decode]

decode: one token, weights beyond every cache (--gigabytes in turn), GB/s of panel bytes.
prefill: GOP/s, 2 operations per weight and token, activation quantization included. Figures are
minima of time over repeats, `of` what they are measured against in alternation with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from bitwright import ops, schemes
from bitwright.spec import QTensor

SHAPES = ("4096x4096", "11008x4096", "14336x4096", "8192x8192")
SCHEMES = ("int4-g32", "int4-g64", "int4-g128")
PEAK_ROUNDS = 200_000


def fastest(seconds: float, *calls: Callable[[], Any]) -> list[float]:
    """The least seconds of each call, taken in turns so that all see the same machine."""
    best, end = [np.inf] * len(calls), time.perf_counter() + seconds * len(calls)
    rounds = 0
    while time.perf_counter() < end or rounds < 5:
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - begin)
        rounds += 1
    return best


def matrix(n: int, k: int, name: str, seed: int = 0) -> QTensor:
    scheme, rng = schemes.parse(name), np.random.default_rng(seed)
    codes = rng.integers(0, 16, (n, k), np.uint8)
    cells = (n, scheme.groups(k))
    scales = np.full(cells, 2.0**-8, np.float32)
    return QTensor(codes, scales, np.full(cells, 8, np.uint8), scheme)


def peak() -> Callable[[], Any]:
    x = np.zeros((ops.threads(), ops.CHAINS), np.int32)
    return lambda: ops.dot_chain(x, PEAK_ROUNDS, 7, 5)


def peak_operations() -> float:
    return 8.0 * ops.threads() * ops.CHAINS * PEAK_ROUNDS


def decode(shape: tuple[int, int], name: str, gigabytes: float, seconds: float) -> None:
    n, k = shape
    one = ops.pack_linear(matrix(n, k, name))
    count = max(2, int(gigabytes * 1e9 / one.panels.nbytes))
    memory = np.empty(count * one.panels.nbytes, np.uint8)
    pool = memory.reshape(count, *one.panels.shape)
    pool[:] = one.panels
    packed = [ops.PackedMatrix(panels, one.scheme, shape) for panels in pool]
    words = memory[: memory.nbytes // 1024 * 1024].view(np.uint64).reshape(128, -1)
    X = np.random.default_rng(1).standard_normal((1, k)).astype(np.float32)
    calls = [lambda: ops.word_sum(words)]
    for mode in ("fast", "exact"):
        calls.append(lambda mode=mode: [ops.linear(X, w, mode=mode) for w in packed])
    read, *times = fastest(seconds, *calls)
    rate = words.nbytes / read / 1e9
    for mode, t in zip(("fast", "exact"), times, strict=True):
        gb = memory.nbytes / t / 1e9
        each = t / count * 1e6
        print(
            f"decode {n}x{k} {name} {mode}: {gb:.1f} GB/s of {rate:.1f} read, {gb / rate:.0%}; "
            f"{each:.0f} us"
        )


def others(q: QTensor, X: np.ndarray) -> Iterator[tuple[str, Callable[[], Any]]]:
    W, x = torch.from_numpy(q.dequantize()), torch.from_numpy(X)
    yield "torch fp32", lambda: x @ W.T
    half, wide = x.bfloat16(), W.bfloat16()
    yield "torch bf16", lambda: half @ wide.T
    pack = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
    group = q.scheme.columns(q.shape[1])
    if pack is not None:
        weight = pack(torch.from_numpy(q.codes.astype(np.int32)), 1)
        side = torch.stack([torch.from_numpy(q.scales.T), torch.zeros(q.scales.T.shape)], -1)
        side = side.contiguous().bfloat16()
        call = torch.ops.aten._weight_int4pack_mm_for_cpu
        yield "torch int4pack", lambda: call(half, weight, group, side)
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        yield "onnxruntime level 4", onnx_product(q, X)


def onnx_product(q: QTensor, X: np.ndarray) -> Callable[[], Any]:
    """MatMulNBits at accuracy level 4: int8 activations."""
    onnx = importlib.import_module("onnx")
    runtime = importlib.import_module("onnxruntime")
    (n, k), group, helper = q.shape, q.scheme.columns(q.shape[1]), onnx.helper
    low, high = q.codes[:, ::2], q.codes[:, 1::2]
    B = (low | high << 4).reshape(n, k // group, group // 2)
    tensors = [
        onnx.numpy_helper.from_array(np.ascontiguousarray(B), "B"),
        onnx.numpy_helper.from_array(np.ascontiguousarray(q.scales.ravel()), "scales"),
    ]
    options = {"K": k, "N": n, "bits": 4, "block_size": group, "accuracy_level": 4}
    node = helper.make_node(
        "MatMulNBits", ["A", "B", "scales"], ["Y"], domain="com.microsoft", **options
    )
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["t", size])
        for name, size in (("A", k), ("Y", n))
    ]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = ops.threads()
    session = runtime.InferenceSession(model.SerializeToString(), settings)
    return lambda: session.run(None, {"A": X})


def prefill(shape: tuple[int, int], name: str, tokens: int, seconds: float, beside: bool) -> None:
    n, k = shape
    q = matrix(n, k, name)
    packed = ops.pack_linear(q)
    X = np.random.default_rng(1).standard_normal((tokens, k)).astype(np.float32)
    calls: dict[str, Callable[[], Any]] = {
        "fast": lambda: ops.linear(X, packed, mode="fast"),
        "fast, per token": lambda: ops.linear(X, packed, mode="fast", activations="token"),
        "exact": lambda: ops.linear(X, packed),
    }
    if beside:
        calls.update(others(q, X))
    most, *times = fastest(seconds, peak(), *calls.values())
    top = peak_operations() / most / 1e9
    for what, t in zip(calls, times, strict=True):
        rate = 2.0 * tokens * n * k / t / 1e9
        head = f"prefill {n}x{k} {name} M {tokens} {what}"
        print(f"{head}: {rate:.0f} GOP/s, {rate / top:.0%} of {top:.0f}")


def main() -> None:
    """Prints one line per figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--tokens", nargs="+", type=int, default=(4, 16, 64, 512))
    parser.add_argument("--only", choices=("decode", "prefill"))
    parser.add_argument("--alone", action="store_true", help="without torch and onnxruntime")
    a = parser.parse_args()
    torch.set_num_threads(ops.set_threads(a.threads))
    print(f"{ops.isa()}, {ops.threads()} threads, load {os.getloadavg()[0]:.1f}")
    for text in a.shapes:
        n, k = map(int, text.split("x"))
        for name in a.schemes:
            if a.only != "prefill":
                decode((n, k), name, a.gigabytes, a.seconds)
            for tokens in () if a.only == "decode" else a.tokens:
                prefill((n, k), name, tokens, a.seconds, not a.alone)


if __name__ == "__main__":
    main()
