"""Golden files of the real tools (tests/golden/README.md) and golden words: bytes, not just values.

What a tool wrote reads back to exactly the values that the tool computes, and our packers turn the
same codes, scales and zero points into the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from bitwright import ops, schemes
from bitwright.files.safetensors import SafetensorsFile
from bitwright.formats import compressed_tensors, gptq
from bitwright.spec import F32, InputError, QTensor

GOLDEN = Path(__file__).parent / "golden"
CT = sorted(path.name.split(".")[0] for path in (GOLDEN / "compressed-tensors").glob("*.json"))
GPTQ = sorted(path.name.removesuffix("_v2.safetensors") for path in GOLDEN.glob("gptq/*_v2.*"))
PLAIN = [name for name in GPTQ if not name.endswith("actorder")]
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)

# q_i = (5 i + 1) mod 2^b for i = 0 .. 31, least significant bit first, 32-bit words.
WORDS = {
    1: "55555555",
    2: "39393939 39393939",
    3: "f19d50f1 50f19d50 9d50f19d",
    4: "4fa50b61 c72d83e9 4fa50b61 c72d83e9",
    5: "f5582cc1 dc4dc927 6ed161c5 d9a3d450 e5e4d40f",
    6: "9540b181 3ba991f6 3070bde3 a581b591 3fb9d2fa 71748d20",
    7: "5202c301 29487cd1 13d70cd7 eb51991e bf565c16 00ff79e9 385c90d1",
    8: "100b0601 241f1a15 38332e29 4c47423d 605b5651 746f6a65 88837e79 9c97928d",
}
SYMMETRIC_ZEROS = {
    2: "55555555 55555555",
    3: "db6db6db b6db6db6 6db6db6d",
    4: "77777777 77777777 77777777 77777777",
    8: " ".join(["7f7f7f7f"] * 8),
}


def rounded(values: F32, dtype: np.dtype) -> F32:
    return values.astype(dtype).astype(np.float32)


def hexadecimal(words: np.ndarray) -> str:
    return " ".join(f"{word:08x}" for word in words.view(np.uint32).ravel())


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_there_is_a_golden_file_for_every_kind():
    assert len(CT) == 9
    assert len(PLAIN) == 12
    assert len(GPTQ) == 13


@pytest.mark.parametrize("name", CT)
def test_compressed_tensors(name):
    folder = GOLDEN / "compressed-tensors"
    file = SafetensorsFile(folder / f"{name}.safetensors")
    config = json.loads((folder / f"{name}.config.json").read_text())
    values = np.load(folder / f"{name}.dequantized.npz")
    modules = compressed_tensors.quantized(config, file.entries)
    assert sorted(modules) == sorted(values)
    for module in modules:
        q = compressed_tensors.read(module, file.read, config)
        assert q.scheme == compressed_tensors.scheme(module, config)
        assert np.array_equal(rounded(q.dequantize(), BF16)[:64], values[module])
        tensors = compressed_tensors.write(module, q, BF16)
        assert set(tensors) == {key for key in file.entries if key.startswith(f"{module}.")}
        for key, array in tensors.items():
            assert same_bytes(array, file.read(key)), key


def gptq_case(name: str, version: str) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors below a module "w", and the config that says what they are."""
    file = SafetensorsFile(GOLDEN / "gptq" / f"{name}_v2.safetensors")
    tensors = {f"w.{key}": file.read(key) for key in file.entries}
    if version == "gptq":
        old = SafetensorsFile(GOLDEN / "gptq" / f"{name}_v1.qzeros.safetensors")
        tensors["w.qzeros"] = old.read("qzeros")
    _, bits, group, symmetry, *_ = name.split("_")
    size = -1 if group == "gchannel" else int(group[1:])
    return tensors, {
        "bits": int(bits[1:]),
        "group_size": size,
        "sym": symmetry == "sym",
        "checkpoint_format": version,
    }


@pytest.mark.parametrize("name", PLAIN)
def test_gptq(name):
    values = np.load(GOLDEN / "gptq" / "dequantized_fp16.npz")[name]
    read: dict[str, QTensor] = {}
    for version in gptq.VERSIONS:
        tensors, config = gptq_case(name, version)
        q = read[version] = gptq.read("w", tensors.__getitem__, config)
        assert np.array_equal(q.dequantize().astype(F16), values)
        if version == ("gptq" if q.scheme.symmetric else "gptq_v2"):
            for key, array in gptq.write("w", q, F16).items():
                assert same_bytes(array, tensors[key]), key
    assert np.array_equal(read["gptq"].zeros, read["gptq_v2"].zeros)


@pytest.mark.parametrize("bits", WORDS)
def test_words_of_the_packer(bits):
    row = ((5 * np.arange(32) + 1) % 2**bits).astype(np.uint8)[None]
    assert hexadecimal(ops.pack(row, bits)) == WORDS[bits]


@pytest.mark.parametrize("bits", compressed_tensors.BITS)
def test_words_of_compressed_tensors(bits):
    scheme = schemes.parse(f"int{bits}-g32-asym")
    row = ((5 * np.arange(32) + 1) % 2**bits).astype(np.uint8)
    q = QTensor(np.tile(row, (32, 1)), np.ones((32, 1), np.float32), row[:, None], scheme)
    tensors = compressed_tensors.write("w", q, BF16)
    assert {hexadecimal(words) for words in tensors["w.weight_packed"]} == {WORDS[bits]}
    assert hexadecimal(tensors["w.weight_zero_point"]) == WORDS[bits]


@pytest.mark.parametrize("bits", gptq.BITS)
def test_words_of_gptq(bits):
    row = ((5 * np.arange(32) + 1) % 2**bits).astype(np.uint8)
    ones = np.ones((32, 1), np.float32)
    q = QTensor(np.tile(row, (32, 1)), ones, row[:, None], schemes.parse(f"int{bits}-g32-asym"))
    tensors = gptq.write("w", q, F16)
    assert {hexadecimal(words) for words in tensors["w.qweight"].T} == {WORDS[bits]}
    assert hexadecimal(tensors["w.qzeros"]) == WORDS[bits]
    middle = np.full((32, 1), 1 << (bits - 1), np.uint8)
    symmetric = QTensor(q.codes, ones, middle, schemes.parse(f"int{bits}-g32"))
    assert hexadecimal(gptq.write("w", symmetric, F16)["w.qzeros"]) == SYMMETRIC_ZEROS[bits]


@pytest.mark.parametrize("bits", gptq.BITS)
def test_zero_points_at_the_ends_of_the_range(bits):
    """v2 holds 0 and 2^b - 1; the same field of all ones in a v1 file has two meanings."""
    top = (1 << bits) - 1
    scheme = schemes.parse(f"int{bits}-g32-asym")
    zeros = np.tile(np.array([[0], [top]], np.uint8), (16, 1))
    q = QTensor(np.zeros((32, 32), np.uint8), np.ones((32, 1), np.float32), zeros, scheme)
    tensors = gptq.write("w", q, F16)
    config = {"bits": bits, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}
    assert np.array_equal(gptq.read("w", tensors.__getitem__, config).zeros, zeros)
    with pytest.raises(InputError, match=rf"all ones .* means 0 to some tools and {top + 1} to"):
        gptq.read("w", tensors.__getitem__, config | {"checkpoint_format": "gptq"})
    safe = QTensor(q.codes, q.scales, np.full_like(zeros, top), scheme)
    old = gptq.write("w", safe, F16)
    old["w.qzeros"] = ops.pack(np.ascontiguousarray(safe.zeros.T) - np.uint8(1), bits).view(
        np.int32
    )
    back = gptq.read("w", old.__getitem__, config | {"checkpoint_format": "gptq"})
    assert np.array_equal(back.zeros, safe.zeros)


def test_a_symmetric_config_over_other_zero_points_is_a_lie():
    q = QTensor(
        np.zeros((32, 32), np.uint8),
        np.ones((32, 1), np.float32),
        np.full((32, 1), 7, np.uint8),
        schemes.parse("int4-g32-asym"),
    )
    config = {"bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"}
    with pytest.raises(InputError, match=r"not all of its zero points are 8$"):
        gptq.read("w", gptq.write("w", q, F16).__getitem__, config)
