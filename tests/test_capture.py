"""Blocks run outside the model, parked, solved and resumed, against transformers' own forward.

Everything here is bit for bit: hidden states, logits, and the inputs that reach the statistics.
"""

from __future__ import annotations

import gc

import ml_dtypes
import numpy as np
import pytest
import torch
from greenlet import greenlet
from transformers import AutoModelForCausalLM

import tiny_models
from bitwright import archs
from bitwright.calib import attention
from bitwright.calib.capture import Capture
from bitwright.calib.discover import discover
from bitwright.calib.memory import parked_bytes
from bitwright.calib.skeleton import Skeleton
from bitwright.spec import InputError, RefusedError
from captures import Keeper, plain, quantize, rounded, same, skeleton, swap_in


def test_blocks_and_head_equal_the_models_own_forward(case):
    model, arch = case
    ids = tiny_models.batches()
    after, logits, _ = plain(model, arch, ids)
    body = skeleton(model)
    hidden = [body.embed(batch) for batch in ids]
    for i in range(body.count):
        with body.block(i):
            hidden = [body.forward_block(i, h) for h in hidden]
        assert same(hidden, after[i])
    assert same([body.logits(h) for h in hidden], logits)
    body.empty()
    assert all(slot.table[slot.key].is_meta for slot in body.slots.values())


@pytest.mark.parametrize("rerun", [False, True])
def test_solving_as_we_go_equals_a_plain_run_with_the_new_weights(case, rerun):
    model, arch = case
    ids = tiny_models.batches()
    weights = rounded(model, arch)
    body = skeleton(model)
    after, seen, capture = quantize(body, arch, ids, weights, rerun)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    swap_in(model, arch, weights)
    want, _, inputs = plain(model, arch, ids)
    model.load_state_dict(before)
    assert not capture.notes
    assert all(same(a, b) for a, b in zip(after, want, strict=True))
    for i in range(body.count):
        for group in arch.groups:
            for linear in group.linears:
                stats = seen[f"{arch.blocks}.{i}.{group.linears[0].name}"]
                X = inputs[f"{arch.blocks}.{i}.{linear.name}"]
                assert np.array_equal(stats.X, X)
                W = X.astype(np.float64)
                assert np.array_equal(stats.H, W.T @ W / len(X))


def test_the_statistics_of_v_are_those_of_q_and_k(llama):
    model, arch = llama
    for rerun in (False, True):
        _, seen, _ = quantize(skeleton(model), arch, tiny_models.batches(), rounded(*llama), rerun)
        attention = "model.layers.0.self_attn"
        assert seen[f"{attention}.v_proj"] is seen[f"{attention}.q_proj"]


@pytest.mark.parametrize("rerun", [False, True])
@pytest.mark.parametrize("count", range(6))
def test_resuming_after_some_groups_changes_nothing(llama, count, rerun):
    model, arch = llama
    ids, weights = tiny_models.batches(), rounded(*llama)
    want, all_seen, _ = quantize(skeleton(model), arch, ids, weights)

    def solved(i, group):
        return i == 0 and arch.groups.index(group) < count

    after, seen, _ = quantize(skeleton(model), arch, ids, weights, rerun, solved)
    assert all(same(a, b) for a, b in zip(after, want, strict=True))
    assert len(seen) == 2 * len(arch.groups) - count
    assert all(np.array_equal(stats.H, all_seen[name].H) for name, stats in seen.items())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
def test_bfloat16(name):
    model = tiny_models.make(name)
    arch = archs.find(model.config.to_dict())
    ids, weights = tiny_models.batches(), rounded(model, arch)
    halves = {k: v.astype(ml_dtypes.bfloat16) for k, v in tiny_models.weights(model).items()}
    body = skeleton(model, "bfloat16", **halves)
    after, _, _ = quantize(body, arch, ids, weights)
    again, _, _ = quantize(body, arch, ids, weights, rerun=True)
    assert all(h.dtype == torch.bfloat16 for h in after[-1])
    assert all(same(a, b) for a, b in zip(after, again, strict=True))


def test_bfloat16_equals_a_model_loaded_in_bfloat16(tmp_path):
    for name in ("llama", "gemma3"):
        folder = tiny_models.save(tiny_models.make(name), tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").eval()
        arch = archs.find(model.config.to_dict())
        ids = tiny_models.batches()
        after, logits, _ = plain(model, arch, ids)
        weights = tiny_models.weights(tiny_models.make(name))
        body = Skeleton(folder, weights.__getitem__, weights, "bfloat16")
        hidden = [body.embed(batch) for batch in ids]
        for i in range(body.count):
            with body.block(i):
                hidden = [body.forward_block(i, h) for h in hidden]
            assert same(hidden, after[i])
        assert same([body.logits(h) for h in hidden], logits)


def test_discovered_groups_solve_the_same(llama):
    model, arch = llama
    ids, weights = tiny_models.batches(), rounded(*llama)
    want, _, _ = quantize(skeleton(model), arch, ids, weights)
    body = skeleton(model)
    after, seen, _ = quantize(body, discover(body), ids, weights)
    assert all(same(a, b) for a, b in zip(after, want, strict=True))
    assert len(seen) == 2 * 4


@pytest.mark.parametrize("rerun", [False, True])
def test_v_that_reaches_attention_changed_is_solved_at_its_own_hook(llama, rerun, monkeypatch):
    model, arch = llama
    ids, weights = tiny_models.batches(), rounded(*llama)
    want, _, _ = quantize(skeleton(model), arch, ids, weights)
    plain = attention._attention
    monkeypatch.setattr(
        attention, "_attention", lambda m, q, k, v, *a, **o: plain(m, q, k, v + 0, *a, **o)
    )
    body = skeleton(model)
    after, seen, capture = quantize(body, arch, ids, weights, rerun)
    assert all(same(a, b) for a, b in zip(after, want, strict=True))
    assert len(capture.notes) == 1
    assert "model.layers.0" in capture.notes[0]
    assert len(seen) == 2 * len(arch.groups)


def test_groups_in_another_order_than_the_block_runs_them_are_refused(llama):
    model, arch = llama
    wrong = type(arch)(arch.name, arch.blocks, arch.groups[::-1])
    with pytest.raises(
        RefusedError, match=r"wanted model.layers.0 to run down_proj next, got q_proj"
    ):
        quantize(skeleton(model), wrong, tiny_models.batches(), rounded(*llama))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("at", range(5))
def test_an_abort_unwinds_every_parked_batch(llama, at, error):
    model, arch = llama
    body = skeleton(model)
    capture = Capture(body, arch, Keeper)
    weights = rounded(*llama)

    def solve(group, _stats):
        if group is arch.groups[at]:
            raise error
        return {x.name: weights["model.layers.0." + x.name] for x in group.linears}

    hidden = [(body.embed(batch),) * 2 for batch in tiny_models.batches()]
    with pytest.raises(error):
        capture.run_block(0, hidden, solve)
    gc.collect()
    assert not [g for g in gc.get_objects() if type(g) is greenlet and g and g.parent]
    layer = body.blocks[0]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in layer.modules())
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert not torch.is_inference_mode_enabled()


def test_the_list_of_inputs_is_consumed(llama):
    model, arch = llama
    body = skeleton(model)
    weights = rounded(*llama)
    hidden = [(body.embed(batch),) for batch in tiny_models.batches()]
    Capture(body, arch, Keeper).run_block(
        0,
        hidden,
        lambda group, _: {x.name: weights[f"model.layers.0.{x.name}"] for x in group.linears},
    )
    assert hidden == []


def test_parked_bytes_bound_what_is_held(case):
    """Every activation alive while all batches are parked, against the plan's formula."""
    model, arch = case
    body = skeleton(model)
    ids = [torch.randint(3, tiny_models.VOCAB, (2, 40)) for _ in range(6)]
    tokens = sum(batch.numel() for batch in ids)
    weights = rounded(model, arch)
    shapes = {name: weight.shape for name, weight in weights.items()}
    plan = parked_bytes(arch, lambda n: shapes[f"{arch.blocks}.0.{n}"], tokens, itemsize=4)
    hidden = [(body.embed(batch),) for batch in ids]
    body.empty()
    held = []

    def solve(group, _stats):
        gc.collect()
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) is torch.Tensor
            and not t.is_meta
            and t.numel() >= 80 * 16
            and len(t) in (2, 80)
            and t.shape[-2:] != (40, 40)  # masks: once for all batches
        }
        held.append(sum(storages.values()))
        return {x.name: weights[f"{arch.blocks}.0.{x.name}"] for x in group.linears}

    Capture(body, arch, Keeper).run_block(0, hidden, solve)
    shares = [count / planned for count, planned in zip(held, plan.values(), strict=True)]
    assert 0.5 <= min(shares) <= max(shares) <= 1.05, shares


def test_activations_that_are_not_finite_name_block_and_linear(llama):
    model, arch = llama
    body = skeleton(model)
    hidden = [(body.embed(batch).clone(),) for batch in tiny_models.batches()]
    hidden[1][0][0, 3] = np.inf
    with pytest.raises(InputError, match=r"at the input of model\.layers\.0\.self_attn\.q_proj"):
        Capture(body, arch, Keeper).run_block(0, hidden, lambda *_: {})


def test_solutions_for_other_linears_or_of_other_shapes_are_refused(llama):
    model, arch = llama
    body = skeleton(model)
    for answer, said in (
        ({"mlp.up_proj": np.zeros((64, 32), np.float32)}, "wanted weights of self_attn.q_proj"),
        ({"self_attn.q_proj": np.zeros((32, 31), np.float32)}, r"of shape \(32, 32\)"),
    ):
        hidden = [(body.embed(batch),) for batch in tiny_models.batches()]
        with pytest.raises(InputError, match=said):
            Capture(body, arch, Keeper).run_block(0, hidden, lambda *_, answer=answer: answer)
