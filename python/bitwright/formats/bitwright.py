"""Our own format (quant_method "bitwright"): codes, scales, zero points of any scheme, as they are.

Below the module path P of a linear (n, k), b bits, G groups in a row:

    P.codes         int32 (n, ceil(k b / 32))   codes along k, least significant bit first
    P.scales        (n, G), in the type of the scale grid: bf16, fp16, fp32; e8m0: uint8 u for
                    2^(u - 127); e4m3: uint8, the number's eight bits
    P.zeros         uint8 (n, G)                asymmetric schemes only; of offset schemes those, in
                    the type of the scale grid
    P.steps         (n, blocks), in that type   two-level schemes only: scales are int8 multiples
                    (uint8 where asymmetric) of the step of their block of groups, offsets uint8
                    multiples of the steps in the second half of a row; a whole byte each, where
                    the scheme's bits per weight count scale_bits
    P.global_scale  fp32 (1,)                   e4m3 only: scales are stored values divided by it
    P.shape         int64 (2,)                  n, k
    P.order         int32 (k,)                  of modules in the config's "ordered" only: column
                    order[j] of the matrix is column j of the codes
    w = (code - zero) * scale, of a table (fp4, nf4) level[code] * scale, of offset schemes
        code * scale - zero

Config: "scheme" is the scheme of all linears but those named in "schemes". Scales of either sign
are held. Readers: `bitwright.load`, and transformers once `bitwright.hf` is imported; without it
transformers warns "Unknown quantization type" and gives the linears random weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bitwright import ops, schemes
from bitwright.files.checkpoint import fetch
from bitwright.spec import Arch, InputError, QTensor, RefusedError, ScaleGrid, Scheme, Target

METHOD = "bitwright"
NEGATIVE_SCALES = True
STORED: Mapping[ScaleGrid, np.dtype[Any]] = {
    "bf16": ops.BFLOAT16,
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "e8m0": np.dtype(np.uint8),
    "e4m3": np.dtype(np.uint8),
}
FLOATS: tuple[ScaleGrid, ...] = ("bf16", "fp16", "fp32")
Array = npt.NDArray[Any]
Getter = Callable[[str], Array]
Q = TypeVar("Q", bound=QTensor | ops.QWords)


def refuse(targets: Sequence[Target], arch: Arch) -> str | None:  # noqa: ARG001
    """Why these targets cannot be written: there is no reason, every scheme is held."""
    return None


def notes(targets: Sequence[Target]) -> tuple[str, ...]:  # noqa: ARG001
    """What a user must know to load the file."""
    return (
        "files in bitwright's own format are read by bitwright.load, and by transformers once "
        "bitwright.hf is imported",
    )


def layout(
    name: str,
    shape: tuple[int, int],
    scheme: Scheme,
    dtype: np.dtype[Any],  # noqa: ARG001
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors of one linear."""
    (n, k), groups = shape, scheme.groups(shape[1])
    words = -(-k * scheme.bits // 32)
    found: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        f"{name}.codes": (np.dtype(np.int32), (n, words)),
        f"{name}.scales": (_multiples(scheme) or STORED[scheme.scale], (n, groups)),
        f"{name}.shape": (np.dtype(np.int64), (2,)),
    }
    if not scheme.symmetric:
        one_level = scheme.offset and not scheme.block
        kind = STORED[scheme.scale] if one_level else np.dtype(np.uint8)
        found[f"{name}.zeros"] = (kind, (n, groups))
    if scheme.block:
        found[f"{name}.steps"] = (STORED[scheme.scale], (n, scheme.blocks(k)))
    if scheme.scale == "e4m3":
        found[f"{name}.global_scale"] = (np.dtype(np.float32), (1,))
    return found


def _multiples(scheme: Scheme) -> np.dtype[Any] | None:
    """The type of scales of two levels, None where they have one."""
    if not scheme.block:
        return None
    return np.dtype(np.int8 if scheme.symmetric else np.uint8)


def _units(steps: Array, scheme: Scheme, groups: int, offsets: bool) -> npt.NDArray[np.float32]:
    """The step of each group's scale (or offset), float32 (n, groups)."""
    blocks = -(-groups // scheme.block)
    own = steps[:, blocks:] if offsets else steps[:, :blocks]
    units: npt.NDArray[np.float32] = np.repeat(own, scheme.block, 1)[:, :groups].astype(np.float32)
    return units


def _stored(q: QTensor | ops.QWords) -> Array:
    kind, scales, multiples = q.scheme.scale, q.scales, _multiples(q.scheme)
    if multiples is not None and q.steps is not None:
        units = _units(q.steps, q.scheme, scales.shape[1], offsets=False)
        codes: Array = np.rint(scales / units).astype(multiples)
        return codes
    if kind == "e8m0":
        return (np.frexp(scales)[1] + 126).astype(np.uint8)
    if kind == "e4m3":
        numbers = (scales * np.float32(q.global_scale)).astype(ml_dtypes.float8_e4m3fn)
        return numbers.view(np.uint8)
    return scales.astype(STORED[kind])


def _scales(stored: Array, kind: ScaleGrid, whole: float) -> npt.NDArray[np.float32]:
    if kind == "e8m0":
        return np.ldexp(np.float32(1), stored.astype(np.int32) - 127).astype(np.float32)
    if kind == "e4m3":
        numbers = stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return np.asarray(numbers / np.float32(whole), np.float32)
    return stored.astype(np.float32)


def _stored_zeros(q: QTensor | ops.QWords) -> Array:
    if not q.scheme.offset:
        return q.zeros
    if q.steps is None:
        return q.zeros.astype(STORED[q.scheme.scale])
    units = _units(q.steps, q.scheme, q.zeros.shape[1], offsets=True)
    return np.rint(q.zeros / units).astype(np.uint8)


def exact(name: str, q: Q) -> Q:
    """The same weight in a scheme whose type of scales holds them as they are: what other tools
    write in fp16 or fp32 need not be bf16 numbers."""
    if not (np.isfinite(q.scales).all() and np.isfinite(q.zeros).all()):
        raise InputError(f"[bitwright] wanted finite scales of {name}, got NaN or infinity")
    if q.scheme.scale not in FLOATS or q.scheme.block:
        return q
    numbers = [q.scales, q.zeros] if q.scheme.offset else [q.scales]
    for kind in FLOATS[FLOATS.index(q.scheme.scale) :]:
        if all(_holds(kind, x) for x in numbers):
            return q if kind == q.scheme.scale else replace(q, scheme=replace(q.scheme, scale=kind))
    return q


def _holds(kind: ScaleGrid, x: npt.NDArray[Any]) -> bool:
    """Whether finite numbers are of that type: bf16 is the upper half of fp32."""
    if kind == "bf16":
        return not (x.view(np.uint32) & 0xFFFF).any()
    return np.array_equal(x.astype(STORED[kind]).astype(np.float32), x)


def write(name: str, q: QTensor, dtype: np.dtype[Any]) -> dict[str, Array]:  # noqa: ARG001
    """The tensors of one linear."""
    codes = ops.pack(q.codes, q.scheme.bits).view(np.int32)
    return {f"{name}.codes": codes, **beside(name, q)}


def beside(name: str, q: QTensor | ops.QWords) -> dict[str, Array]:
    """Those beside its codes."""
    rest = extras(name, q)
    tensors = {f"{name}.scales": _stored(q), f"{name}.shape": rest[f"{name}.shape"]}
    if not q.scheme.symmetric:
        tensors[f"{name}.zeros"] = _stored_zeros(q)
    return tensors | rest


def extras(name: str, q: QTensor | ops.QWords) -> dict[str, Array]:
    """Those beside its codes, scales and zero points."""
    tensors: dict[str, Array] = {f"{name}.shape": np.array(q.shape, np.int64)}
    if q.steps is not None:
        tensors[f"{name}.steps"] = q.steps.astype(STORED[q.scheme.scale])
    if q.scheme.scale == "e4m3":
        tensors[f"{name}.global_scale"] = np.array([q.global_scale], np.float32)
    if q.order is not None:
        tensors[f"{name}.order"] = q.order
    return tensors


def scheme(
    name: str,
    config: Mapping[str, Any],
    get: Getter | None = None,  # noqa: ARG001
) -> Scheme:
    """The scheme of a module."""
    named = config.get("schemes") or {}
    wanted = named.get(name, config.get("scheme")) if isinstance(named, Mapping) else None
    if not isinstance(wanted, str):
        raise RefusedError(f"[bitwright] wanted the scheme of {name} in the config, got {wanted!r}")
    return schemes.parse(wanted)


def read(name: str, get: Getter, config: Mapping[str, Any]) -> QTensor:
    """The linear `name` of a checkpoint whose tensors `get` gives."""
    return ops.unpacked(stored(name, get, config))


def stored(
    name: str, get: Getter, config: Mapping[str, Any], rows: Callable[[str], Any] | None = None
) -> ops.QWords:
    """The same, its codes packed as they are; rows: what gives them row by row (None: `get`)."""
    wanted, size = scheme(name, config), get(f"{name}.shape")
    if size.shape != (2,) or size.dtype.kind != "i" or (size < 1).any():
        raise InputError(f"[bitwright] wanted n and k in {name}.shape, got {size.tolist()}")
    n, k = int(size[0]), int(size[1])
    expected = layout(name, (n, k), wanted, ops.BFLOAT16)
    if name in (config.get("ordered") or ()):
        expected[f"{name}.order"] = (np.dtype(np.int32), (k,))
    codes, rows = f"{name}.codes", rows or get
    tensors, whole = fetch(lambda key: rows(key) if key == codes else get(key), expected), 1.0
    if wanted.scale == "e4m3":
        whole = float(tensors[f"{name}.global_scale"][0])
        if not 0.0 < whole < np.inf:
            raise InputError(f"[bitwright] wanted a positive {name}.global_scale, got {whole}")
    words, groups = tensors[codes].view(np.uint32), wanted.groups(k)
    scales, zeros, steps = tensors[f"{name}.scales"], tensors.get(f"{name}.zeros"), None
    if wanted.block:
        steps = tensors[f"{name}.steps"].astype(np.float32)
        scales = scales.astype(np.float32) * _units(steps, wanted, groups, offsets=False)
        if wanted.offset and zeros is not None:
            zeros = zeros.astype(np.float32) * _units(steps, wanted, groups, offsets=True)
    else:
        scales = _scales(scales, wanted.scale, whole)
    if zeros is None:
        middle = 1 << (wanted.bits - 1) if wanted.grid.uniform else 0
        zeros = np.full((n, groups), middle, np.uint8)
    zeros = zeros.astype(np.float32) if wanted.offset else zeros
    return ops.QWords(words, k, scales, zeros, wanted, whole, steps, tensors.get(f"{name}.order"))


def quantized(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:  # noqa: ARG001
    """Module paths of the quantized linears among these tensor names."""
    return [name.removesuffix(".codes") for name in names if name.endswith(".codes")]


def shape(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],  # noqa: ARG001
    get: Getter,
) -> tuple[int, int]:
    """(n, k) of a quantized linear."""
    n, k = get(f"{name}.shape")
    return int(n), int(k)


def config(targets: Sequence[Target], version: str) -> dict[str, Any]:
    """The quantization_config of config.json."""
    names = {target.name: target.scheme.name for target in targets if target.scheme is not None}
    default = Counter(names.values()).most_common(1)[0][0]
    return {
        "quant_method": METHOD,
        "version": version,
        "scheme": default,
        "schemes": {name: scheme for name, scheme in names.items() if scheme != default},
    }


def side_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:  # noqa: ARG001
    """None beside config.json."""
    return {}


def load_line(path: Path, config: Mapping[str, Any]) -> str:  # noqa: ARG001
    """What loads a written folder as a transformers model."""
    return f'bitwright.load("{path}")'
