"""Every declared architecture against a tiny model of its class: all linears, once, in order."""

from __future__ import annotations

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny_models
from bitwright import archs
from bitwright.calib.discover import discover
from bitwright.calib.memory import parked_bytes
from bitwright.calib.skeleton import Skeleton
from bitwright.spec import Arch, Linear

ROLES = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"}


def declared(model):
    arch = archs.find(model.config.to_dict())
    assert arch is not None
    return arch


def linears(arch: Arch) -> dict[str, Linear]:
    return {linear.name: linear for group in arch.groups for linear in group.linears}


def skeleton(model) -> Skeleton:
    weights = tiny_models.weights(model)
    return Skeleton(model.config, weights.__getitem__, {k: v.shape for k, v in weights.items()})


@pytest.fixture(scope="module", params=tiny_models.CONFIGS)
def model(request):
    return tiny_models.make(request.param)


def test_every_class_has_a_tiny_model_and_every_family_is_listed():
    made = {type(tiny_models.make(name)).__name__ for name in tiny_models.CONFIGS}
    assert made == set(archs.FAMILIES)
    assert set(archs.FAMILIES.values()) == set(archs.NAMES)


def test_groups_hold_every_linear_of_a_block_once(model):
    arch = declared(model)
    block = model.get_submodule(f"{arch.blocks}.0")
    found = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    names = [linear.name for group in arch.groups for linear in group.linears]
    assert sorted(names) == sorted(found)
    for name, linear in linears(arch).items():
        assert linear.transposed == isinstance(found[name], Conv1D)


def test_roles_and_norms(model):
    arch = declared(model)
    block = model.get_submodule(f"{arch.blocks}.0")
    roles = [role for linear in linears(arch).values() for role in linear.roles]
    assert len(roles) == len(set(roles))
    assert set(roles) - {"mlp.gate"} == ROLES
    for group in arch.groups:
        if group.norm is not None:
            assert (getattr(block.get_submodule(group.norm), "bias", None) is not None) == (
                arch.norm == "layer"
            )


def test_paths_outside_the_blocks(model):
    arch = declared(model)
    body = skeleton(model)
    assert body.block_path == arch.blocks
    assert body.head == arch.head
    assert body.embeddings == arch.embeddings[0]
    for path in arch.embeddings:
        assert isinstance(model.get_submodule(path), nn.Embedding)


def test_discovery_agrees_with_the_declaration(model):
    arch = declared(model)
    found = discover(skeleton(model))
    assert not found.declared
    assert found.blocks == arch.blocks
    assert found.head == arch.head
    together: list[list[Linear]] = []
    for group in arch.groups:
        if group.inside_attention:
            together[-1] += group.linears
        else:
            together.append(list(group.linears))
    assert [[linear.name for linear in group.linears] for group in found.groups] == [
        [linear.name for linear in group] for group in together
    ]
    assert all(
        linear.transposed == linears(arch)[name].transposed
        for name, linear in linears(found).items()
    )


def test_unknown_classes_are_not_guessed():
    assert archs.find({"architectures": ["SomethingForCausalLM"]}) is None
    assert archs.find({}) is None


def test_parked_bytes_of_a_llama_by_hand():
    h, kv, inner = 32, 16, 64
    shapes = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
    shapes |= {"gate_proj": (inner, h), "up_proj": (inner, h), "down_proj": (h, inner)}
    arch = archs.find({"architectures": ["LlamaForCausalLM"]})
    got = parked_bytes(arch, lambda name: shapes[name.rsplit(".", 1)[-1]], tokens=10, itemsize=2)
    qkv = h + 2 * kv
    want = [2 * h, 2 * h + qkv, 2 * h + qkv + h, 3 * h, 3 * h + inner]
    assert list(got.values()) == [20 * w for w in want]
