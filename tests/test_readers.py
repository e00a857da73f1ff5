"""What other tools write and we only read: golden bytes (tests/golden/README.md), and lies.

Read back, a linear has exactly the values that its tool computes; columns in act-order keep their
codes in the groups' order and come out in the matrix's.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bitwright import ops, registry, schemes
from bitwright.files.safetensors import SafetensorsFile
from bitwright.formats import awq, bitsandbytes, compressed_tensors, gptq
from bitwright.formats import bitwright as ours
from bitwright.spec import BitwrightError, InputError, QTensor, RefusedError

GOLDEN = Path(__file__).parent / "golden"
AWQ = sorted(path.stem for path in (GOLDEN / "awq").glob("*.safetensors"))
BNB = sorted(path.stem for path in (GOLDEN / "bitsandbytes").glob("*4_*.safetensors"))
F16 = np.dtype(np.float16)
Tensors = dict[str, np.ndarray]


def tensors_of(path: Path) -> Tensors:
    """Below a module "w"."""
    file = SafetensorsFile(path)
    return {f"w.{key}": file.read(key) for key in file.entries}


def awq_case(name: str) -> tuple[Tensors, dict]:
    _, _, group, symmetry = name.split("_")
    config = {"quant_method": "awq", "bits": 4, "group_size": int(group[1:]), "version": "gemm"}
    return tensors_of(GOLDEN / "awq" / f"{name}.safetensors"), {
        **config,
        "zero_point": symmetry == "asym",
    }


def bnb_case(name: str) -> tuple[Tensors, dict]:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path = GOLDEN / "bitsandbytes" / f"{name}.safetensors"
    return tensors_of(path), {**config, "bnb_4bit_quant_type": name[:3]}


def test_there_is_a_golden_file_for_every_kind():
    assert (len(AWQ), len(BNB)) == (3, 9)
    assert set(registry.readers()) == {*registry.names("formats"), "awq", "bitsandbytes"}


@pytest.mark.parametrize("name", AWQ)
def test_awq(name):
    tensors, config = awq_case(name)
    q = awq.read("w", tensors.__getitem__, config)
    values = np.load(GOLDEN / "awq" / "response_fp16.npz")[name]
    assert np.array_equal(ops.decode(q).astype(F16), values)
    assert awq.quantized(config, tensors) == ["w"]
    assert awq.shape("w", {k: v.shape for k, v in tensors.items()}, tensors.get) == q.shape


@pytest.mark.parametrize("name", BNB)
def test_bitsandbytes_4_bit(name):
    """Nested or not, blocks of 64 and 128, blocks that run over the ends of rows of 50."""
    tensors, config = bnb_case(name)
    q = bitsandbytes.read("w", tensors.__getitem__, config)
    values = np.load(GOLDEN / "bitsandbytes" / f"dequantized_{name[:3]}.npz")[name]
    assert np.array_equal(ops.decode(q), values)
    assert q.scheme == bitsandbytes.scheme("w", config, tensors.__getitem__)
    assert q.scheme.group == (2 if name.endswith("odd") else int(name.split("bs")[1][:3]))
    assert bitsandbytes.quantized(config, tensors) == ["w"]
    shapes = {k: v.shape for k, v in tensors.items()}
    assert bitsandbytes.shape("w", shapes, tensors.__getitem__) == q.shape


def test_bitsandbytes_int8():
    tensors = tensors_of(GOLDEN / "bitsandbytes" / "int8.safetensors")
    config = {"load_in_8bit": True}
    q = bitsandbytes.read("w", tensors.__getitem__, config)
    values = np.load(GOLDEN / "bitsandbytes" / "dequantized_int8.npz")["int8"]
    assert np.allclose(ops.decode(q), values, rtol=2**-23, atol=0)
    assert bitsandbytes.quantized(config, tensors) == ["w"]


def test_gptq_in_act_order():
    """g_idx shuffled: the tool's values; codes of a group side by side."""
    (path,) = (GOLDEN / "gptq").glob("*actorder_v2.safetensors")
    tensors = tensors_of(path)
    values = np.load(GOLDEN / "gptq" / "dequantized_fp16.npz")[path.stem.removesuffix("_v2")]
    config = {"bits": 4, "group_size": 64, "sym": True, "checkpoint_format": "gptq_v2"}
    q = gptq.read("w", tensors.__getitem__, {**config, "desc_act": True})
    assert q.order is not None
    assert np.array_equal(tensors["w.g_idx"][q.order], np.arange(128) // 64)
    assert np.array_equal(ops.decode(q).astype(F16), values)
    assert np.array_equal(q.dequantize(), ops.decode(q))
    with pytest.raises(RefusedError, match="act-order"):
        gptq.write("w", q, F16)
    tensors["w.g_idx"] = np.where(np.arange(128) < 3, 1, tensors["w.g_idx"]).astype(np.int32)
    with pytest.raises(RefusedError, match=r"groups of 64 columns in w.g_idx, got .* other sizes"):
        gptq.read("w", tensors.__getitem__, config)


def test_our_own_format_keeps_an_order():
    scheme, rng = schemes.parse("int3-g16-asym"), np.random.default_rng(3)
    W = rng.standard_normal((8, 40)).astype(np.float32)
    plain = ops.encode(W, *ops.fit(W, scheme), scheme)
    order = rng.permutation(40).astype(np.int32)
    q = QTensor(plain.codes, plain.scales, plain.zeros, scheme, order=order)
    assert np.array_equal(ops.decode(q)[:, order], ops.decode(plain))
    tensors = ours.write("w", q, F16)
    config = {"scheme": scheme.name, "ordered": ["w"]}
    back = ours.read("w", tensors.__getitem__, config)
    assert np.array_equal(ops.decode(back), ops.decode(q))
    assert np.array_equal(ours.stored("w", tensors.__getitem__, config).order, order)
    with pytest.raises(InputError, match="each of 40 columns once"):
        ours.stored("w", {**tensors, "w.order": order // 2}.__getitem__, config)


@pytest.mark.parametrize("pattern", ["+:.*down.*", ".*down.*"])
def test_gptq_with_several_widths(pattern):
    config = {"bits": 4, "group_size": 64, "dynamic": {"-:.*up.*": {}, pattern: {"bits": 8}}}
    assert gptq.scheme("layers.0.down", config).name == "int8-g64"
    assert gptq.scheme("layers.0.gate", config).name == "int4-g64"
    with pytest.raises(InputError, match="wanted patterns with settings as dynamic"):
        gptq.scheme("w", {**config, "dynamic": {"+:(": {}}})


def test_compressed_tensors_of_whole_bytes():
    """W8A8 by its own tool: the weights; with zero points by hand."""
    folder = GOLDEN / "compressed-tensors" / "int-quantized"
    file = SafetensorsFile(folder / "w8a8.safetensors")
    config = json.loads((folder / "w8a8.config.json").read_text())
    values = np.load(folder / "w8a8.dequantized.npz")
    modules = compressed_tensors.quantized(config, file.entries)
    assert sorted(modules) == sorted(values)
    for module in modules:
        q = compressed_tensors.read(module, file.read, config)
        want = ops.decode(q).astype(ops.BFLOAT16).astype(np.float32)
        assert np.array_equal(want[:64], values[module])
        shapes = {key: entry.shape for key, entry in file.entries.items()}
        assert compressed_tensors.shape(module, shapes, file.read) == q.shape
    weights = config["config_groups"]["group_0"]["weights"] | {"symmetric": False}
    config["config_groups"]["group_0"]["weights"] = weights
    codes = np.array([[-128, 0], [5, 127]], np.int8)
    tensors = {
        "w.weight": codes,
        "w.weight_scale": np.array([[0.5], [2.0]], np.float32),
        "w.weight_zero_point": np.array([[-28], [7]], np.int8),
    }
    q = compressed_tensors.read("w", tensors.__getitem__, config)
    assert q.dequantize().tolist() == [[-50.0, 14.0], [-4.0, 240.0]]


def test_compressed_tensors_in_act_order():
    scheme, rng = schemes.parse("int4-g16"), np.random.default_rng(5)
    W = rng.standard_normal((8, 64)).astype(np.float32)
    q = ops.encode(W, *ops.fit(W, scheme), scheme)
    groups = rng.permutation(np.arange(64) // 16).astype(np.int32)
    tensors = compressed_tensors.write("w", q, np.dtype(np.float32)) | {"w.weight_g_idx": groups}
    weights = {"num_bits": 4, "strategy": "group", "group_size": 16, "actorder": "group"}
    config = {
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    back = compressed_tensors.read("w", tensors.__getitem__, config)
    expected = (q.codes.astype(np.float32) - 8) * q.scales[:, groups]
    assert np.array_equal(ops.decode(back), expected)
    ordered = compressed_tensors.stored("w", tensors.__getitem__, config, tensors.__getitem__)
    assert np.array_equal(ops.pack_linear(ordered).panels, ops.pack_linear(back).panels)


def lies(array: np.ndarray) -> list[np.ndarray]:
    wrong = [array[: len(array) // 2], array[None], array.astype(np.float64), array.reshape(-1)[:0]]
    return [*wrong, np.concatenate([array, array], -1)]


@pytest.mark.parametrize(
    "case", [awq_case(AWQ[1]), bnb_case("nf4_nested_bs64")], ids=("awq", "nf4")
)
def test_lying_tensors_are_one_sentence(case):
    tensors, config = case
    fmt = registry.get("formats", config["quant_method"])

    def get(key: str, found: Tensors) -> np.ndarray:
        if key not in found:
            raise InputError(f"wanted tensor {key}, found none")
        return found[key]

    for key in tensors:
        if key.endswith("quant_map") and "nested" not in key:  # not looked at
            continue
        lied = [tensors | {key: lie} for lie in lies(tensors[key]) if "state" not in key]
        for found in (*lied, {k: v for k, v in tensors.items() if k != key}):
            with pytest.raises(BitwrightError) as caught:
                fmt.read("w", lambda k, found=found: get(k, found), config)
            assert "w." in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "lie", "sentence"),
    [
        ("awq", {"version": "gemv_fast"}, "wanted version gemm, got 'gemv_fast'"),
        ("awq", {"bits": 3}, "wanted 4 bits and a group size, got 3 and 128"),
        ("awq", {"group_size": None}, "got 4 and None"),
        ("awq", {"group_size": 48}, "groups of 48 that divide the rows of w, got 128 columns"),
        ("awq", {"zero_point": False}, "says symmetric, but not all of its zero points are 8"),
        ("bitsandbytes", {"bnb_4bit_quant_type": "af4"}, "wanted .* nf4 or fp4, got 'af4'"),
    ],
)
def test_lying_settings_are_one_sentence(method, lie, sentence):
    case = awq_case("awq_gemm_g128_asym") if method == "awq" else bnb_case("nf4_bs64")
    with pytest.raises(BitwrightError, match=sentence):
        registry.get("formats", method).read("w", case[0].__getitem__, {**case[1], **lie})


@pytest.mark.parametrize(
    "state",
    [
        "{", "7", "{}", '{"quant_type": "fp4", "blocksize": 64, "shape": [96, 192]}',
        '{"quant_type": "nf4", "blocksize": 0, "shape": [96, 192]}',
        '{"quant_type": "nf4", "blocksize": 64, "shape": [96]}',
        '{"quant_type": "nf4", "blocksize": 64, "shape": [96, "192"]}',
        '{"quant_type": "nf4", "blocksize": 64, "shape": [96, 192], "nested_blocksize": -1}',
    ],
)  # fmt: skip
def test_a_lying_quant_state_is_one_sentence(state):
    tensors, config = bnb_case("nf4_bs64")
    tensors["w.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(state.encode(), np.uint8)
    with pytest.raises(InputError, match=r"wanted quant_type nf4, a blocksize and n, k as JSON"):
        bitsandbytes.read("w", tensors.__getitem__, config)
