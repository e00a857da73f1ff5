"""Same bits: every op gives the same bytes for every thread count and for all levels with FMA (of
float32 and fp16; sums over bf16 inputs are those of the machine's bf16 product where it has one).

A level is chosen once per process, so each runs in its own: digests are compared, and the twin
tests are repeated at the base level, which has no FMA on x86-64. The lists of ops in csrc/ops.h,
bind.cpp, bitwright.ops and tests/ref agree, so that no op goes untested.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import test_block as block
from bitwright import ops, schemes
from bitwright.spec import QTensor
from problems import (
    as_words,
    groups_together,
    hessian,
    inputs,
    random_codes,
    rng,
    scheme,
    threads,
    weights,
)

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
SAME = ("avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx")


def stripped(name: str) -> str:
    return re.sub(r"_(f32|f64|u16|u32|bf16)$", "", name)


def declared() -> set[str]:
    """The functions of ops.h, one word per op: gram_f32 and gram_u16 are the op gram."""
    text = (CSRC / "ops.h").read_text()
    return {stripped(name) for name in re.findall(r"^(?:void|bool|double) (\w+)\(", text, re.M)}


def bound() -> dict[str, tuple[str, str]]:
    """Python name -> C++ name and the rest of its `def` in bind.cpp."""
    text = (CSRC / "bind.cpp").read_text()
    found = re.findall(r'm\.def\("(\w+)",\s*&(\w+)(.*?)\);', text, re.S)
    return {name: (target, rest) for name, target, rest in found if name != "levels"}


def called() -> dict[str, set[str]]:
    """Function of bitwright.ops -> functions of _core in its body."""
    trees = [ast.parse(path.read_text()) for path in Path(ops.__file__).parent.glob("*.py")]
    found = {}
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        attributes = (node for node in ast.walk(function) if isinstance(node, ast.Attribute))
        names = {a.attr for a in attributes if getattr(a.value, "id", "") == "_core"}
        found[function.name] = names & set(bound())
    return {name: names for name, names in found.items() if names}


def twins() -> list[Path]:
    return sorted(p for p in (TESTS / "ref").glob("*.py") if p.stem != "__init__")


def test_lists_of_ops_agree() -> None:
    assert declared() == {stripped(name) for name in bound()}
    assert declared() == set(called()) == {path.stem for path in twins()} == set(CASES)
    assert {name for names in called().values() for name in names} == set(bound())
    assert all({stripped(n) for n in names} == {op} for op, names in called().items())


def test_every_op_is_bound_by_its_name_and_without_the_gil() -> None:
    for name, (target, rest) in bound().items():
        assert name == target
        assert rest.rstrip().endswith("Free()"), f"{name} keeps the GIL"


@pytest.mark.parametrize("path", twins(), ids=lambda p: p.stem)
def test_twins_are_short_and_know_only_numpy(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert path.stem in functions
    assert all((f.end_lineno or 0) - f.lineno < 30 for f in functions.values())
    nodes = list(ast.walk(tree))
    imported = {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= {"numpy", "ml_dtypes", "ref"}


N, K, T, GROUP = 211, 403, 700, 64


@functools.cache
def problem(bits: int = 4) -> tuple[Any, ...]:
    """W, H and its factor: several tasks of every op, nothing a multiple of anything."""
    s, W, H = scheme(bits, GROUP, symmetric=False), weights(N, K), hessian(K)
    return s, W, H, rng("order").permutation(K).astype(np.int32)


def run_pack() -> list[Any]:
    codes = [rng("pack").integers(0, 2**b, (N, K), dtype=np.uint8) for b in range(1, 9)]
    return [ops.pack(c, b) for b, c in enumerate(codes, 1)]


def run_unpack() -> list[Any]:
    return [ops.unpack(w, b, K) for b, w in enumerate(run_pack(), 1)]


def run_fit() -> list[Any]:
    s, W, H, _ = problem()
    weight = H.diagonal().astype(np.float32)
    searched = [ops.fit(W, s, weight, search=True, power=power) for power in (2.0, 2.4)]
    return [*ops.fit(W, scheme(3, -1)), *searched[0], *searched[1]]


def run_round_pack() -> list[Any]:
    s, W, _, _ = problem()
    kinds = (W, W.astype(np.float16), W.astype(ops.BFLOAT16))
    return [
        x for part in kinds for kind in (s, scheme(3, GROUP)) for x in ops.round_pack(part, kind)
    ]


def run_encode() -> list[Any]:
    s, W, _, _ = problem()
    return [ops.encode(W, *ops.fit(W, s), s).codes]


def run_decode() -> list[Any]:
    return [ops.decode(QTensor(*random_codes(N, K, problem()[0]), problem()[0]))]


def run_gram() -> list[Any]:
    X, sums = inputs(T, K), np.zeros((2, K, K))
    ops.gram(X, sums[0])
    ops.gram(X.astype(np.float16), sums[1])
    return [np.triu(sums[0]), np.triu(sums[1])]


def run_mirror() -> list[Any]:
    H = np.triu(problem()[2])
    ops.mirror(H)
    return [H]


def run_column_stats() -> list[Any]:
    X = inputs(9, 2100).astype(np.float16)
    sums = [np.zeros(2100), *np.zeros((3, 2100), np.float32)]
    ops.column_stats(X, *sums)
    return sums


def run_factor() -> list[Any]:
    _, _, H, order = problem()
    return [ops.factor(H, 0.01, order, rng("dead").random(K) < 0.05)[0]]


def run_gptq() -> list[Any]:
    s, W, _, order = problem()
    q, loss = ops.gptq(W, run_factor()[0], order, *ops.fit(W, s, search=True), s)
    return [q.codes, loss]


def run_gptq_search() -> list[Any]:
    results = []
    two = replace(problem()[0], scale="fp16", offset=True, block=2, scale_bits=6)
    for s, negative in ((problem()[0], False), (scheme(4, GROUP), True), (two, False)):
        _, W, H, _ = problem()
        order = groups_together(K, GROUP)
        R, _, _ = ops.factor(H, 0.01, order)
        q, loss = ops.gptq_search(W, R, order, s, negative=negative)
        results += [q.codes, q.scales, q.zeros, loss]
    return results


def run_refine() -> list[Any]:
    results = []
    s, W, H, _ = problem()
    two = replace(s, scale="fp16", offset=True, block=2, scale_bits=6)
    for kind in (s, two):
        start = ops.encode(W, *ops.fit(W, kind), kind)
        q, loss = ops.refine(W, H, start, 0.01, rng("dead").random(K) < 0.05)
        results += [q.codes, q.scales, q.zeros, loss]
    return [*results, q.steps]


def run_drift() -> list[Any]:
    _, W, H, order = problem()
    return [ops.drift(W, hessian(K, "other"), ops.factor(H, 0.01, order)[0], order)]


def run_cross() -> list[Any]:
    sums = np.zeros((2, K, K))
    ops.cross(inputs(T, K, 1), inputs(T, K), sums[0])
    ops.cross(inputs(T, K, 1).astype(np.float16), inputs(T, K).astype(np.float16), sums[1])
    wide = np.zeros((K + 9, K))
    ops.cross(inputs(T, K + 9, 1), inputs(T, K), wide, inputs(T, K + 9, 2))
    return [sums, wide]


def run_quadratic() -> list[Any]:
    return [np.array(ops.quadratic(problem()[1], problem()[2]))]


def run_awq_scale() -> list[Any]:
    s, W, H, _ = problem()
    return [ops.awq_scale(W, H, rng("awq").uniform(0.5, 2, (3, K)).astype(np.float32), s)]


def run_awq_clip() -> list[Any]:
    s, W, H, _ = problem()
    return [*ops.awq_clip(W, H, s)]


def run_qlinear() -> list[Any]:
    return [ops.qlinear(inputs(13, K), QTensor(*random_codes(N, K, problem()[0]), problem()[0]))]


def run_chain() -> list[Any]:
    x = rng("chain").standard_normal((5, 768))
    return [ops.chain(x, 9, 0.7, 0.1), ops.chain(x.astype(np.float32), 9, 0.7, 0.1)]


def run_word_sum() -> list[Any]:
    return [ops.word_sum(rng("words").integers(0, 2**64, (5, 1003), np.uint64))]


def run_dot_chain() -> list[Any]:
    x = rng("dot_chain").integers(-9, 9, (5, 768), np.int32)
    return [ops.dot_chain(x, 9, 15, -127)]


def packed_matrices(words: bool = False) -> list[ops.PackedMatrix]:
    names = (
        "int2-g32",
        "int3-g64-asym",
        "int4-g64-asym",
        "int4-g64-offset",
        "int8-channel",
        "nf4-g64",
    )
    kinds = [schemes.parse(name) for name in names]
    given = [QTensor(*random_codes(N, K, s), s) for s in kinds]
    if not words:
        return [ops.pack_linear(q) for q in given]
    return [ops.pack_linear(as_words(q)) for q in given]


def run_pack_linear() -> list[Any]:
    return [packed.panels for words in (False, True) for packed in packed_matrices(words)]


def run_unpack_linear() -> list[Any]:
    back = [ops.unpack_linear(packed) for packed in packed_matrices()]
    return [x for q in back for x in (q.codes, q.scales, q.zeros)]


def run_linear() -> list[Any]:
    packed, results = packed_matrices(), []
    for t in (1, 3, 30):
        results += ops.linear(inputs(t, K), packed)
        for activations in ("group", "token"):
            results += ops.linear(inputs(t, K), packed, mode="fast", activations=activations)
    return results


def run_blocks() -> list[Any]:
    results = []
    for mode, dtype in (("exact", np.float32), ("fast", np.float32), ("fast", ops.BFLOAT16)):
        for shape in block.SHAPES:
            case, t = block.Case(shape, mode), 23
            x = inputs(t, shape.hidden).astype(dtype)
            turns = (one.astype(dtype) for one in block.turns(shape.width, 0, t))
            arrays, kept = block.store(shape, 1, t, dtype)
            results += [ops.blocks(x, [case.block], *turns, [kept]), *arrays]
    return results


def run_head() -> list[Any]:
    W = weights(N, K).astype(ops.BFLOAT16)
    return [ops.head(inputs(t, K).astype(kind), W) for t in (1, 3) for kind in ("f4", ops.BFLOAT16)]


CASES: dict[str, Callable[[], list[Any]]] = {
    name.removeprefix("run_"): run for name, run in globals().items() if name.startswith("run_")
}


def digests() -> dict[str, str]:
    """SHA-256 of the results of every op."""
    return {
        op: hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in run())).hexdigest()
        for op, run in CASES.items()
    }


def at_level(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BITWRIGHT_ISA": isa}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False
    )


@functools.cache
def digests_at(isa: str) -> dict[str, str]:
    code = "import json, test_levels as t; print(json.dumps([t.ops.isa(), t.digests()]))"
    done = at_level(isa, "-c", code)
    assert done.returncode == 0, done.stderr
    used, found = json.loads(done.stdout)
    assert used == isa
    return dict(found)


@pytest.mark.parametrize("n", [2, 3])
def test_same_bytes_for_every_thread_count(n: int) -> None:
    with threads(1):
        want = digests()
    with threads(n):
        assert digests() == want


def test_same_bytes_for_every_level_with_fma() -> None:
    here = [isa for isa in SAME if isa in ops.levels()]
    if len(here) < 2:
        pytest.skip(f"this machine has no two of {', '.join(SAME)}: nothing to compare")
    assert all(digests_at(isa) == digests_at(here[0]) for isa in here[1:])


def test_base_level_equals_its_twins() -> None:
    if ops.isa() == "base":
        pytest.skip("the tests of this process run at the base level already")
    tests = (
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "test_ops.py",
        "test_sums.py",
        "test_scales.py",
        "test_linear.py",
        "-k",
        "twin",
    )
    done = at_level("base", *tests)
    assert done.returncode == 0, done.stdout[-4000:]


def test_unknown_level_is_refused_with_the_list() -> None:
    done = at_level("avx3", "-c", "from bitwright import ops; ops.isa()")
    assert f"must be one of {', '.join(ops.levels())} on this machine, got avx3" in done.stderr
