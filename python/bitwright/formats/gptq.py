"""GPTQ checkpoints (quant_method "gptq"), 2, 3, 4 and 8 bits.

Below the module path P of a linear (n, k), b bits, G groups in a row:

    P.qweight  int32 (ceil(k b / 32), n)    codes along k for each output, lowest bit first
    P.qzeros   int32 (G, ceil(n b / 32))    zero points along n
    P.scales   fp16 (G, n)
    P.g_idx    int32 (k,)                   group of each input column: j // group
    w[i, j] = (code[i, j] - zero[g_idx[j], i]) * scales[g_idx[j], i]

Others write columns in act-order, an arbitrary g_idx with as many columns in each group; they are
read with the columns of a group side by side (QTensor.order). `dynamic` "+:" gives modules another
width or group, which is read, too.

Two conventions for qzeros: v1 (checkpoint_format "gptq") stores zero - 1, v2 ("gptq_v2") the zero
point. Symmetric results are written as v1, the form that every reader knows; asymmetric ones as v2,
because readers of v1 either refuse files that a certain tool did not write or wrap a zero point of
0 to 2^b. A tensor scheme is written as channel (group_size -1) with its scale repeated. g_idx must
be in the file: one reader takes uninitialised memory where it is absent.

Readers (GPTQModel 7.6 and 7.7, its torch kernel; transformers 5.23 and 5.24 with optimum 2.3; run):
  group sizes 16, 32, 64, 128, 256, 512, 1024 and -1; a group may be longer than the row
  one bit width in a file: `dynamic` overrides are ignored by transformers
  both convert every linear of a block, so those that stay in float are named twice: `dynamic` "-:"
  for GPTQModel, `modules_in_block_to_quantize` for transformers; the second knows no block numbers,
  so a linear must be kept in all blocks or in none
  3 bits want n and k divisible by 32 (both raise otherwise); 2, 4 and 8 bits take any n and k
  negative scales are multiplied like any other: read exactly
  weights are computed in fp16, one rounding, then cast to the model's dtype; GPTQModel refuses a
  float32 model, transformers runs one
  GPT-2 (Conv1D, codes along its inputs as everywhere): GPTQModel reads it; transformers raises,
  because the model's own initialisation wants a weight that the kernel does not have
  Phi-3: transformers reads it; GPTQModel raises, because it wants gate and up apart
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitwright import ops, schemes
from bitwright.files.checkpoint import fetch
from bitwright.formats.order import act_order
from bitwright.spec import Arch, InputError, QTensor, RefusedError, Scheme, Target

METHOD = "gptq"
BITS = (2, 3, 4, 8)
NEGATIVE_SCALES = True
GROUPS = (16, 32, 64, 128, 256, 512, 1024)
VERSIONS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format: what is missing from stored zero points
FLOATS = (np.dtype(np.float16), np.dtype(np.float32), ops.BFLOAT16)
Array = npt.NDArray[Any]
Getter = Callable[[str], Array]


def refuse(targets: Sequence[Target], arch: Arch) -> str | None:
    """Why these targets cannot be written, or None; one sentence that names a linear."""
    wanted = [target for target in targets if target.scheme is not None]
    for target in wanted:
        reason = _refuse_one(target)
        if reason:
            return f"[gptq] {target.name}: {reason}"
    names = sorted({target.scheme.name for target in wanted if target.scheme is not None})
    if len(names) > 1:
        return (
            f"[gptq] {wanted[0].name} and others have the schemes {', '.join(names)}: "
            "transformers reads one scheme in a file; --format compressed-tensors holds several"
        )
    return _refuse_uneven(targets, arch)


def _refuse_one(target: Target) -> str | None:
    scheme, k = target.scheme, target.shape[1]
    if scheme is None:
        return None
    if not scheme.plain:
        return f"{scheme.name} is no plain integer scheme; --format bitwright holds it"
    if scheme.bits not in BITS:
        return f"{scheme.name} has {scheme.bits} bits, GPTQ files have 2, 3, 4 or 8"
    if scheme.scale not in ("bf16", "fp16"):
        kind = "float32" if scheme.scale == "fp32" else scheme.scale
        return f"its scales are {kind}, GPTQ files store fp16; use the default scale grid"
    if scheme.group > 0 and scheme.group not in GROUPS:
        return f"groups of {scheme.group} are not read, those of {', '.join(map(str, GROUPS))} are"
    if scheme.bits == 3 and (target.shape[0] % 32 or k % 32):
        return (
            f"readers take 3 bits where both sides are multiples of 32, it is {target.shape[0]} x "
            f"{k}; 2, 4 and 8 bits would work, or --format compressed-tensors"
        )
    if k % scheme.columns(k):
        fits = [f"g{g}" for g in GROUPS if k % g == 0 and g <= 256]
        return (
            f"groups of {scheme.group} do not divide its rows of {k} columns, and no reader "
            "takes a "
            f"short last group; {', '.join([*fits, 'channel'])} would work"
        )
    return None


def _refuse_uneven(targets: Sequence[Target], arch: Arch) -> str | None:
    """A linear kept in float in some blocks only cannot be said to transformers."""
    kept: dict[str, set[bool]] = {}
    for target in targets:
        kept.setdefault(target.linear.name, set()).add(target.scheme is None)
    for name, states in kept.items():
        if len(states) > 1:
            return (
                f"[gptq] {arch.blocks}.*.{name} is kept in float in some blocks only, which a GPTQ "
                "config cannot say to transformers; skip it in all blocks, or use --format "
                "compressed-tensors"
            )
    return None


def notes(targets: Sequence[Target]) -> tuple[str, ...]:
    """What a user must know to load the file."""
    wanted = [target for target in targets if target.scheme is not None]
    said = []
    if any(not t.scheme.symmetric for t in wanted if t.scheme is not None):
        said.append("asymmetric GPTQ files are written as gptq_v2: GPTQModel and optimum read them")
    if any(target.linear.transposed for target in wanted):
        said.append(
            "GPTQ files of GPT-2 (Conv1D) load in GPTQModel 7.7, but not through transformers 5.24"
        )
    if any({"mlp.gate", "mlp.up"} <= set(target.linear.roles) for target in wanted):
        said.append(
            "GPTQ files with gate and up in one matrix (Phi-3) load through transformers 5.24, but "
            "not in GPTQModel 7.7"
        )
    return tuple(said)


def _words(values: int, bits: int) -> int:
    return -(-values * bits // 32)


def layout(
    name: str,
    shape: tuple[int, int],
    scheme: Scheme,
    dtype: np.dtype[Any],  # noqa: ARG001
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors of one linear."""
    (n, k), int32 = shape, np.dtype(np.int32)
    groups = scheme.groups(k)
    return {
        f"{name}.qweight": (int32, (_words(k, scheme.bits), n)),
        f"{name}.qzeros": (int32, (groups, _words(n, scheme.bits))),
        f"{name}.scales": (np.dtype(np.float16), (groups, n)),
        f"{name}.g_idx": (int32, (k,)),
    }


def write(name: str, q: QTensor, dtype: np.dtype[Any]) -> dict[str, Array]:  # noqa: ARG001
    """The tensors of one linear; RefusedError if its scales are not exact in fp16."""
    if q.order is not None:
        raise RefusedError(f"[gptq] {name}: columns in act-order are read, not written")
    scales = q.scales.astype(np.float16)
    if not np.array_equal(scales.astype(np.float32), q.scales):
        raise RefusedError(
            f"[gptq] {name}: its scales are not exact in fp16; quantize with the default scale grid"
        )
    bits, k = q.scheme.bits, q.shape[1]
    zeros = q.zeros - np.uint8(1) if q.scheme.symmetric else q.zeros
    words = ops.pack(np.ascontiguousarray(zeros.T), bits)
    return {
        f"{name}.qweight": np.ascontiguousarray(ops.pack(q.codes, bits).T).view(np.int32),
        f"{name}.qzeros": words.view(np.int32),
        f"{name}.scales": np.ascontiguousarray(scales.T),
        f"{name}.g_idx": (np.arange(k) // q.scheme.columns(k)).astype(np.int32),
    }


def _settings(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config as it holds for a module: with the first rule of `dynamic` that matches."""
    rules = config.get("dynamic") or {}
    try:
        for pattern, changes in rules.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
                return {**config, **changes}
    except (AttributeError, TypeError, re.error) as error:
        raise InputError(
            f"[gptq] wanted patterns with settings as dynamic, got {rules!s:.200}"
        ) from error
    return config


def scheme(
    name: str,
    config: Mapping[str, Any],
    get: Getter | None = None,  # noqa: ARG001
) -> Scheme:
    """The scheme of a module: the one that a GPTQ config gives all of them, or its own."""
    own = _settings(name, config)
    bits, group, symmetric = own.get("bits"), own.get("group_size"), own.get("sym", True)
    if bits not in BITS or not isinstance(group, int):
        raise RefusedError(
            f"[gptq] wanted 2, 3, 4 or 8 bits and a group size, got {bits} and {group}"
        )
    where = f"g{group}" if group > 0 else "channel"
    return schemes.parse(f"int{bits}-{where}{'' if symmetric else '-asym'}")


def _missing(config: Mapping[str, Any]) -> int:
    """What a reader adds to the stored zero points."""
    known = config.get("checkpoint_format") or config.get("format") or "gptq"
    if known not in VERSIONS:
        raise RefusedError(
            f"[gptq] wanted checkpoint_format {' or '.join(VERSIONS)}, got {known!r}"
        )
    return VERSIONS[known]


def read(name: str, get: Getter, config: Mapping[str, Any]) -> QTensor:
    """The linear `name` of a checkpoint whose tensors `get` gives."""
    return ops.unpacked(stored(name, get, config))


def stored(
    name: str,
    get: Getter,
    config: Mapping[str, Any],
    rows: Callable[[str], Any] | None = None,  # noqa: ARG001
) -> QTensor | ops.QWords:
    """The same, its codes packed as they are where columns are in order."""
    wanted, missing = scheme(name, config), _missing(config)
    groups, scales = get(f"{name}.g_idx"), get(f"{name}.scales")
    if groups.ndim != 1 or scales.ndim != 2 or not groups.size or scales.dtype not in FLOATS:
        raise InputError(
            f"[gptq] wanted {name}.g_idx as k integers and {name}.scales as groups x n floats, got "
            f"{groups.shape} and {scales.shape} of {scales.dtype}"
        )
    k, n = len(groups), scales.shape[1]
    expected = layout(name, (n, k), wanted, scales.dtype)
    expected[f"{name}.scales"] = (scales.dtype, (wanted.groups(k), n))
    tensors = fetch(get, expected)
    order = act_order(f"{name}.g_idx", groups, wanted)
    words = np.ascontiguousarray(tensors[f"{name}.qweight"].T).view(np.uint32)
    packed = np.ascontiguousarray(tensors[f"{name}.qzeros"]).view(np.uint32)
    zeros = np.ascontiguousarray(ops.unpack(packed, wanted.bits, n).T)
    _check_zeros(name, zeros, wanted, missing)
    values = np.ascontiguousarray(scales.T.astype(np.float32))
    zeros += np.uint8(missing)
    if order is None:
        return ops.QWords(words, k, values, zeros, wanted)
    codes = np.ascontiguousarray(ops.unpack(words, wanted.bits, k)[:, order])
    return QTensor(codes, values, zeros, wanted, order=order)


def _check_zeros(name: str, stored: Array, wanted: Scheme, missing: int) -> None:
    middle = 1 << (wanted.bits - 1)
    if missing and (stored == 2 * middle - 1).any():
        raise InputError(
            f"[gptq] {name}: a zero field of all ones in a v1 file means 0 to some tools and "
            f"{2 * middle} to others"
        )
    if wanted.symmetric and (stored != middle - missing).any():
        raise InputError(
            f"[gptq] {name}: its config says symmetric, but not all of its zero points are {middle}"
        )


def quantized(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:  # noqa: ARG001
    """Module paths of the quantized linears among these tensor names."""
    return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]


def shape(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    get: Getter,  # noqa: ARG001
) -> tuple[int, int]:
    """(n, k) of a quantized linear."""
    return shapes[f"{name}.qweight"][1], shapes[f"{name}.g_idx"][0]


def config(targets: Sequence[Target], version: str) -> dict[str, Any]:
    """The quantization_config of config.json."""
    wanted = [target.scheme for target in targets if target.scheme is not None]
    scheme = wanted[0]
    kept = sorted({target.linear.name for target in targets if target.scheme is None})
    done = list(dict.fromkeys(t.linear.name for t in targets if t.scheme is not None))
    return {
        "quant_method": METHOD,
        "bits": scheme.bits,
        "group_size": scheme.group if scheme.group > 0 else -1,
        "desc_act": False,
        "sym": scheme.symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "true_sequential": True,
        "modules_in_block_to_quantize": [[name] for name in done] if kept else None,
        "dynamic": {f"-:.*\\.{re.escape(name)}$": {} for name in kept} or None,
        "meta": {"quantizer": [f"bitwright:{version}"]},
    }


def side_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """quantize_config.json repeats the config for tools that look there."""
    return {"quantize_config.json": dict(config)}


def load_line(path: Path, config: Mapping[str, Any]) -> str:
    """The call that loads a written folder in transformers (with gptqmodel and optimum), or in
    GPTQModel what transformers cannot load; config: its config.json."""
    if config.get("model_type") == "gpt2":
        return f'GPTQModel.load("{path}", device="cpu")'
    return f'AutoModelForCausalLM.from_pretrained("{path}")'
