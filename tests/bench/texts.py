"""What the tables are scored on: the shipped validation text, a book, next of kin to the half of
the calibration text that is books; the help topics of the Python that runs this, about the
language, dry; and modules of its library.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

MODULES = ("argparse.py", "json/decoder.py", "heapq.py", "statistics.py")


def scored(folder: Path) -> list[str | None]:
    """Texts for bitwright.compare; all but the first are written to the folder."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts = {
        "topics": "\n\n".join(topics[name] for name in sorted(topics)),
        "code": "\n".join((library / name).read_text(encoding="utf-8") for name in MODULES),
    }
    files = [folder / f"{name}.txt" for name in parts]
    for file, text in zip(files, parts.values(), strict=True):
        file.write_text(text, encoding="utf-8")
    return [None, *map(str, files)]
