"""Scheme names: a grid (`int<bits>`, `fp4`, `nf4`), `g<group>`, `channel` or `tensor`, then `-asym`
or `-offset`, the grid of the scales if it is not bf16, and `-<block>x<bits>` for scales of two
levels; and short names for those that hardware knows."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import cast

from bitwright import registry
from bitwright.spec import Grid, RefusedError, ScaleGrid, Scheme

_NAME = re.compile(
    r"(?P<grid>[a-z]+\d+)-(?:(?P<where>channel|tensor)|g(?P<group>[1-9]\d*))"
    r"(?P<asym>-asym|-offset)?"
    r"(?:-(?P<scale>fp16|fp32|e8m0|e4m3))?"
    r"(?:-(?P<block>[1-9]\d*)x(?P<scale_bits>[2-8]))?",
    re.ASCII,
)


ALIASES = {"mxfp4": "fp4-g32-e8m0", "nvfp4": "fp4-g16-e4m3"}  # OCP MX 1.0; NVIDIA


def grids() -> dict[str, Grid]:
    """Every known grid by name."""
    found: dict[str, Grid] = {}
    for name in registry.names("grids"):
        found.update(registry.get("grids", name).GRIDS)
    return found


@lru_cache(maxsize=256)
def parse(name: str) -> Scheme:
    """The scheme of a name such as "int4-g64" or "int3-channel-asym"; RefusedError if none."""
    match = _NAME.fullmatch(ALIASES.get(name, name))
    known = grids()
    if match is None or match["grid"] not in known:
        raise RefusedError(
            "[scheme] wanted <grid>-g<group>, <grid>-channel or <grid>-tensor, then -asym or "
            "-offset, -fp16, -fp32, -e8m0 or -e4m3 (scales) and -<block>x<bits> (two levels) if "
            "wanted, "
            f"with a grid of {', '.join(known)}; or {', '.join(ALIASES)}; got {name!r}"
        )
    group = int(match["group"]) if match["group"] else {"channel": 0, "tensor": -1}[match["where"]]
    grid, symmetric = known[match["grid"]], match["asym"] is None
    scale = cast(ScaleGrid, match["scale"] or "bf16")
    offset, block = match["asym"] == "-offset", int(match["block"] or 0)
    bits = int(match["scale_bits"] or 0)
    return Scheme(grid, group, symmetric, scale, offset=offset, block=block, scale_bits=bits)
