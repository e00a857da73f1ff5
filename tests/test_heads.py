"""Rows of q and k solved under what attention multiplies them with."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import bitwright
import tiny_models
from bitwright import archs, ops, schemes, solving
from bitwright.calib.heads import heads_of
from bitwright.calib.skeleton import Skeleton
from bitwright.demo import embedded_model
from bitwright.estimate import Estimate
from bitwright.files.checkpoint import Checkpoint
from bitwright.hessian import heads as coupling
from bitwright.job import open_job
from bitwright.sizes import Sizes
from bitwright.solvers import gptq
from bitwright.spec import Heads, Held, InputError, QTensor, Recipe
from bitwright.spool import Spool
from problems import hessian, rng, stats, weights

QUERIES, KEYS, WIDTH, REACH = 6, 2, 16, 64
TURNS = 10000.0 ** (-np.arange(WIDTH // 2) / (WIDTH // 2))
HEADS = Heads(QUERIES, KEYS, WIDTH, TURNS, REACH)
K = 48
H = hessian(K)
W_Q, W_K = weights(QUERIES * WIDTH, K, "q"), weights(KEYS * WIDTH, K, "k")


def turn(position: int) -> np.ndarray:
    """Transformers' rotary turn at a position as a matrix (width, width)."""
    angles = torch.from_numpy(np.concatenate([TURNS, TURNS]) * position)[None, None]
    basis = torch.eye(WIDTH, dtype=torch.float64)[None, None]
    turned, _ = apply_rotary_pos_emb(basis, basis, angles.cos(), angles.sin())
    return turned[0, 0].numpy().T


def distances() -> list[int]:
    return [*coupling.NEAR, *(i * REACH // (coupling.FAR + 2) for i in range(1, 15))]


def test_an_error_of_q_costs_what_the_scores_lose():
    """Mean of ((turn(t) E x) . (turn(s) W_k y))^2 over x, y of Gram H and over the distances."""
    M = coupling.metrics(HEADS, "attn.q", W_K, H)
    E = weights(WIDTH, K, "e").astype(np.float64)
    for head in range(QUERIES):
        W = W_K.reshape(KEYS, WIDTH, K)[head // (QUERIES // KEYS)].astype(np.float64)
        want = 0.0
        for d in distances():
            F = E.T @ turn(40 + d).T @ turn(40) @ W
            want += np.trace(F @ H @ F.T @ H)
        got = np.trace(M[head] @ E @ H @ E.T)
        assert got == pytest.approx(want / len(distances()), rel=1e-5)


def test_an_error_of_k_costs_what_the_scores_of_all_its_queries_lose():
    M = coupling.metrics(HEADS, "attn.k", W_Q, H)
    E = weights(WIDTH, K, "e").astype(np.float64)
    per = QUERIES // KEYS
    for head in range(KEYS):
        want = 0.0
        for one in range(head * per, (head + 1) * per):
            W = W_Q.reshape(QUERIES, WIDTH, K)[one].astype(np.float64)
            for d in distances():
                F = W.T @ turn(40 + d).T @ turn(40) @ E
                want += np.trace(F @ H @ F.T @ H)
        got = np.trace(M[head] @ E @ H @ E.T)
        assert got == pytest.approx(want / per / len(distances()), rel=1e-5)


def test_dimensions_that_are_not_turned_stay():
    """Part of a head turned, and nothing of it."""
    still = Heads(QUERIES, KEYS, WIDTH, np.zeros(WIDTH // 2), REACH)
    part = Heads(QUERIES, KEYS, WIDTH, TURNS[:4], REACH)
    A = W_K.reshape(KEYS, WIDTH, K).astype(np.float64)
    A = np.repeat(A @ H @ A.swapaxes(1, 2), QUERIES // KEYS, 0)
    got = coupling.metrics(still, "attn.q", W_K, H)
    assert np.allclose(got, A, rtol=1e-5, atol=1e-6 * A.max())
    got = coupling.metrics(part, "attn.q", W_K, H)
    assert np.allclose(got[:, 8:, 8:], A[:, 8:, 8:], rtol=1e-5, atol=1e-6 * A.max())
    assert not np.allclose(got[:, :8, :8], A[:, :8, :8], rtol=1e-2)


def objective(W: np.ndarray, q: QTensor, M: np.ndarray) -> float:
    E = (W - q.dequantize()).reshape(len(M), -1, K).astype(np.float64)
    return sum(float(np.trace(m @ e @ H @ e.T)) for m, e in zip(M, E, strict=True))


NAMES = ["int3-g16", "int4-g16-asym", "int4-channel", "nf4-g16", "mxfp4", "nvfp4"]
NAMES += ["int4-g16-offset-fp16-2x6"]


@pytest.mark.parametrize("name", NAMES)
def test_coupled_rows_lower_what_the_scores_lose(name):
    M = coupling.metrics(HEADS, "attn.q", W_K, H)
    s = schemes.parse(name)
    alone, before = gptq.solve(W_Q, stats(H), s, alpha=0.0)
    q, report = gptq.solve_in_turn([W_Q], [M], stats(H), s, alpha=0.0)[0]
    assert (before.coupled, report.coupled) == (False, True)
    assert objective(W_Q, q, M) < 0.98 * objective(W_Q, alone, M)
    assert report.error >= before.error * 0.98
    assert report.error_swept is None
    want = ops.quadratic(W_Q - q.dequantize(), H) / ops.quadratic(W_Q, H)
    assert report.error == pytest.approx(want, rel=1e-6)


def test_each_row_is_solved_for_its_target():
    """Against the recursion written out; row b of a head feeds every later row of that head."""
    M = coupling.metrics(HEADS, "attn.k", W_Q, H)
    seen: list[np.ndarray] = []

    def solve(rows: np.ndarray) -> QTensor:
        seen.append(rows.copy())
        return gptq.solve(rows, stats(H), schemes.parse("int3-g16"), alpha=0.0, refine="")[0]

    q = coupling.coupled(W_K, M, solve)
    E = (W_K - q.dequantize()).reshape(KEYS, WIDTH, K).astype(np.float64)
    for head, m in enumerate(M):
        damped = m + coupling.DAMPING * m.diagonal().mean() * np.eye(WIDTH)
        S = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        assert np.allclose(S, np.triu(S))
        for a in range(WIDTH):
            want = W_K.reshape(KEYS, WIDTH, K)[head, a] + (S[:a, a] / S[a, a]) @ E[head, :a]
            assert np.allclose(seen[a][head], want, atol=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "int4-tensor"])
@pytest.mark.parametrize("alpha", [0.0, "auto", 0.25])  # the last with an H that has no factor
def test_matrices_solved_at_once_are_those_solved_alone(name, alpha):
    """Reports too; scales of a whole matrix, shares of the drift and fallbacks are each its own."""
    bad = np.eye(K) - 1e6 * np.eye(K)[::-1]
    scheme, given = schemes.parse(name), stats(bad if alpha == 0.25 else H)
    C = 0.3 * H * np.sign(rng("drift").standard_normal((K, K)))
    held = Held(0.5 * H, 0.2 * C, 0.4)
    given = replace(given, C=C, held=held) if alpha == "auto" else given
    matrices = [W_Q, 3.0 * W_K]
    metrics = [coupling.metrics(HEADS, "attn.q", W_K, H), coupling.metrics(HEADS, "attn.k", W_Q, H)]
    options = {"alpha": alpha, "refine": "ccl"}
    both = gptq.solve_in_turn(matrices, metrics, given, scheme, **options)
    for W, M, (q, report) in zip(matrices, metrics, both, strict=True):
        alone, told = gptq.solve_in_turn([W], [M], given, scheme, **options)[0]
        assert q.global_scale == alone.global_scale
        for field in ("codes", "scales", "zeros", "steps"):
            assert np.array_equal(getattr(q, field), getattr(alone, field))
        assert report == told
        assert bool(report.fallback) == (alpha == 0.25) == (not report.coupled)


def test_one_h_for_rows_in_turn():
    M = np.repeat(np.eye(WIDTH)[None], QUERIES, 0)
    two = replace(stats(H), H=np.stack([H, H]))
    with pytest.raises(InputError, match="wanted one H for rows in turn, got 2"):
        gptq.solve_in_turn([W_Q], [M], two, schemes.parse("int4-g16"))


def test_heads_that_nothing_couples_are_solved_as_ever():
    M = np.repeat(np.eye(WIDTH)[None] * 3.0, QUERIES, 0)
    s = schemes.parse("int3-g16")
    alone, _ = gptq.solve(W_Q, stats(H), s, alpha=0.0)
    q, _ = gptq.solve_in_turn([W_Q], [M], stats(H), s, alpha=0.0)[0]
    assert np.array_equal(q.codes, alone.codes)
    assert np.array_equal(q.scales, alone.scales)


@pytest.mark.parametrize("threads", [2, 3])
def test_same_bits_for_every_thread_count(threads):
    def run() -> tuple[bytes, bytes]:
        M = coupling.metrics(HEADS, "attn.q", W_K, H)
        q, _ = gptq.solve_in_turn([W_Q], [M], stats(H), schemes.parse("int3-g16"))[0]
        return M.tobytes(), q.codes.tobytes() + q.scales.tobytes()

    before = ops.threads()
    try:
        ops.set_threads(1)
        want = run()
        ops.set_threads(threads)
        assert run() == want
    finally:
        ops.set_threads(before)


@pytest.mark.parametrize("seed", range(2))
def test_no_nan_leaves_it(seed):
    """A dead partner, then a huge row; a dead column each time."""
    draw = rng("heads", seed)
    W, partner = W_Q.copy(), W_K.copy()
    partner[:] = 0 if seed == 0 else partner
    W[3] *= 1e6 if seed == 1 else 1.0
    bad = H.copy()
    column = int(draw.integers(K))
    bad[column] = bad[:, column] = 0.0
    M = coupling.metrics(HEADS, "attn.q", partner, bad)
    q, report = gptq.solve_in_turn([W], [M], stats(bad), schemes.parse("int4-g16"))[0]
    assert np.isfinite(q.dequantize()).all()
    assert math.isfinite(report.error)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llama", None),
        ("mistral", None),
        ("smollm3", None),
        ("qwen2", "biases"),
        ("qwen3", "norms"),
        ("gpt2", "not declared"),
        ("phi3", "not declared"),
    ],
)
def test_what_is_known_of_a_models_heads(name, why):
    model = tiny_models.make(name)
    known = tiny_models.weights(model)
    body = Skeleton(model.config, known.__getitem__, known)
    arch = archs.find({**model.config.to_dict(), "architectures": [type(model).__name__]})
    found = heads_of(body, 0, arch, 16)
    if why is not None:
        assert why in found
        return
    assert (found.queries, found.keys, found.width, found.reach) == (4, 2, 8, 16)
    want = model.model.rotary_emb.inv_freq.double().numpy()
    flags = [getattr(body.blocks[i].self_attn, "use_rope", True) for i in range(body.count)]
    for i, flag in enumerate(flags):
        turns = heads_of(body, i, arch, 16).turns
        assert np.array_equal(turns, want if flag else np.zeros_like(want))
    assert all(flags) == (name != "smollm3")


def test_a_run_says_which_rows_were_coupled(tmp_path):
    small = {"scheme": "int4-g64", "samples": 4, "length": 64}
    report = bitwright.quantize(embedded_model(), out=tmp_path / "a", **small)
    coupled = {linear.name.rpartition(".")[2] for linear in report.linears if linear.coupled}
    assert coupled == {"q_proj", "k_proj"}
    assert "rows of q and k coupled" in report.solver()
    off = bitwright.quantize(
        embedded_model(), out=tmp_path / "b", **small, options={"coupled": False}
    )
    assert not any(linear.coupled for linear in off.linears)
    fast = bitwright.quantize(embedded_model(), out=tmp_path / "c", **small, effort="fast")
    assert not any(linear.coupled for linear in fast.linears)
    source = tiny_models.save(tiny_models.make("qwen3"), tmp_path / "qwen3")
    ids = np.random.default_rng(0).integers(3, tiny_models.VOCAB, (4, 16))
    small = {"scheme": "int4-g16", "calibration": ids}
    told = bitwright.quantize(source, out=tmp_path / "d", **small)
    assert not any(linear.coupled for linear in told.linears)
    assert any("rows of q and k are solved one by one: norms" in note for note in told.notes)


def test_q_and_k_of_a_run_are_solved_at_once(tmp_path, monkeypatch):
    """The same bits as one after the other, and as k alone where q is finished already."""
    small = {"scheme": "int4-g64", "samples": 4, "length": 64}
    turns, solve, save = [], gptq.solve_in_turn, Spool.save
    monkeypatch.setattr(
        gptq, "solve_in_turn", lambda W, *a, **o: turns.append(len(W)) or solve(W, *a, **o)
    )

    def result(name, **more):
        bitwright.quantize(embedded_model(), out=tmp_path / name, **small, **more)
        files = ("model.safetensors", "bitwright-report.json")
        return [(tmp_path / name / file).read_bytes() for file in files]

    want = result("a")
    blocks = len(turns)
    assert turns == [2] * blocks
    turns.clear()
    with monkeypatch.context() as patch:
        patch.setattr(solving.BlockSolver, "_together", lambda _self, _group, one, _stats: [one])
        assert result("b") == want
    assert turns == [1] * 2 * blocks

    def stopped(spool, name, done):
        if name.endswith("k_proj"):
            raise KeyboardInterrupt
        save(spool, name, done)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            result("c", work=tmp_path / "work")
    turns.clear()
    assert result("c", work=tmp_path / "work") == want
    assert turns == [1] + [2] * (blocks - 1)
    monkeypatch.undo()
    mixed = [{"pattern": "*.k_proj", "bits": 8}]
    report = bitwright.quantize(embedded_model(), out=tmp_path / "d", **small, overrides=mixed)
    assert {x.name.rpartition(".")[2] for x in report.linears if x.coupled} == {"q_proj", "k_proj"}


def test_column_scales_change_nothing_of_what_couples():
    """A = W_k H W_k^T is the same for W_k diag(s) and H / (s s^T), which AWQ makes of them."""
    s = np.exp(rng("scales").standard_normal(K)).astype(np.float32)
    M = coupling.metrics(HEADS, "attn.q", W_K, H)
    scaled = coupling.metrics(HEADS, "attn.q", W_K * s, H / np.outer(s, s))
    assert np.allclose(M, scaled, rtol=1e-4, atol=1e-5 * M.max())


def test_awq_couples_what_it_has_scaled(tmp_path):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        whole = coupling.metrics
        patch.setattr(
            "bitwright.solving.metrics",
            lambda heads, role, partner, H: (
                seen.append((role, partner, H)) or whole(heads, role, partner, H)
            ),
        )
        report = bitwright.quantize(
            embedded_model(), out=tmp_path / "out", scheme="int4-g64", samples=4, length=64,
            method="awq+gptq",
        )  # fmt: skip
    assert {x.name.rpartition(".")[2] for x in report.linears if x.coupled} == {"q_proj", "k_proj"}
    assert {x.awq for x in report.linears if x.coupled} != {None}
    stored = Checkpoint(embedded_model()).read("model.layers.0.self_attn.k_proj.weight")
    assert seen[0][0] == "attn.q"
    assert np.array_equal(seen[0][1], stored.astype(np.float32))


@pytest.mark.parametrize(("threads", "panel", "rows"), [(1, 8, 16), (2, 8, 16), (2, 48, 96)])
def test_the_plan_counts_panels_in_turns(threads, panel, rows, monkeypatch):
    """12 heads of q and k together: two panels of 8 rows, one of 48 and one thread idle."""
    monkeypatch.setattr(ops, "panel_rows", lambda turn: panel if turn == 12 else None)
    job = open_job(embedded_model(), Recipe(), threads=threads)
    heads = job.heads(0)
    assert (heads.queries, heads.keys, heads.width) == (8, 4, 32)
    estimate = Estimate(job, Sizes(job), rerun=False)
    found = {t.linear.roles[0]: estimate._rows(0, t) for t in job.targets.values()}
    assert found["attn.q"] == math.ceil(256 * rows / 12)
    assert found["attn.k"] == math.ceil(128 * rows / 12)
    assert found["attn.v"] == 128
    tensor = open_job(embedded_model(), Recipe(scheme="int4-tensor"), threads=threads)
    monkeypatch.setattr(ops, "panel_rows", {8: 8, 4: 4}.get)
    estimate = Estimate(tensor, Sizes(tensor), rerun=False)
    for name, busy in (("q_proj", 256), ("k_proj", 128)):
        target = tensor.targets[f"model.layers.0.self_attn.{name}"]
        assert estimate._rows(0, target) == busy * threads
    alone = open_job(embedded_model(), Recipe(effort="fast"), threads=threads)
    target = alone.targets["model.layers.0.self_attn.q_proj"]
    assert Estimate(alone, Sizes(alone), rerun=False)._rows(0, target) == 256


def test_a_partner_kept_in_float_still_couples(tmp_path):
    report = bitwright.quantize(
        embedded_model(),
        out=tmp_path / "out",
        scheme="int4-g64",
        samples=4,
        length=64,
        overrides=[{"pattern": "*.k_proj", "skip": True}],
    )
    assert {x.name.rpartition(".")[2] for x in report.linears if x.coupled} == {"q_proj"}


def test_a_wish_that_is_none_is_refused():
    with pytest.raises(InputError, match="coupled must be true or false, got 'yes'"):
        bitwright.quantize(embedded_model(), out="x", options={"coupled": "yes"})
