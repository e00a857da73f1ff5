"""pytest-benchmark over the contests of `bitwright bench`, to keep a history of them.

python -m pytest tests/bench/bench_ops.py --benchmark-autosave       compares: --benchmark-compare
"""

from __future__ import annotations

import pytest

from bitwright.bench import contests
from bitwright.bench.contests import OURS, Rivals

K = 2048


@pytest.fixture(scope="module")
def found():
    return {contest.op: contest for contest in contests.of(K, Rivals(None, None, None))}


@pytest.mark.parametrize("op", contests.NAMES)
def test_speed(benchmark, found, op):
    contest = found[op]
    benchmark.extra_info.update(shape=contest.shape, work=contest.work, unit=contest.unit)
    benchmark.pedantic(contest.contenders[OURS](), rounds=3, warmup_rounds=1)
