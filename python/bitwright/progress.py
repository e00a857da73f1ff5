"""How a run tells how far it is; whoever shows it implements this."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """start(total, what) begins a phase of `total` steps; advance(n) counts them."""

    def start(self, total: int, what: str) -> None: ...
    def advance(self, n: int = 1) -> None: ...


class Silent:
    """Shows nothing."""

    def start(self, total: int, what: str) -> None:
        """Nothing to show."""

    def advance(self, n: int = 1) -> None:
        """Nothing to count."""


silent: Progress = Silent()
