"""The `bitwright` command, up to where its imports have succeeded."""

from __future__ import annotations

import sys
from importlib import import_module

NEEDED = ("torch", "transformers", "greenlet", "huggingface_hub")  # by the command, not the package


def main() -> None:
    """Runs the command line; a missing extra and an early Ctrl-C are one sentence."""
    try:
        import_module("bitwright.cli").main()
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in NEEDED:
            raise
        sys.exit(f'bitwright: {missing} is missing: pip install "bitwright[hf]"')
    except KeyboardInterrupt:
        print("bitwright: interrupted", file=sys.stderr)
        sys.exit(130)
