"""Modules that are imported when something of them is first used, so that `--help` need not wait
for torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Deferred:
    """The module `name`, imported with the first attribute that is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
