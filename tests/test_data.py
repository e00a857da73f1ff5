"""Calibration sources to windows: files, rows, chats, ids; what cannot be used is one sentence."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch

from bitwright.calib.data import (
    PIECE,
    are_ids,
    books,
    collect,
    load_tokenizer,
    require_text,
    tokenise,
    validation_text,
    various,
    windows,
)
from bitwright.demo import embedded_model
from bitwright.spec import InputError, Recipe

VOCABULARY = 4096
SMALL = Recipe(samples=4, length=16)
TEXTS = [f"It was the {n}th of the month, and the wind had gone down. " * 8 for n in range(20)]


@pytest.fixture(scope="module")
def tokenizer():
    found = load_tokenizer(embedded_model())
    found.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    return found


def ids(source, tokenizer, **changes):
    recipe = Recipe(**{"samples": 4, "length": 16, **changes})
    return collect(source, tokenizer, recipe, VOCABULARY).ids


def test_the_shipped_texts():
    assert len(books().encode()) >= 400_000
    assert validation_text()[:500] not in books()
    assert "\ufffd" not in various()


def test_the_default_says_what_it_is(tokenizer):
    tokens = collect(None, tokenizer, Recipe(), VOCABULARY)
    assert tokens.ids.shape == (128, 512)
    assert "64 windows of old English prose, 64 of samples of a model, " in tokens.description
    assert "65536 tokens" in tokens.description
    plain = collect("books", tokenizer, Recipe(), VOCABULARY)
    assert "the shipped text books, old English prose (" in plain.description
    whole = tokenise(books(), tokenizer)
    assert np.array_equal(plain.ids, windows(whole, 128, 512, ""))


@pytest.mark.parametrize(("samples", "length", "beside"), [(128, 512, 64), (5, 16, 2), (1, 16, 0)])
def test_mixed_takes_windows_of_both_in_turn(tokenizer, samples, length, beside):
    recipe = Recipe(samples=samples, length=length)
    tokens = collect("mixed", tokenizer, recipe, VOCABULARY)
    found, what = tokens.ids, tokens.description
    assert np.array_equal(found, ids(None, tokenizer, samples=samples, length=length))
    first = windows(tokenise(books(), tokenizer), samples - beside, length, "")
    assert np.array_equal(found[::2], first)
    assert (f"{beside} of samples" in what) == bool(beside) == ("text books" not in what)
    if beside:
        second = windows(tokenise(various(), tokenizer), beside, length, "")
        assert np.array_equal(found[1::2], second)


def test_mixed_takes_no_more_of_the_other_text_than_it_has(tokenizer):
    tokens = tokenise(various(), tokenizer)
    length = len(tokens) // 3
    found = ids("mixed", tokenizer, samples=12, length=length)
    where = [i for i, row in enumerate(found) if (row[:64] == tokens[:64]).all()]
    ends = [i for i, row in enumerate(found) if (row[-64:] == tokens[-64:]).all()]
    assert (len(found), where, ends) == (12, [2], [10])
    prose = windows(tokenise(books(), tokenizer), 9, length, "")
    assert sum(any(np.array_equal(row, one) for one in prose) for row in found) == 9


def test_a_file_goes_before_a_shipped_text_of_its_name(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").write_text("".join(TEXTS))
    assert np.array_equal(ids("books", tokenizer), ids(tmp_path / "books", tokenizer))
    for name in ("books", "mixed", tmp_path / "books"):
        require_text(name)
    with pytest.raises(InputError, match=r"bocks: no such file, nor .* \(mixed, books\)"):
        require_text("bocks")
    with pytest.raises(InputError, match="It was the 0th of the month"):  # the text itself
        require_text("".join(TEXTS))
    with pytest.raises(InputError, match=r"chat template .* got the shipped text mixed"):
        ids("mixed", tokenizer, chat=True)


def test_windows_are_evenly_spaced_over_the_whole_text():
    found = windows(np.arange(1000), 4, 100, "a text")
    assert found[:, 0].tolist() == [0, 300, 600, 900]
    assert np.array_equal(found[3], np.arange(900, 1000))
    assert windows(np.arange(100), 1, 100, "a text").tolist() == [list(range(100))]
    with pytest.raises(InputError, match=r"4 different windows of 100 .* enough for 3"):
        windows(np.arange(102), 4, 100, "a text")


def test_a_text_file_is_tokenised_whole_without_special_tokens(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(TEXTS))
    whole = tokenizer("".join(TEXTS), add_special_tokens=False)["input_ids"]
    found = ids(path, tokenizer)
    last = len(whole) - 16
    want = [whole[i * last // 3 : i * last // 3 + 16] for i in range(4)]
    assert found.tolist() == want
    assert np.array_equal(found, ids(str(path), tokenizer))


def test_a_long_text_in_pieces_gives_the_tokens_of_the_whole(tokenizer):
    text = books()[: 3 * PIECE]
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenise(text, tokenizer).tolist() == whole
    assert tokenise(text, tokenizer, 100).tolist() == whole[:100]


def test_jsonl_lists_data_sets_and_generators_agree(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n\n")
    joined = tokenizer("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"]
    want = windows(np.array(joined), 4, 16, "")
    assert np.array_equal(ids(path, tokenizer), want)
    assert np.array_equal(ids((text for text in TEXTS), tokenizer), want)
    listed = ids(TEXTS, tokenizer)
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    assert np.array_equal(ids(rows, tokenizer), listed)


def test_the_seed_draws_the_rows(tokenizer):
    assert np.array_equal(ids(TEXTS, tokenizer, seed=1), ids(TEXTS, tokenizer, seed=1))
    assert not np.array_equal(ids(TEXTS, tokenizer, seed=1), ids(TEXTS, tokenizer, seed=2))


def test_chats_go_through_the_template(tokenizer):
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    rows = [{"messages": chat} for chat in chats]
    want = ids(TEXTS, tokenizer, chat=True)
    assert np.array_equal(ids(chats, tokenizer), want)
    assert np.array_equal(ids(rows, tokenizer), want)
    assert not np.array_equal(ids(TEXTS, tokenizer), want)
    tokenizer_without = load_tokenizer(embedded_model())
    tokenizer_without.chat_template = None
    with pytest.raises(InputError, match=r"chat \d+ does not fit the template"):
        ids(chats, tokenizer_without)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, lambda rows: rows])
def test_token_ids_are_taken_as_they_are(tokenizer, kind):
    rows = np.arange(64).reshape(4, 16).tolist()
    assert are_ids(kind(rows))
    assert ids(kind(rows), tokenizer).tolist() == rows


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "has 0 tokens"),
        (["too short"], r"wanted 4 windows of 16 tokens, .* a shorter --length or a longer text"),
        (np.full((4, 16), 5000), r"token ids below 4096, the vocabulary, got 5000"),
        (np.full((4, 16), -1), r"got -1"),
        ([[1, 2, 3], [1, 2]], "ragged rows"),
        (np.ones((4, 16)), "integer token ids"),
        ([{"body": "x"}], r'wanted a string, "text" or "messages" in row \d+, got \[\'body\'\]'),
        (3, "wanted a text or JSONL file, a data set"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tokenizer, source, said):
    with pytest.raises(InputError, match=said) as refused:
        ids(source, tokenizer)
    assert "\n" not in str(refused.value)


def test_nothing_but_padding(tokenizer):
    padding = tokenizer.pad_token_id
    if padding is None:
        tokenizer.pad_token_id = padding = 0
    with pytest.raises(InputError, match=r"nothing but the padding token"):
        ids(np.full((4, 16), padding), tokenizer)


def test_files_that_cannot_be_read(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{broken\n')
    with pytest.raises(InputError, match=r"line 2 of .*rows.jsonl is not JSON"):
        ids(tmp_path / "rows.jsonl", tokenizer)
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\xff")
    for path in ("text.txt", "nowhere.txt"):
        with pytest.raises(InputError, match=r"could not read the text file"):
            ids(tmp_path / path, tokenizer)
    with pytest.raises(InputError, match=r"wanted a tokenizer in"):
        load_tokenizer(tmp_path)
