"""Calibration text as token windows (N, length).

A text is tokenised without special tokens and cut into N windows that start at
i (T - length) // (N - 1), i = 0 .. N - 1, for T tokens: evenly spaced, overlapping only where the
text is short. Lists of strings, JSONL lines and data set rows are joined by a blank line and
treated the same; chats go through the tokenizer's template first. Token ids are taken as they are.

Two texts are shipped: `books`, old English prose, and `mixed`, which is taken where none is given:
windows of books in turn with those of a text of many kinds. These are up to half; fewer where they
would overlap (31 of 128 windows of 2048 tokens). A file that has such a name goes first.

Tokenizers take some 150 bytes for each character, so they get a text in pieces, cut before a space:
there the common pre-tokenizers cut too, and the tokens are those of the whole text.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from bitwright.spec import InputError, Recipe

SHIPPED = ("mixed", "books")
BOOKS = "the shipped text books, old English prose (public domain)"
VARIOUS = "samples of a model, source code and documents"
ROWS_PER_SAMPLE = 64  # rows of a data set read at most, per wanted window
_ROWS = "[calibration] wanted rows to put into the chat template (JSONL, a data set, strings)"
PIECE = 1 << 16  # characters tokenised at a time: about 10 MB


@dataclass(frozen=True, eq=False)
class Tokens:
    """ids: int64 (N, length). description: where they come from, for the report."""

    ids: npt.NDArray[np.int64]
    description: str

    @property
    def total(self) -> int:
        return int(self.ids.size)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder; InputError if it has none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"[calibration] wanted a tokenizer in {folder}: {line}") from error


def _shipped(name: str) -> str:
    packed = resources.files("bitwright").joinpath("data", name).read_bytes()
    return lzma.decompress(packed).decode("utf-8")


def shipped_name(source: Any) -> str | None:
    """The name of the shipped text that is meant, None if it is none of them."""
    if source is None:
        return SHIPPED[0]
    known = isinstance(source, str | Path) and str(source) in SHIPPED
    return str(source) if known and not Path(source).exists() else None


def require_text(source: str | Path) -> None:
    """InputError unless `source` is a file or the name of a shipped text."""
    if shipped_name(source) is not None:
        return
    why = f"no such file, nor the name of a shipped text ({', '.join(SHIPPED)})"
    try:
        if Path(source).is_file():
            return
    except OSError as error:
        why = str(error.strerror)
    raise InputError(f"[calibration] could not read the text file {str(source)[:200]}: {why}")


def books() -> str:
    """The shipped text `books`."""
    return _shipped("books.txt.xz")


def various() -> str:
    """What `mixed` has beside books: samples of a model, source code, technical prose."""
    return _shipped("various.txt.xz")


def validation_text() -> str:
    """The shipped evaluation text: the start of a book that is not in the calibration text."""
    return _shipped("validation.txt.xz")


def collect(source: Any, tokenizer: Any, recipe: Recipe, vocabulary: int) -> Tokens:
    """recipe.samples windows of recipe.length tokens from a source (see the top of this file).

    source: None, a shipped text's name, path of a text or .jsonl file, list of strings or of
    chats, data set, or token ids. InputError: empty or too short, all padding, ids outside the
    vocabulary, an unreadable line.
    """
    if source is not None and are_ids(source):
        ids, what = _given(source, recipe), "given token ids"
    elif name := shipped_name(source):
        ids, what = _windows_of(name, tokenizer, recipe)
    else:
        text, what = _text(source, tokenizer, recipe)
        ids = windows(tokenise(text, tokenizer), recipe.samples, recipe.length, what)
    _check(ids, tokenizer, vocabulary)
    n, length = ids.shape
    return Tokens(ids, f"{n} x {length} = {n * length} tokens of {what}")


def _windows_of(name: str, tokenizer: Any, recipe: Recipe) -> tuple[npt.NDArray[np.int64], str]:
    if recipe.chat:
        raise InputError(f"{_ROWS}, got the shipped text {name}")
    samples, length, beside = recipe.samples, recipe.length, np.empty(0, np.int64)
    if name == "mixed" and samples > 1:
        beside = tokenise(various(), tokenizer)
    count = min(samples // 2, len(beside) // length)
    ids = windows(tokenise(books(), tokenizer), samples - count, length, BOOKS)
    if not count:
        return ids, BOOKS
    both = np.concatenate([ids, windows(beside, count, length, VARIOUS)])
    turns = np.concatenate([(np.arange(n) + 0.5) / n for n in (len(ids), count)])
    what = f"the shipped texts: {len(ids)} windows of old English prose, {count} of {VARIOUS}"
    return both[np.argsort(turns, kind="stable")], what


def windows(
    tokens: npt.NDArray[np.int64], samples: int, length: int, what: str
) -> npt.NDArray[np.int64]:
    """Evenly spaced windows (samples, length) of a token sequence."""
    if len(tokens) < length:
        raise InputError(
            f"[calibration] wanted {samples} windows of {length} tokens, {what} has "
            f"{len(tokens)} tokens; a shorter --length or a longer text would work"
        )
    last = len(tokens) - length
    starts = [i * last // max(samples - 1, 1) for i in range(samples)]
    if samples > 1 and last < samples - 1:
        raise InputError(
            f"[calibration] wanted {samples} different windows of {length} tokens, {what} has "
            f"{len(tokens)} tokens, enough for {last + 1}"
        )
    return np.stack([tokens[s : s + length] for s in starts])


def tokenise(text: str, tokenizer: Any, most: int | None = None) -> npt.NDArray[np.int64]:
    """The tokens of a text, without special tokens; only the first `most` where that is given."""
    found, total = [np.empty(0, np.int64)], 0
    for piece in _pieces(text):
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        found.append(np.asarray(ids, np.int64))
        total += len(ids)
        if most is not None and total >= most:
            break
    return np.concatenate(found)[:most]


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most PIECE characters; each but the first begins with a space, or
    with the end of a line, or in the middle of a word that long.
    """
    at = 0
    while at < len(text):
        end = at + PIECE
        if end < len(text):
            cuts = (text.rfind(space, at + 1, end) for space in " \n")
            end = next((cut for cut in cuts if cut > at), end)
        yield text[at:end]
        at = end


def are_ids(source: Any) -> bool:
    """Whether `source` is token ids rather than text: an array, a tensor, or rows of integers."""
    if isinstance(source, str | Path | Mapping):
        return False
    if hasattr(source, "ndim"):
        return True
    first = source[0] if isinstance(source, Sequence) and len(source) else None
    return hasattr(first, "ndim") or (
        isinstance(first, Sequence) and bool(first) and isinstance(first[0], int)
    )


def _given(source: Any, recipe: Recipe) -> npt.NDArray[np.int64]:
    try:
        ids = np.asarray(source)
    except ValueError as error:
        raise InputError(
            "[calibration] wanted token ids in rows of one length, got ragged rows"
        ) from error
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise InputError(
            f"[calibration] wanted integer token ids (N, length), got {ids.dtype} of shape "
            f"{ids.shape}"
        )
    return np.ascontiguousarray(ids[: recipe.samples], np.int64)


def _text(source: Any, tokenizer: Any, recipe: Recipe) -> tuple[str, str]:
    if isinstance(source, str | Path):
        path = Path(source)
        if recipe.chat and path.suffix != ".jsonl":
            raise InputError(f"{_ROWS}, got the text file {source}")
        if path.suffix == ".jsonl":
            return _join(_jsonl(path), tokenizer, recipe), path.name
        return _read(path), path.name
    if isinstance(source, Iterable):
        what = "a data set" if hasattr(source, "column_names") else "a list of texts"
        return _join(enumerate(_drawn(source, recipe)), tokenizer, recipe), what
    raise InputError(
        "[calibration] wanted a text or JSONL file, a data set, a list of strings or token "
        "ids, got "
        f"{type(source).__name__}"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"[calibration] could not read the text file {path}: {error}") from error


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise InputError(
                f"[calibration] line {number} of {path} is not JSON: {error}"
            ) from error


def _drawn(source: Any, recipe: Recipe) -> Iterator[Any]:
    """Rows in the order of the seed where their number is known, else as they come."""
    limit = recipe.samples * ROWS_PER_SAMPLE
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        order = np.random.default_rng(recipe.seed).permutation(len(source))[:limit]
        yield from (source[int(i)] for i in order)
        return
    for i, row in enumerate(source):
        if i == limit:
            return
        yield row


def _join(rows: Iterable[tuple[int, Any]], tokenizer: Any, recipe: Recipe) -> str:
    return "\n\n".join(_row_text(number, row, tokenizer, recipe.chat) for number, row in rows)


def _row_text(number: int, row: Any, tokenizer: Any, chat: bool) -> str:
    if isinstance(row, str):
        row = {"messages": [{"role": "user", "content": row}]} if chat else {"text": row}
    if isinstance(row, list):
        row = {"messages": row}
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
        try:
            return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        except Exception as error:
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(
                f"[calibration] chat {number} does not fit the template: {line}"
            ) from error
    text = row.get("text") if isinstance(row, Mapping) else None
    if not isinstance(text, str):
        raise InputError(
            f'[calibration] wanted a string, "text" or "messages" in row {number}, got '
            f"{list(row) if isinstance(row, Mapping) else type(row).__name__}"
        )
    return text


def _check(ids: npt.NDArray[np.int64], tokenizer: Any, vocabulary: int) -> None:
    bad = ids[(ids < 0) | (ids >= vocabulary)]
    if bad.size:
        raise InputError(
            f"[calibration] wanted token ids below {vocabulary}, the vocabulary, got {int(bad[0])}"
        )
    padding = getattr(tokenizer, "pad_token_id", None)
    if padding is not None and (ids == padding).all():
        raise InputError(f"[calibration] wanted text, got nothing but the padding token {padding}")
