"""Every format against every scheme, and against files that lie: what is written reads back equal.

A new format in `formats.NAMES` is walked by all of these; it only states in HOLDS what it holds.
"""

from __future__ import annotations

import json
from itertools import product
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

from bitwright import ops, registry, schemes
from bitwright.files.safetensors import Rows
from bitwright.spec import (
    Arch,
    BitwrightError,
    InputError,
    Linear,
    QTensor,
    RefusedError,
    Scheme,
    Target,
)

FORMATS = registry.names("formats")
SHAPES = ((96, 256), (96, 240), (33, 288), (7, 20))
GROUPS = ("g16", "g20", "g32", "g64", "g128", "g256", "channel", "tensor")
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
ARCH = Arch("toy", "model.layers", ())
NAME = "model.layers.0.mlp.down_proj"


def held_by_gptq(bits: int, group: int, n: int, k: int) -> bool:
    sizes = group <= 0 or (group in (16, 32, 64, 128, 256) and (k % group == 0 or group > k))
    return bits in (2, 3, 4, 8) and sizes and (bits != 3 or n % 32 == k % 32 == 0)


HOLDS = {
    "compressed-tensors": lambda bits, group, _n, k: bits > 1 and (group <= 0 or k % group == 0),
    "gptq": held_by_gptq,
    "bitwright": lambda *_: True,
}


def module(name: str) -> ModuleType:
    return registry.get("formats", name)


def target(name: str, shape: tuple[int, int], scheme: Scheme | None, conv1d=False) -> Target:
    path = name.split(".", 3)[-1]
    return Target(name, Linear(path, ("mlp.down",), transposed=conv1d), shape, scheme)


def random_tensor(shape: tuple[int, int], scheme: Scheme, seed: int = 0) -> QTensor:
    """All codes and, where asymmetric, all zero points; scales on the default scale grid."""
    rng = np.random.default_rng(seed)
    size = (shape[0], scheme.groups(shape[1]))
    one = (1, 1) if scheme.group == -1 else size
    codes = rng.integers(0, 1 << scheme.bits, shape).astype(np.uint8)
    words = rng.uniform(1e-3, 0.1, one).astype(ml_dtypes.bfloat16).astype(np.float32)
    if scheme.symmetric:
        zeros = np.full(one, 1 << (scheme.bits - 1), np.uint8)
    else:
        zeros = rng.integers(0, 1 << scheme.bits, one).astype(np.uint8)
    return QTensor(codes, np.tile(words, (size[0] // one[0], 1)),
                   np.tile(zeros, (size[0] // one[0], 1)), scheme)  # fmt: skip


def config_of(fmt: ModuleType, scheme: Scheme) -> dict:
    """As a reader finds it: through JSON."""
    return json.loads(json.dumps(fmt.config((target(NAME, (1, 1), scheme),), "1")))


def written(fmt: ModuleType, q: QTensor, dtype=DTYPES[0]) -> dict[str, np.ndarray]:
    return fmt.write(NAME, q, dtype)


def same(a: QTensor, b: QTensor) -> bool:
    pairs = ((a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros))
    if a.steps is not None:
        pairs = (*pairs, (a.steps, b.steps))
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def unread(tensors: dict[str, np.ndarray]):
    """What gives the rows of matrices a few at a time, as a checkpoint does."""

    def rows(key: str) -> Rows:
        array = tensors[key]

        def read(first: int, into: np.ndarray) -> None:
            into[:] = array[first : first + len(into)].view(into.dtype)

        return Rows(array.dtype, array.shape, read)

    return rows


def same_panels(fmt: ModuleType, tensors: dict[str, np.ndarray], config: dict, q: QTensor) -> bool:
    """Codes as they are packed, read or not, make the panels of the codes themselves."""
    want = ops.pack_linear(q).panels
    whole = fmt.stored(NAME, tensors.__getitem__, config)
    pieces = fmt.stored(NAME, tensors.__getitem__, config, unread(tensors))
    assert isinstance(pieces, ops.QWords)
    assert same(ops.unpacked(pieces), q)
    return all(np.array_equal(ops.pack_linear(given).panels, want) for given in (whole, pieces))


def all_schemes() -> list[Scheme]:
    names = product(range(1, 9), GROUPS, ("", "-asym"))
    return [schemes.parse(f"int{bits}-{group}{end}") for bits, group, end in names]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_round_trip_of_every_scheme_that_is_not_refused(name, shape):
    """read(write(q)) == q, layout() tells names, dtypes and shapes, refuse() is as declared."""
    fmt, kept = module(name), 0
    for scheme in all_schemes():
        reason = fmt.refuse((target(NAME, shape, scheme),), ARCH)
        assert (reason is None) == HOLDS[name](scheme.bits, scheme.group, *shape), scheme.name
        if reason is not None:
            continue
        q, dtype = random_tensor(shape, scheme, kept), DTYPES[kept % 3]
        tensors = written(fmt, q, dtype)
        layout = fmt.layout(NAME, shape, scheme, dtype)
        assert {k: (v.dtype, v.shape) for k, v in tensors.items()} == layout
        assert list(tensors) == list(layout)
        back = fmt.read(NAME, tensors.__getitem__, config_of(fmt, scheme))
        assert same(q, back), scheme.name
        kept_name = scheme.name if name == "bitwright" else scheme.name.replace("tensor", "channel")
        assert back.scheme.name == kept_name
        assert np.array_equal(ops.decode(q), back.dequantize())
        assert same_panels(fmt, tensors, config_of(fmt, scheme), back), scheme.name
        kept += 1
    assert kept


@pytest.mark.parametrize("name", FORMATS)
def test_names_and_shapes_are_found_again(name):
    fmt, scheme = module(name), schemes.parse("int4-g32-asym")
    tensors = written(fmt, random_tensor((96, 256), scheme))
    names = [*tensors, "model.norm.weight", f"{NAME}.bias"]
    assert fmt.quantized(config_of(fmt, scheme), names) == [NAME]
    shapes = {key: array.shape for key, array in tensors.items()}
    assert fmt.shape(NAME, shapes, tensors.__getitem__) == (96, 256)
    assert fmt.scheme(NAME, config_of(fmt, scheme)) == scheme


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "sentence"),
    [
        ("compressed-tensors", "int1-g32", (64, 64), "int1-g32 wants 2 to 8 bits"),
        ("compressed-tensors", "int4-g64", (64, 96), "g16, g32, channel would work"),
        ("compressed-tensors", "int4-g128", (64, 64), "g16, g32, g64, channel would work"),
        ("gptq", "int5-g32", (64, 64), "GPTQ files have 2, 3, 4 or 8"),
        ("gptq", "int4-g20", (64, 80), "those of 16, 32, 64, 128, 256, 512, 1024 are"),
        ("gptq", "int4-g64", (64, 96), "g16, g32, channel would work"),
        ("gptq", "int3-g16", (64, 240), "2, 4 and 8 bits would work"),
        ("gptq", "int3-g32", (48, 64), "--format compressed-tensors"),
    ],
)
def test_a_refusal_is_one_sentence_with_the_linear_and_a_way_out(name, scheme, shape, sentence):
    fine = target("model.layers.0.mlp.up_proj", (64, 64), schemes.parse("int4-g32"))
    bad = target(NAME, shape, schemes.parse(scheme))
    reason = module(name).refuse((fine, bad), ARCH)
    assert NAME in reason
    assert sentence in reason
    assert "\n" not in reason
    assert not reason.endswith(".")


def test_gptq_refuses_what_one_of_its_readers_cannot_be_told():
    """Several schemes, and a linear kept in float in one block of two."""
    fmt, scheme = module("gptq"), schemes.parse("int4-g32")
    names = [f"model.layers.{i}.mlp.{part}" for i in (0, 1) for part in ("up_proj", "down_proj")]
    targets = [target(name, (64, 64), scheme) for name in names]
    other = target(names[3], (64, 64), schemes.parse("int8-g32"))
    assert "one scheme in a file" in fmt.refuse((*targets[:3], other), ARCH)
    kept = target(names[3], (64, 64), None)
    uneven = fmt.refuse((*targets[:3], kept), ARCH)
    assert "model.layers.*.mlp.down_proj is kept in float in some blocks only" in uneven
    assert (
        fmt.refuse((targets[0], target(names[1], (64, 64), None), targets[2], kept), ARCH) is None
    )


def test_a_transposed_weight_goes_where_a_reader_knows_it():
    """Conv1D: no Linear to compressed-tensors; GPTQModel reads it, and the user is told."""
    conv = target(NAME, (64, 64), schemes.parse("int4-g32"), conv1d=True)
    reason = module("compressed-tensors").refuse((conv,), ARCH)
    assert NAME in reason
    assert "--format gptq" in reason
    assert module("gptq").refuse((conv,), ARCH) is None
    assert any("GPT-2" in note for note in module("gptq").notes((conv,)))


TABLES = ["fp4-g16", "nf4-g64", "mxfp4", "nvfp4", "nf4-channel-fp32", "int3-g16-asym-fp16"]


OFFSETS = ["int4-g32-offset", "int2-channel-offset-fp32", "int4-g32-offset-fp16-8x6"]
LEVELS = ["int3-g16-fp16-16x6", "int6-g16-3x8", "nf4-g64-fp16-2x6", "int2-g16-asym-16x4"]


@pytest.mark.parametrize("scheme", [*TABLES, "int4-g16-e8m0", *OFFSETS, *LEVELS])
def test_only_our_own_format_holds_tables_and_other_scales(scheme):
    wanted = schemes.parse(scheme)
    for name in FORMATS:
        reason = module(name).refuse((target(NAME, (96, 256), wanted),), ARCH)
        if name == "bitwright":
            assert reason is None
        elif not wanted.plain or wanted.scale == "e8m0":
            assert NAME in reason
    fmt, W = module("bitwright"), np.random.default_rng(1).normal(size=(96, 256))
    W = W.astype(np.float32) * np.float32(0.01)
    q = ops.encode(W, *ops.fit(W, wanted), wanted)
    tensors = written(fmt, q)
    assert {k: (v.dtype, v.shape) for k, v in tensors.items()} == fmt.layout(
        NAME, q.shape, wanted, DTYPES[0]
    )
    back = fmt.read(NAME, tensors.__getitem__, config_of(fmt, wanted))
    assert same(q, back)
    assert (back.scheme, back.global_scale) == (wanted, q.global_scale)
    assert same_panels(fmt, tensors, config_of(fmt, wanted), back)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "bitwright"])
def test_scales_that_the_file_would_round_are_refused(name):
    """fp32 scales in a 16-bit file; compressed-tensors holds them in a float32 model."""
    fmt = module(name)
    q = random_tensor((32, 64), Scheme(schemes.grids()["int4"], 32, scale="fp32"))
    fine = QTensor(q.codes, q.scales * np.float32(1.0001), q.zeros, q.scheme)
    with pytest.raises(RefusedError, match=rf"{NAME}: its scales are not exact in"):
        written(fmt, fine, DTYPES[2])
    if name == "compressed-tensors":
        back = fmt.read(NAME, written(fmt, fine).__getitem__, config_of(fmt, q.scheme))
        assert same(back, fine)
    else:
        assert "float32" in fmt.refuse((target(NAME, (32, 64), q.scheme),), ARCH)


def test_a_config_says_which_module_has_which_scheme():
    """Overrides and skips of compressed-tensors: targets by name, and everything else ignored."""
    fmt = module("compressed-tensors")
    kinds = {"up_proj": "int4-g32", "gate_proj": "int8-channel-asym", "down_proj": None}
    targets = tuple(
        target(f"model.layers.{i}.mlp.{part}", (64, 64), kind and schemes.parse(kind))
        for i in range(12)
        for part, kind in kinds.items()
    )
    alone = tuple(t for t in targets if t.linear.name != "mlp.gate_proj")
    for chosen in (targets, alone):
        assert fmt.refuse(chosen, ARCH) is None
        config = json.loads(json.dumps(fmt.config(chosen, "1")))
        assert {t.name: fmt.scheme(t.name, config) for t in chosen} == {
            t.name: t.scheme for t in chosen
        }
        for outside in ("lm_head", "model.project_in", "model.layers", "score"):
            assert fmt.scheme(outside, config) is None
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_what_users_are_told_about_loading():
    """The line and the notes follow what transformers really loads."""
    fmt = module("compressed-tensors")

    def told(*names):
        targets = [
            target(f"model.layers.0.{i}", (64, 64), schemes.parse(n)) for i, n in enumerate(names)
        ]
        line = fmt.load_line("OUT", {"quantization_config": fmt.config(targets, "1")})
        return "dequantize=True" in line, " ".join(fmt.notes(targets))

    assert told("int4-g32") == (False, "")
    assert told("int4-g32-asym")[0]
    assert "only without dequantize=True" in told("int4-g32", "int8-g32")[1]
    both = told("int4-g32", "int8-g32-asym")
    assert not both[0]
    assert "5.22 does" in both[1]
    assert "0.18 or later" in told("int3-g32")[1]


def test_a_gptq_config_names_what_stays_in_float_for_both_readers():
    fmt, scheme = module("gptq"), schemes.parse("int4-g32-asym")
    targets = [
        target("model.layers.0.mlp.up_proj", (64, 64), scheme),
        target("model.layers.0.mlp.gate_proj", (64, 64), None),
    ]
    config = fmt.config(targets, "1")
    assert config["dynamic"] == {r"-:.*\.mlp\.gate_proj$": {}}
    assert config["modules_in_block_to_quantize"] == [["mlp.up_proj"]]
    assert (config["checkpoint_format"], config["sym"]) == ("gptq_v2", False)
    assert fmt.side_files(config) == {"quantize_config.json": config}
    plain = fmt.config(targets[:1], "1")
    assert plain["dynamic"] is None
    assert plain["modules_in_block_to_quantize"] is None


def lies(array: np.ndarray) -> list[np.ndarray]:
    wrong = [array[: len(array) // 2], array[None], array.astype(np.float64), array.reshape(-1)[:0]]
    return [*wrong, np.concatenate([array, array], -1)]


@pytest.mark.parametrize("name", FORMATS)
def test_lying_tensors_are_found_before_they_are_decoded(name):
    """Missing, cut, doubled, of another dtype: one sentence that names the tensor."""
    fmt, scheme = module(name), schemes.parse("int3-g32-asym")
    tensors, config = written(fmt, random_tensor((96, 256), scheme)), config_of(fmt, scheme)

    def get(key: str, found: dict[str, np.ndarray]) -> np.ndarray:
        if key not in found:
            raise InputError(f"wanted tensor {key}, found none")
        return found[key]

    for key in tensors:
        cases = [tensors | {key: lie} for lie in lies(tensors[key])]
        cases.append({k: v for k, v in tensors.items() if k != key})
        for case in cases:
            with pytest.raises(BitwrightError) as caught:
                fmt.read(NAME, lambda k, case=case: get(k, case), config)
            assert NAME in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [[-96, 256], [0, 0], [2**40, 2**40], [96], [96, 257], [96, 64]])
def test_a_lying_weight_shape_is_found(sizes):
    fmt, scheme = module("compressed-tensors"), schemes.parse("int4-g32")
    tensors = written(fmt, random_tensor((96, 256), scheme))
    tensors[f"{NAME}.weight_shape"] = np.array(sizes, np.int64)
    with pytest.raises(InputError, match=NAME):
        fmt.read(NAME, tensors.__getitem__, config_of(fmt, scheme))


CT_LIES = (
    {"config_groups": None},
    {"config_groups": {"group_0": {"targets": ["Linear"]}}},
    {"config_groups": {"group_0": {"targets": 7, "weights": {}}}},
    {"config_groups": {"group_0": {"targets": ["re:("], "weights": {}}}},
    {"config_groups": {"group_0": {"targets": ["Linear"], "weights": "int4"}}},
    {"ignore": ["re:["]},
    {"ignore": [None]},
    {"ignore": [NAME]},
    {"config_groups": {"group_0": {"targets": ["Linear"], "format": "marlin-24", "weights": {}}}},
    {"version": "0.17.1"},
)
WEIGHTS = (
    {"num_bits": None}, {"num_bits": 9}, {"type": "float"}, {"strategy": "block"},
    {"group_size": -1}, {"group_size": "32"},
)  # fmt: skip


@pytest.mark.parametrize("lie", [*CT_LIES, *WEIGHTS], ids=str)
def test_a_lying_compressed_tensors_config_is_one_sentence(lie):
    fmt, scheme = module("compressed-tensors"), schemes.parse("int3-g32")
    tensors, config = written(fmt, random_tensor((96, 256), scheme)), config_of(fmt, scheme)
    if lie in CT_LIES:
        config |= lie
    else:
        config["config_groups"]["group_0"]["weights"] |= lie
    with pytest.raises(BitwrightError, match=r"^\[\S+\] .+[^.]$") as caught:
        fmt.read(NAME, tensors.__getitem__, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lie",
    [
        {"bits": None}, {"bits": 5}, {"group_size": None}, {"group_size": 64},
        {"checkpoint_format": "gptq_p"}, {"checkpoint_format": "marlin"},
        {"dynamic": {"+:.*down.*": {"bits": 8}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_lying_gptq_config_is_one_sentence(lie):
    fmt, scheme = module("gptq"), schemes.parse("int4-g32")
    tensors, config = written(fmt, random_tensor((96, 256), scheme)), config_of(fmt, scheme)
    with pytest.raises(BitwrightError, match=r"^\[\S+\] .+[^.]$"):
        fmt.read(NAME, tensors.__getitem__, config | lie)
