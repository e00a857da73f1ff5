"""Names to modules: each package lists its modules in NAMES; only those are ever imported."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

PACKAGES = ("grids", "solvers", "transforms", "formats", "archs")
METHODS = ("rtn", "gptq", "awq", "awq+gptq")  # a solver, a transform or both


def readers() -> tuple[str, ...]:
    """The formats that are read: those that are written, and those of other tools alone."""
    listed: tuple[str, ...] = import_module("bitwright.formats").READ_ONLY
    return names("formats") + listed


def names(package: str) -> tuple[str, ...]:
    """The modules that `package` lists, as users spell them (with dashes)."""
    listed: tuple[str, ...] = import_module(f"bitwright.{package}").NAMES
    return tuple(name.replace("_", "-") for name in listed)


def get(package: str, name: str) -> ModuleType:
    """The module `name` of `package`; ValueError with the list of known ones if it is none."""
    if name not in (readers() if package == "formats" else names(package)):
        known = ", ".join(names(package))
        raise ValueError(f"[registry] no {package.rstrip('s')} named {name!r}; known: {known}")
    return import_module(f"bitwright.{package}.{name.replace('-', '_')}")
