"""compressed-tensors: integer weights of 2 to 8 bits. Written as "pack-quantized"; read, too, as
"int-quantized" (and "naive-quantized"), 8 bits.

Below the module path P of a linear (n, k), b bits, G groups in a row:

    P.weight_packed      int32 (n, ceil(k b / 32))    codes along k, least significant bit first
    P.weight_scale       model dtype (n, G)
    P.weight_shape       int64 (2,)                   n, k
    P.weight_zero_point  int32 (ceil(n b / 32), G)    zero points along n; asymmetric only
    w = (code - zero) * scale                         computed in the dtype of the scale

    P.weight_g_idx       int32 (k,)                   group of each column; actorder "group" only,
                                                      which is read, not written
    int-quantized: P.weight int8 (n, k), P.weight_scale (n, G), P.weight_zero_point int8 (n, G),
    signed; what the config asks of activations is left to the engine

Codes and zero points are the unsigned ones: the library stores signed values plus 2^(b-1), which is
the same. Words are one dense bitstream since library version 0.18; before, 3, 5, 6 and 7 bits were
padded to whole values in a word: the config's "version" says which, and padded files are refused. A
tensor scheme is written as channel with its scale repeated.

Config: one scheme targets the class Linear, several list their modules by name. `ignore` names what
stays in float, and by a pattern every module outside the blocks: a Linear that is targeted and not
ignored (OPT 350M's project_in, say) is read as a quantized one.

Readers (transformers 5.17 to 5.24 with compressed-tensors 0.19 and 0.20, run):
  rows that the group size does not divide, and rows shorter than a group, fail in the first
  forward, so they are refused here; a row of K columns need not be whole words or groups of 32
  a transposed weight (GPT-2's Conv1D) is no Linear to the reader and stays random: refused here
  one symmetric scheme: read right by default and with CompressedTensorsConfig(dequantize=True)
  one asymmetric scheme: 5.23 and 5.24 read it with dequantize=True only (by default the loader
  raises, because the placeholder of weight_zero_point has another shape); 5.22 reads it both ways
  several symmetric schemes: 5.23 and 5.24 read them by default only (dequantize=True decodes each
  linear as the first scheme: wrong weights without an error, or a shape error); 5.22 both ways
  several with an asymmetric one among them: 5.23 and 5.24 in no way; 5.22 both ways
  negative scales are multiplied like any other: read exactly
  weights are computed in the dtype of the scale: by default the one that the model is loaded in,
  with dequantize=True the one in the file
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
from bitwright.formats.settings import OF_GROUPS, OF_WEIGHTS, require_known
from bitwright.spec import Arch, InputError, QTensor, RefusedError, Scheme, Target

METHOD = "compressed-tensors"
NEGATIVE_SCALES = True
BITS = (2, 3, 4, 5, 6, 7, 8)
LIBRARY = "0.19.0"  # the library version whose layout this is
DENSE_SINCE = (0, 18)  # versions before padded the words of PADDED bits
PADDED = (3, 5, 6, 7)
WHOLE_BYTES = ("int-quantized", "naive-quantized")
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), ops.BFLOAT16)
Array = npt.NDArray[Any]
Getter = Callable[[str], Array]


def refuse(targets: Sequence[Target], arch: Arch) -> str | None:  # noqa: ARG001
    """Why these targets cannot be written, or None; one sentence that names a linear."""
    for target in targets:
        scheme = target.scheme
        if target.linear.transposed:
            return (
                f"[compressed-tensors] {target.name} is stored transposed (Conv1D): its reader "
                "would "
                "leave it with random weights; --format gptq holds it"
            )
        if scheme is None:
            continue
        if not scheme.plain or scheme.scale in ("e8m0", "e4m3"):
            return (
                f"[compressed-tensors] {target.name}: {scheme.name} is no pack-quantized scheme; "
                "--format bitwright holds it"
            )
        if scheme.bits not in BITS:
            return f"[compressed-tensors] {target.name}: {scheme.name} wants 2 to 8 bits"
        if scheme.group > 0 and target.shape[1] % scheme.group:
            return f"[compressed-tensors] {target.name}: {short_group(scheme, target.shape[1])}"
    return None


def short_group(scheme: Scheme, k: int) -> str:
    """The sentence for a group size that does not divide the row, with those that do."""
    fits = [f"g{g}" for g in (16, 32, 64, 128, 256) if k % g == 0]
    return (
        f"groups of {scheme.group} do not divide its rows of {k} columns, and no reader takes "
        "a short "
        f"last group; {', '.join([*fits, 'channel'])} would work"
    )


def notes(targets: Sequence[Target]) -> tuple[str, ...]:
    """What a user must know to load the file."""
    found = {target.scheme for target in targets if target.scheme is not None}
    asymmetric = any(not scheme.symmetric for scheme in found)
    said = []
    if asymmetric and len(found) > 1:
        said.append(
            "transformers 5.23 and 5.24 load no compressed-tensors file with several schemes of "
            "which one is asymmetric; 5.22 does, and symmetric schemes load everywhere"
        )
    elif asymmetric:
        said.append(
            "transformers 5.23 and 5.24 load asymmetric compressed-tensors files only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True)"
        )
    elif len(found) > 1:
        said.append(
            "transformers 5.23 and 5.24 read several schemes in one compressed-tensors file right "
            "only without dequantize=True, which gives wrong weights silently"
        )
    if any(scheme.bits in PADDED for scheme in found):
        said.append("3, 5, 6 and 7 bits need compressed-tensors 0.18 or later to be read right")
    return tuple(said)


def _words(values: int, bits: int) -> int:
    return -(-values * bits // 32)


def layout(
    name: str, shape: tuple[int, int], scheme: Scheme, dtype: np.dtype[Any]
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors of one linear."""
    n, k = shape
    groups, int32 = scheme.groups(k), np.dtype(np.int32)
    tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        f"{name}.weight_packed": (int32, (n, _words(k, scheme.bits))),
        f"{name}.weight_scale": (dtype, (n, groups)),
        f"{name}.weight_shape": (np.dtype(np.int64), (2,)),
    }
    if not scheme.symmetric:
        tensors[f"{name}.weight_zero_point"] = (int32, (_words(n, scheme.bits), groups))
    return tensors


def write(name: str, q: QTensor, dtype: np.dtype[Any]) -> dict[str, Array]:
    """The tensors of one linear; RefusedError if its scales are not exact in `dtype`."""
    if q.order is not None:
        raise RefusedError(f"[compressed-tensors] {name}: act-order is read, not written")
    scale = q.scales.astype(dtype)
    if not np.array_equal(scale.astype(np.float32), q.scales):
        raise RefusedError(
            f"[compressed-tensors] {name}: its scales are not exact in {dtype}, the model's dtype; "
            "quantize with the default scale grid"
        )
    bits = q.scheme.bits
    tensors: dict[str, Array] = {
        f"{name}.weight_packed": ops.pack(q.codes, bits).view(np.int32),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": np.array(q.shape, np.int64),
    }
    if not q.scheme.symmetric:
        zeros = ops.pack(np.ascontiguousarray(q.zeros.T), bits)
        tensors[f"{name}.weight_zero_point"] = np.ascontiguousarray(zeros.T).view(np.int32)
    return tensors


def _scheme_of(weights: Mapping[str, Any]) -> Scheme:
    strategy, bits, group = (weights.get(key) for key in ("strategy", "num_bits", "group_size"))
    grouped = strategy == "group" and isinstance(group, int) and group > 0
    if weights.get("type", "int") != "int" or not (grouped or strategy == "channel"):
        raise RefusedError(
            "[compressed-tensors] wanted integer weights by group or channel, got "
            f"{weights.get('type')} by {strategy} of {group}"
        )
    where = f"g{group}" if grouped else "channel"
    return schemes.parse(f"int{bits}-{where}{'' if weights.get('symmetric', True) else '-asym'}")


def _groups(config: Mapping[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """Targets and weights of each group of a config."""
    try:
        whole = {"format": config.get("format")}
        groups = [
            (g["targets"], {**g["weights"], **whole, **{k: g[k] for k in whole if g.get(k)}})
            for g in config["config_groups"].values()
        ]
        patterns = [config.get("ignore") or [], *(targets for targets, _ in groups)]
        for pattern in (p for listed in patterns for p in listed):
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except (LookupError, AttributeError, TypeError, ValueError, re.error) as error:
        raise InputError(
            "[compressed-tensors] wanted patterns as ignore, and targets and weights in each of "
            f"the config_groups, got {dict(config)!s:.200}"
        ) from error
    for group, (_, weights) in zip(config["config_groups"].values(), groups, strict=True):
        require_known(METHOD, group, OF_GROUPS)
        require_known(METHOD, weights, OF_WEIGHTS)
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        require_known(METHOD, {"sparsity_config": config["sparsity_config"]}, ())
    return groups


def scheme(
    name: str,
    config: Mapping[str, Any],
    get: Getter | None = None,  # noqa: ARG001
) -> Scheme | None:
    """The scheme that a quantization_config gives the module `name`; None: not quantized."""
    weights = _settings(name, config)
    return None if weights is None else _scheme_of(weights)


def _settings(name: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The weights' settings of the module `name`; None: not quantized."""
    groups = _groups(config)
    if any(_matches(pattern, name) for pattern in config.get("ignore") or ()):
        return None
    exact = [weights for targets, weights in groups if any(_matches(t, name) for t in targets)]
    general = [weights for targets, weights in groups if "Linear" in targets]
    return next(iter((*exact, *general)), None)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name


def read(name: str, get: Getter, config: Mapping[str, Any]) -> QTensor:
    """The linear `name` of a checkpoint whose tensors `get` gives."""
    return ops.unpacked(stored(name, get, config))


def stored(
    name: str, get: Getter, config: Mapping[str, Any], rows: Callable[[str], Any] | None = None
) -> QTensor | ops.QWords:
    """The same, its codes packed as they are where they can be taken so; rows: what gives them row
    by row (None: `get`)."""
    settings = _settings(name, config)
    kind = "float" if settings is None else settings["format"]
    if settings is None or kind not in ("pack-quantized", *WHOLE_BYTES):
        raise InputError(
            f"[compressed-tensors] wanted {name} as pack-quantized or int-quantized, got {kind}"
        )
    wanted = _scheme_of(settings)
    if kind in WHOLE_BYTES:
        return _read_bytes(name, get, wanted)
    _require_dense(wanted, config)
    n, k = shape(name, {}, get)
    dtype = get(f"{name}.weight_scale").dtype
    if dtype not in FLOATS:
        raise InputError(f"[compressed-tensors] wanted float scales of {name}, got {dtype}")
    expected, order = layout(name, (n, k), wanted, dtype), None
    if settings.get("actorder") == "group":
        expected[f"{name}.weight_g_idx"] = (np.dtype(np.int32), (k,))
    codes, rows = f"{name}.weight_packed", rows or get
    tensors = fetch(lambda key: rows(key) if key == codes else get(key), expected)
    packed = tensors[codes].view(np.uint32)
    scales = tensors[f"{name}.weight_scale"].astype(np.float32)
    if wanted.symmetric:
        zeros = np.full(scales.shape, 1 << (wanted.bits - 1), np.uint8)
    else:
        words = np.ascontiguousarray(tensors[f"{name}.weight_zero_point"].T).view(np.uint32)
        zeros = np.ascontiguousarray(ops.unpack(words, wanted.bits, n).T)
    if f"{name}.weight_g_idx" in tensors:
        order = act_order(f"{name}.weight_g_idx", tensors[f"{name}.weight_g_idx"], wanted)
    if order is None:
        return ops.QWords(packed, k, scales, zeros, wanted)
    ordered = np.ascontiguousarray(ops.unpack(packed[:], wanted.bits, k)[:, order])
    return QTensor(ordered, scales, zeros, wanted, order=order)


def _read_bytes(name: str, get: Getter, wanted: Scheme) -> QTensor:
    """Of an int-quantized file: a signed byte for each code."""
    shape, scales = get(f"{name}.weight").shape, get(f"{name}.weight_scale")
    if len(shape) != 2 or wanted.bits != 8 or scales.dtype not in FLOATS:
        raise InputError(
            f"[compressed-tensors] wanted {name}.weight as n x k codes of 8 bits and float scales, "
            f"got {shape} of {wanted.bits} bits and {scales.dtype}"
        )
    int8, sides = np.dtype(np.int8), (shape[0], wanted.groups(shape[1]))
    expected = {f"{name}.weight": (int8, shape), f"{name}.weight_scale": (scales.dtype, sides)}
    if not wanted.symmetric:
        expected[f"{name}.weight_zero_point"] = (int8, sides)
    tensors, middle = fetch(get, expected), np.uint8(128)
    zeros = np.full(sides, middle)
    if not wanted.symmetric:
        zeros = tensors[f"{name}.weight_zero_point"].view(np.uint8) ^ middle
    codes = tensors[f"{name}.weight"].view(np.uint8) ^ middle
    return QTensor(codes, scales.astype(np.float32), zeros, wanted)


def _require_dense(scheme: Scheme, config: Mapping[str, Any]) -> None:
    version = re.match(r"(\d+)\.(\d+)", str(config.get("version") or LIBRARY))
    if scheme.bits in PADDED and version and tuple(map(int, version.groups())) < DENSE_SINCE:
        raise RefusedError(
            f"[compressed-tensors] {scheme.bits} bits of version {config['version']} are packed in "
            "padded words, which are not read; versions since 0.18 are"
        )


def quantized(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:  # noqa: ARG001
    """Module paths of the quantized linears among these tensor names."""
    listed = dict.fromkeys(names)
    packed = [n.removesuffix(".weight_packed") for n in listed if n.endswith(".weight_packed")]
    scaled = [n.removesuffix(".weight_scale") for n in listed if n.endswith(".weight_scale")]
    return [*packed, *(name for name in scaled if f"{name}.weight" in listed)]


def shape(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    get: Getter,
) -> tuple[int, int]:
    """(n, k) of a quantized linear."""
    if len(shapes.get(f"{name}.weight", ())) == 2:
        return (shapes[f"{name}.weight"][0], shapes[f"{name}.weight"][1])
    sizes = get(f"{name}.weight_shape").tolist()
    good = isinstance(sizes, list) and len(sizes) == 2 and all(type(x) is int for x in sizes)
    if not good or min(sizes) < 1:
        raise InputError(f"[compressed-tensors] wanted {name}.weight_shape as n, k, got {sizes}")
    return sizes[0], sizes[1]


def _weights(wanted: Scheme) -> dict[str, Any]:
    return {
        "num_bits": wanted.bits,
        "type": "int",
        "symmetric": wanted.symmetric,
        "strategy": "group" if wanted.group > 0 else "channel",
        "group_size": wanted.group if wanted.group > 0 else None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _outside(targets: Sequence[Target]) -> str:
    """The pattern of all modules that lie in no block."""
    blocks = targets[0].name.removesuffix(f".{targets[0].linear.name}").split(".")[-2]
    return rf"re:(?!(.*\.)?{re.escape(blocks)}\.\d+\.)"


def config(targets: Sequence[Target], version: str) -> dict[str, Any]:
    """The quantization_config of config.json."""
    by_scheme: dict[Scheme, list[str]] = {}
    for target in targets:
        if target.scheme is not None:
            by_scheme.setdefault(target.scheme, []).append(target.name)
    alone = len(by_scheme) == 1
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if alone else names,
            "format": "pack-quantized",
            "weights": _weights(wanted),
            "input_activations": None,
            "output_activations": None,
        }
        for i, (wanted, names) in enumerate(by_scheme.items())
    }
    return {
        "quant_method": METHOD,
        "version": LIBRARY,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["lm_head", _outside(targets), *(t.name for t in targets if t.scheme is None)],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": groups,
        "producer": f"bitwright {version}",
    }


def side_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:  # noqa: ARG001
    """Files beside config.json: none."""
    return {}


def load_line(path: Path, config: Mapping[str, Any]) -> str:
    """The call that loads a written folder in transformers; config: its config.json."""
    groups = config["quantization_config"]["config_groups"]
    symmetric = [g["weights"]["symmetric"] for g in groups.values()]
    if len(symmetric) > 1 or all(symmetric):
        return f'AutoModelForCausalLM.from_pretrained("{path}")'
    return (
        f'AutoModelForCausalLM.from_pretrained("{path}", '
        "quantization_config=CompressedTensorsConfig(dequantize=True))"
    )
