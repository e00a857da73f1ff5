"""Quantized folders as tools write them, made of tiny models: ours by `quantize`, others by hand.

The packers here are plain NumPy, written from the formats' tables; the golden files in
tests/golden say that the tables are right.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

import bitwright
import tiny_models
from bitwright import hf, ops, schemes
from bitwright.files import safetensors
from bitwright.files.checkpoint import Checkpoint
from bitwright.formats import gptq
from bitwright.formats.dense import open_dense
from bitwright.spec import QTensor

Tensors = dict[str, np.ndarray]
Packer = Callable[[str, QTensor], Tensors]
F16 = np.dtype(np.float16)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def float_folder(name: str, folder: Path, **changes: object) -> Path:
    """A tiny float model, with a generation config that ends early nowhere."""
    return tiny_models.save(tiny_models.make(name, **changes), folder)


def ours(source: Path, out: Path, scheme: str, fmt: str = "bitwright", **options: object) -> Path:
    """A folder of ours, rounded to nearest."""
    bitwright.quantize(source, out=out, scheme=scheme, method="rtn", format=fmt, **options)
    return out


def by_hand(
    source: Path, out: Path, scheme: str, config: dict, pack: Packer, ends=("_proj.weight",)
) -> Path:
    """Linears with names that end so in another tool's layout; the rest as it is."""
    shutil.copytree(source, out)
    tensors: Tensors = {}
    for name, array in load_file(source / "model.safetensors").items():
        if not name.endswith(ends):
            tensors[name] = array
            continue
        wanted = schemes.parse(scheme)
        q = ops.encode(array, *ops.fit(array, wanted), wanted)
        tensors |= pack(name.removesuffix(".weight"), q)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    settings = json.loads((out / "config.json").read_text()) | {"quantization_config": config}
    (out / "config.json").write_text(json.dumps(settings))
    return out


def gptq_tensors(name: str, q: QTensor, *, act_order: bool = False, v1: bool = True) -> Tensors:
    """GPTQ, either convention; in act-order the columns of the groups are dealt like cards."""
    tensors = gptq.write(name, q, F16)
    stored = q.zeros - np.uint8(1) if v1 else q.zeros
    words = ops.pack(np.ascontiguousarray(stored.T), q.scheme.bits)
    tensors[f"{name}.qzeros"] = words.view(np.int32)
    if act_order:
        groups = np.random.default_rng(q.shape[1]).permutation(tensors[f"{name}.g_idx"])
        tensors[f"{name}.g_idx"] = groups.astype(np.int32)
    return tensors


def awq_tensors(name: str, q: QTensor) -> Tensors:
    """AWQ gemm."""

    def words(codes: np.ndarray) -> np.ndarray:
        eights = codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER].astype(np.uint32)
        return (
            (eights << (4 * np.arange(8, dtype=np.uint32))).sum(2, dtype=np.uint32).view(np.int32)
        )

    return {
        f"{name}.qweight": words(q.codes.T),
        f"{name}.qzeros": words(q.zeros.T),
        f"{name}.scales": np.ascontiguousarray(q.scales.T.astype(F16)),
    }


def bnb_tensors(name: str, q: QTensor, kind: str = "nf4") -> Tensors:
    """bitsandbytes, one level of scales."""
    codes = q.codes.reshape(-1)
    state = {"quant_type": kind, "blocksize": q.scheme.group, "dtype": "float32", "shape": q.shape}
    told = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {
        f"{name}.weight": (codes[::2] << 4 | codes[1::2])[:, None],
        f"{name}.weight.absmax": q.scales.reshape(-1),
        f"{name}.weight.quant_map": np.array(q.scheme.grid.values, np.float32),
        f"{name}.weight.quant_state.bitsandbytes__{kind}": told,
    }


def int8_tensors(name: str, q: QTensor) -> Tensors:
    """compressed-tensors, int-quantized."""
    found = {
        f"{name}.weight": (q.codes ^ np.uint8(128)).view(np.int8),
        f"{name}.weight_scale": q.scales,
    }
    if not q.scheme.symmetric:
        found[f"{name}.weight_zero_point"] = (q.zeros ^ np.uint8(128)).view(np.int8)
    return found


def dense_logits(folder: Path, ids: torch.Tensor, **options: object) -> torch.Tensor:
    """Of the float model with the weights that the folder means."""
    view = open_dense(folder)
    config = {k: v for k, v in view.checkpoint.config.items() if k != "quantization_config"}
    plain = folder.with_name(f"{folder.name}.dense")
    plain.mkdir(exist_ok=True)
    (plain / "config.json").write_text(json.dumps(config))
    tensors = {name: np.asarray(view.read(name), np.float32) for name in view.names()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    model = tiny_models.AutoModelForCausalLM.from_pretrained(plain, dtype="float32")
    with torch.no_grad():
        return model(ids, **options).logits


def load_bytes(folder: Path) -> Tensors:
    """All tensors of a folder."""
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def save_bytes(folder: Path, tensors: Tensors) -> None:
    """Those tensors in place of the folder's, in one file."""
    layout = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    safetensors.write(folder / "model.safetensors", layout, tensors.__getitem__, {"format": "pt"})


def ids() -> torch.Tensor:
    return tiny_models.batches()[0]


def logits(model: torch.nn.Module, tokens: torch.Tensor | None = None, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(ids() if tokens is None else tokens, **options).logits


def quant_linears(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, hf.QuantLinear)]


def files(folder: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name).tobytes() for name in checkpoint.entries}
