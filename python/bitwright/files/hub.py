"""A checkpoint by name: a folder as it is, or a hub id, fetched through huggingface_hub.

Only weights in safetensors, configs, tokenizers and licences are fetched: no code, no pickles.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from bitwright.spec import InputError

FETCHED = (
    "*.safetensors", "*.json", "tokenizer*", "merges.txt", "vocab.*", "spiece.model",
    "chat_template*", "LICENSE*", "LICENCE*", "NOTICE*",
)  # fmt: skip
_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(source: str | Path, config: bool = False) -> Path:
    """The folder of a checkpoint. A text like "org/name" that is no folder here is a hub id.

    config: its config is enough: the file may be named too, and from the hub only it is fetched."""
    path = Path(source)
    if path.is_dir() or (config and path.is_file()):
        return path
    if path.exists():
        raise InputError(f"[checkpoint] wanted a folder or a hub id, got the file {source}")
    if not _ID.fullmatch(str(source)):
        raise InputError(f"[checkpoint] wanted a folder or a hub id like org/name, got {source}")
    wanted = ["config.json"] if config else list(FETCHED)
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"[checkpoint] {source} is no folder here and could not be fetched from the hub: {line}"
        ) from error
