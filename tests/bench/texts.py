"""What the tables are scored on: the shipped validation text, which is of the kind that calibration
has, and one that is not, the help topics of the Python that runs this (about the language, dry)."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics


def both(folder: Path) -> list[str | None]:
    """Texts for bitwright.compare; the second is written to the folder."""
    file = folder / "topics.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return [None, str(file)]
