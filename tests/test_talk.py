"""`bitwright generate` and `bitwright chat`, and what stands behind them."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import folders
from bitwright import cli, demo, hf
from bitwright.hf import generation
from bitwright.hf.generation import Speaker
from bitwright.spec import InputError

PROMPT = "The man said that"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders.ours(demo.embedded_model(), tmp_path_factory.mktemp("tiny") / "q", "int4-g32")


@pytest.fixture
def chatty(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    yield folder
    (folder / "chat_template.jinja").unlink()


def run(*arguments: object, text: str | None = None):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=text)


def test_generate_streams_what_the_model_says(folder, tmp_path):
    """Greedy: the same as generate of transformers; figures beside it, text alone on stdout."""
    told = run("generate", folder, "--prompt", PROMPT, "--tokens", 9, "--json", tmp_path / "f.json")
    assert told.exit_code == 0, told.output
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    new = hf.load(folder).generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    assert told.stdout == tokenizer.decode(new, skip_special_tokens=True) + "\n"
    for figure in ("loaded", "prefill", "decode", "tokens/s", "peak memory"):
        assert figure in told.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["text"] + "\n" == told.stdout
    assert (figures["prompt_tokens"], figures["tokens"]) == (ids.shape[1], len(new))
    piped = run("generate", folder, "--prompt", "-", "--tokens", 9, "--quiet", text=PROMPT)
    assert (piped.stdout, piped.stderr) == (told.stdout, "")


@pytest.mark.parametrize("asked", [(), ("--fused",), ("--no-fused",)])
def test_layers_are_fused_unless_it_is_switched_off(folder, monkeypatch, asked):
    models = []

    def load(*args, **wishes):
        models.append(hf.load(*args, **wishes))
        return models[-1]

    monkeypatch.setattr(generation, "load", load)
    told = run("generate", folder, "--prompt", PROMPT, "--tokens", 2, *asked)
    assert told.exit_code == 0, told.output
    reason = "it was not asked for" if "--no-fused" in asked else ""
    assert set(hf.fusion(models[0]).values()) == {reason}


def test_drawn_tokens_follow_the_seed(folder):
    speaker, parts = Speaker(folder, mode="exact"), []
    drawn = [
        speaker.tell(PROMPT, parts.append, tokens=12, temperature=1.5, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert drawn[0].text == drawn[1].text != drawn[2].text
    assert "".join(parts) == "".join(done.text for done in drawn)
    assert all(done.prefill_speed > 0 and done.decode_speed > 0 for done in drawn)


def test_a_chat_goes_by_the_template_and_remembers(chatty):
    told = run("chat", chatty, "--tokens", 5, "--quiet", text="Good day\nWho are you?\n\nno more\n")
    assert told.exit_code == 0, told.output
    first, second = Speaker(chatty), []
    messages = [{"role": "user", "content": "Good day"}]
    said = first.answer(messages, second.append, tokens=5).text
    messages += [
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Who are you?"},
    ]
    said += "\n" + first.answer(messages, second.append, tokens=5).text + "\n"
    assert told.stdout == said


def test_bad_wishes_are_one_sentence(folder, tmp_path):
    told = run("generate", demo.embedded_model(), "--prompt", "x")
    assert told.exit_code == 2
    assert "in float: `bitwright quantize` makes one" in told.stderr
    assert told.stderr.count("\n") == 1
    speaker = Speaker(folder)
    with pytest.raises(InputError, match=r"wanted a prompt of 1 to \d+ tokens beside 5 new"):
        speaker.tell("word " * 5000, str, tokens=5)
    with pytest.raises(InputError, match=r"wanted a chat template in .*, found none"):
        speaker.answer([], str)
    assert run("generate", folder, "--prompt", "x", "--json", "-").exit_code == 2
    assert run("generate", tmp_path, "--prompt", "x").exit_code == 2
