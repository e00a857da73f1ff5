"""Scheme names: `int<bits>-` and `g<group>`, `channel` or `tensor`, then `-asym` if wanted."""

from __future__ import annotations

import re

from bitwright import registry
from bitwright.spec import Grid, RefusedError, Scheme

_NAME = re.compile(
    r"(?P<grid>[a-z]+\d+)-(?:(?P<where>channel|tensor)|g(?P<group>[1-9]\d*))(?P<asym>-asym)?",
    re.ASCII,
)


def grids() -> dict[str, Grid]:
    """Every known grid by name."""
    found: dict[str, Grid] = {}
    for name in registry.names("grids"):
        found.update(registry.get("grids", name).GRIDS)
    return found


def parse(name: str) -> Scheme:
    """The scheme of a name such as "int4-g64" or "int3-channel-asym"; RefusedError if none."""
    match = _NAME.fullmatch(name)
    known = grids()
    if match is None or match["grid"] not in known:
        raise RefusedError(
            "[scheme] wanted <grid>-g<group>, <grid>-channel or <grid>-tensor, then -asym if "
            "wanted, "
            f"with a grid of {', '.join(known)}; got {name!r}"
        )
    group = int(match["group"]) if match["group"] else {"channel": 0, "tensor": -1}[match["where"]]
    return Scheme(known[match["grid"]], group, symmetric=match["asym"] is None)
