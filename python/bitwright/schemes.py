"""Scheme names: a grid (`int<bits>`, `fp4`, `nf4`), `g<group>`, `channel` or `tensor`, then `-asym`
and the grid of the scales if it is not bf16; and short names for those that hardware knows."""

from __future__ import annotations

import re
from typing import cast

from bitwright import registry
from bitwright.spec import Grid, RefusedError, ScaleGrid, Scheme

_NAME = re.compile(
    r"(?P<grid>[a-z]+\d+)-(?:(?P<where>channel|tensor)|g(?P<group>[1-9]\d*))(?P<asym>-asym)?"
    r"(?:-(?P<scale>fp16|fp32|e8m0|e4m3))?",
    re.ASCII,
)


ALIASES = {"mxfp4": "fp4-g32-e8m0", "nvfp4": "fp4-g16-e4m3"}  # OCP MX 1.0; NVIDIA


def grids() -> dict[str, Grid]:
    """Every known grid by name."""
    found: dict[str, Grid] = {}
    for name in registry.names("grids"):
        found.update(registry.get("grids", name).GRIDS)
    return found


def parse(name: str) -> Scheme:
    """The scheme of a name such as "int4-g64" or "int3-channel-asym"; RefusedError if none."""
    match = _NAME.fullmatch(ALIASES.get(name, name))
    known = grids()
    if match is None or match["grid"] not in known:
        raise RefusedError(
            "[scheme] wanted <grid>-g<group>, <grid>-channel or <grid>-tensor, then -asym and "
            "-fp16, -fp32, -e8m0 or -e4m3 (scales) if wanted, "
            f"with a grid of {', '.join(known)}; or {', '.join(ALIASES)}; got {name!r}"
        )
    group = int(match["group"]) if match["group"] else {"channel": 0, "tensor": -1}[match["where"]]
    grid, symmetric = known[match["grid"]], match["asym"] is None
    if not symmetric and not grid.uniform:
        raise RefusedError(f"[scheme] {grid.name} is a table without zero points, got {name!r}")
    if group == -1 and match["scale"] == "e4m3":
        raise RefusedError(f"[scheme] e4m3 scales want groups or channels, got {name!r}")
    scale = cast(ScaleGrid, match["scale"] or "bf16")
    return Scheme(grid, group, symmetric=symmetric, scale=scale)
