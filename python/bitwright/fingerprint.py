"""Everything that a result depends on, as text: what a resumed run must share with the first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitwright import ops
from bitwright.calib import device, precision
from bitwright.job import Job


def digest(*parts: bytes) -> str:
    """The first 16 hexadecimal digits of SHA-256 over the parts."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:16]


def _file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def fingerprint(job: Job, ids: npt.NDArray[np.int64] | None) -> Mapping[str, str]:
    """Recipe, tokens, config, tensor files, versions, instruction set, device, dtype, threads,
    batch."""
    recipe = asdict(job.recipe)
    facts = {
        "bitwright": version("bitwright"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "isa": ops.isa(),
        "dtype": job.dtype,
        "device": device.label(job.device),
        "matmul": precision.choice(job.dtype, job.device.type) or "as set",
        "threads": str(job.threads),
        "batch": str(job.batch),
        "config": _file(job.checkpoint.path / "config.json"),
        "tokens": "none" if ids is None else f"{ids.shape} {digest(ids.tobytes())}",
    }
    facts |= {f"recipe.{key}": json.dumps(value, sort_keys=True) for key, value in recipe.items()}
    facts |= {f"tensors.{path.name}": _file(path) for path in job.checkpoint.files}
    return facts
