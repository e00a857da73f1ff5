"""The float model beside the quantized one, and v's attention-mixed inputs: against plain runs and
eager attention's own probabilities, on every declared architecture.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_models
from bitwright import archs
from bitwright.calib import attention, capture
from bitwright.calib.discover import discover
from captures import plain, quantize, rounded, same, skeleton, swap_in


@pytest.mark.parametrize("rerun", [False, True])
def test_two_streams_are_two_plain_runs(case, rerun):
    """The quantized stream is a plain run with the new weights, the float one with the old ones;
    both inputs of every linear reach the statistics."""
    model, arch = case
    ids = tiny_models.batches()
    weights = rounded(model, arch)
    body = skeleton(model)
    for mix in (0, 3):
        after, seen, capture = quantize(body, arch, ids, weights, rerun, mix=mix, streams=2)
        float_after, _, float_inputs = plain(model, arch, ids)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        swap_in(model, arch, weights)
        want, _, inputs = plain(model, arch, ids)
        model.load_state_dict(before)
        assert not capture.notes
        for streams, quantized, plainly in zip(after, want, float_after, strict=True):
            assert same([s[0] for s in streams], quantized)
            assert same([s[1] for s in streams], plainly)
        for name, stats in seen.items():
            if stats.X.ndim == 2:
                assert np.array_equal(stats.X, inputs[name.removesuffix("[qk]")])
                assert np.array_equal(stats.before, float_inputs[name.removesuffix("[qk]")])


@torch.inference_mode()
def added_to(model, arch, ids):
    """What the outputs of o and down are added to, by the linears' names."""
    found, handles = {}, []
    for i in range(len(model.get_submodule(arch.blocks))):
        for group in arch.groups:
            if group.stream is None:
                continue
            name = f"{arch.blocks}.{i}.{group.linears[0].name}"

            def keep(_module, args, name=name):
                found.setdefault(name, []).append(args[0].flatten(0, -2).float().numpy().copy())

            norm = model.get_submodule(f"{arch.blocks}.{i}.{group.stream}")
            handles.append(norm.register_forward_pre_hook(keep))
    for batch in ids:
        model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in found.items()}


@pytest.mark.parametrize("rerun", [False, True])
def test_what_outputs_are_added_to_comes_with_their_inputs(case, rerun):
    """The input of the norm, and that it is what the next sum starts from: S + linear(x) is the
    next sum, or the block's output."""
    model, arch = case
    ids, weights = tiny_models.batches(), rounded(model, arch)
    streams = {group.linears[0].name: group.stream for group in arch.groups if group.stream}
    _, seen, _ = quantize(skeleton(model), arch, ids, weights, rerun, streams=2, sums=True)
    found = {name: stats for name, stats in seen.items() if stats.sums is not None}
    if arch.name in ("gemma", "olmo2") or not streams:
        assert not found
        return
    assert len(found) == 2 * len(model.get_submodule(arch.blocks))
    want_float = added_to(model, arch, ids)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    swap_in(model, arch, weights)
    want = added_to(model, arch, ids)
    after, _, _ = plain(model, arch, ids)
    model.load_state_dict(before)
    for name, stats in found.items():
        assert np.array_equal(stats.sums[0], want[name])
        assert np.array_equal(stats.sums[1], want_float[name])
    last = [name for name in found if name.endswith(arch.groups[-1].linears[0].name)]
    for block, name in enumerate(last):
        bias = model.state_dict().get(f"{name}.bias")
        out = found[name].X @ weights[name].T + (0 if bias is None else bias.numpy())
        end = np.concatenate([h.flatten(0, -2).numpy() for h in after[block]])
        np.testing.assert_allclose(found[name].sums[0] + out, end, rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def attended(model, arch, ids, every):
    """Inputs of v in each block, mixed by eager attention's own probabilities: (KV heads, T, k)."""
    _, _, inputs = plain(model, arch, ids)
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        shares = [model(batch, use_cache=False, output_attentions=True).attentions for batch in ids]
    finally:
        model.set_attn_implementation(usual)
    config, mixed = model.config.get_text_config(), {}
    kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for i in range(len(shares[0])):
        readers = [x for group in arch.groups for x in group.linears if "attn.v" in x.roles]
        X = torch.from_numpy(inputs[f"{arch.blocks}.{i}.{readers[0].name}"])
        parts, first = [], 0
        for batch, share in zip(ids, shares, strict=True):
            x = X[first : first + batch.numel()].view(*batch.shape, -1)
            first += batch.numel()
            y = torch.einsum("bhqt,btk->bhqk", share[i][:, :, every - 1 :: every], x)
            y = y.unflatten(1, (kv, -1)).transpose(0, 1)
            parts.append(y.reshape(kv, -1, y.shape[-1]).double())
        mixed[i] = torch.cat(parts, 1).numpy()
    return mixed


def mean_product(A, B, pools):
    """A^T B / T of each head, averaged over those that share a pool."""
    each = A.transpose(0, 2, 1) @ B / A.shape[1]
    return each.reshape(pools, -1, *each.shape[1:]).mean(1)


@pytest.mark.parametrize("every", [1, 3])
def test_v_is_measured_on_the_inputs_that_its_attention_mixes(case, every):
    """H and C of each KV head: the quantized side against the model's eager attention with all
    weights but v's swapped, the float side against that of the float model."""
    model, arch = case
    ids = tiny_models.batches()
    weights = rounded(model, arch)
    _, seen, capture = quantize(skeleton(model), arch, ids, weights, mix=every, streams=2)
    float_want = attended(model, arch, ids, every)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    swap_in(model, arch, weights)
    want = attended(model, arch, ids, every)
    model.load_state_dict(before)
    assert not capture.notes
    found = [stats for stats in seen.values() if stats.X.ndim == 3]
    assert len(found) == len(want)
    for stats, Y, float_Y in zip(found, want.values(), float_want.values(), strict=True):
        pools = len(stats.H)
        H, change = mean_product(Y, Y, pools), mean_product(float_Y - Y, Y, pools)
        assert np.abs(stats.H - H).max() <= 1e-4 * np.abs(H).max()
        C = mean_product(stats.before.astype(np.float64) - stats.X, stats.X, pools)
        assert np.abs(change).max() > 1e-3 * np.abs(H).max()
        assert np.abs(C - change).max() <= 1e-4 * np.abs(H).max()


@pytest.mark.parametrize("name", ["gemma2"])
def test_soft_caps_shape_what_attention_mixes(name, monkeypatch):
    """A cap that bites: without it H is another one."""
    model = tiny_models.make(name, attn_logit_softcapping=0.1)
    arch, ids = archs.find(model.config.to_dict()), tiny_models.batches()
    weights = rounded(model, arch)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    swap_in(model, arch, weights)
    want = attended(model, arch, ids, 1)
    model.load_state_dict(before)

    def gaps():
        _, seen, _ = quantize(skeleton(model), arch, ids, weights, mix=1)
        found = [stats.H for stats in seen.values() if stats.X.ndim == 3]
        wanted = [mean_product(Y, Y, len(H)) for H, Y in zip(found, want.values(), strict=True)]
        return [np.abs(H - w).max() / np.abs(w).max() for H, w in zip(found, wanted, strict=True)]

    assert max(gaps()) <= 1e-4
    usual = attention.mix

    def uncapped(call, *rest):
        return usual(replace(call, options={**call.options, "softcap": None}), *rest)

    monkeypatch.setattr(attention, "mix", uncapped)
    assert min(gaps()) > 1e-3


def test_unknown_attention_leaves_v_the_plain_gram(llama, monkeypatch):
    model, arch = llama
    monkeypatch.setattr(attention, "mix", lambda *_: None)
    _, seen, capture = quantize(
        skeleton(model), arch, tiny_models.batches(), rounded(*llama), mix=8
    )
    assert all(stats.X.ndim == 2 for stats in seen.values())
    assert capture.notes == ["v has the plain Gram: model.layers.0 attends in an unknown way"]


def test_pooled_heads_are_told(llama, monkeypatch):
    """Two KV heads in one matrix: the mean of theirs, and a note."""
    model, arch = llama
    ids, weights = tiny_models.batches(), rounded(*llama)
    _, apart, _ = quantize(skeleton(model), arch, ids, weights, mix=3)
    monkeypatch.setattr(capture._Run, "_most_pools", lambda _: 1)
    _, seen, told = quantize(skeleton(model), arch, ids, weights, mix=3)
    name = "model.layers.0.self_attn.v_proj"
    assert seen[name].H.shape == (1, 32, 32)
    assert np.allclose(seen[name].H[0], apart[name].H.mean(0))
    assert len(told.notes) == 1
    assert "v's 2 KV heads share 1 Gram matrices" in told.notes[0]


def test_undeclared_architectures_keep_the_plain_gram_and_say_so(llama):
    model, _ = llama
    body = skeleton(model)
    _, seen, told = quantize(
        body, discover(body), tiny_models.batches(), rounded(*llama), mix=8, streams=2
    )
    assert all(stats.X.ndim == 2 and stats.before is not None for stats in seen.values())
    assert told.notes == ["v has the plain Gram: the roles of its linears are not known"]
