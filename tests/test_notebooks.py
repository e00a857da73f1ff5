"""Every notebook runs as it stands, and is stored as it ran.

Run as a script, this file executes all notebooks and stores them with their outputs.
"""

from __future__ import annotations

import re
import sys
import tempfile
from contextlib import chdir
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SECONDS_PER_CELL = 300
MAX_BYTES = 500_000
ANY_PATH = re.compile(r"(?<![\w.])/(home|root|tmp|usr|var|Users)/|[A-Z]:\\")


def run(notebook: NotebookNode) -> None:
    """Executes in place. The working directory also holds the sockets of the kernel: with files
    instead of ports, kernels that start at the same time cannot take each other's."""
    NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        kernel_name="python3",
        record_timing=False,
        config=Config({"KernelManager": {"transport": "ipc"}}),
    ).execute()


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def texts(notebook: NotebookNode) -> list[str]:
    """What was printed, and the text forms of what was shown."""
    printed = [output.text for output in outputs(notebook) if "text" in output]
    shown = [output.data for output in outputs(notebook) if "data" in output]
    return printed + [data[kind] for data in shown for kind in data if kind.startswith("text/")]


def kinds(notebook: NotebookNode) -> list[list[str]]:
    """What each cell puts out: pictures, tables, text."""
    return [
        [kind for output in cell.get("outputs", ()) for kind in sorted(output.get("data", ()))]
        for cell in notebook.cells
    ]


def rows(notebook: NotebookNode) -> list[str]:
    """The first cell of every row of a Markdown table that was put out; figures and what models
    said stand in the others."""
    lines = [line for text in texts(notebook) for line in text.splitlines()]
    return [line.split("|")[1].strip() for line in lines if line.startswith("|")]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures go into the notebook
    notebook = nbformat.read(path, as_version=4)
    stored, told = kinds(notebook), rows(notebook)
    run(notebook)
    assert not [text for text in texts(notebook) if "Warning:" in text]
    assert kinds(notebook) == stored
    assert rows(notebook) == told


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_its_outputs_and_nothing_else(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == METADATA
    assert all(cell.metadata == {} for cell in notebook.cells)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.get("name") != "stderr" for output in outputs(notebook))
    assert not [text for text in texts(notebook) if ANY_PATH.search(text)]
    assert path.stat().st_size < MAX_BYTES


def main() -> None:
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            run(notebook)
        notebook.metadata = nbformat.from_dict(METADATA)
        for cell in notebook.cells:
            cell.metadata = nbformat.from_dict({})
        nbformat.validate(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    sys.exit(main())
