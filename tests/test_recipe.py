"""Recipes from every form; unknown keys, names and options refused before anything runs."""

from __future__ import annotations

import json

import pytest
import yaml

import bitwright
from bitwright import recipe
from bitwright.demo import embedded_model
from bitwright.spec import InputError, Override, Recipe, RefusedError

WISH = {
    "scheme": "int3-g32-asym",
    "method": "rtn",
    "overrides": [
        {"pattern": "*.down_proj", "scheme": "int8-channel"},
        {"pattern": r"re:.*layers\.0\..*", "skip": True},
        {"pattern": "*.nowhere", "skip": True},
    ],
}
NAMES = ("layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "layers.1.mlp.up_proj")


def test_every_form_means_the_same(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(WISH))
    (tmp_path / "r.json").write_text(json.dumps(WISH))
    want = recipe.from_dict(WISH)
    assert want.overrides[0] == Override("*.down_proj", "int8-channel")
    for form in (WISH, want, tmp_path / "r.yaml", str(tmp_path / "r.json")):
        assert recipe.merge(form, {}) == want
    assert recipe.merge(None, {"scheme": "int2-g64"}) == Recipe(scheme="int2-g64")
    assert recipe.merge(want, {"scheme": "int8-tensor", "seed": None}).scheme == "int8-tensor"


def test_the_first_match_wins_and_unused_patterns_are_told():
    schemes, unused = recipe.resolve(recipe.from_dict(WISH), NAMES)
    assert [None if s is None else s.name for s in schemes.values()] == [
        None,
        "int8-channel",
        "int3-g32-asym",
    ]
    assert unused == ("*.nowhere",)


@pytest.mark.parametrize(
    ("wish", "kind", "said"),
    [
        ({"shceme": "int4-g64"}, InputError, r"wanted keys of Recipe \(scheme, .*got shceme"),
        ({"overrides": [{"patern": "x"}]}, InputError, r"keys of Override .*got patern"),
        ({"overrides": {"pattern": "x"}}, InputError, r"wanted a list of overrides, got dict"),
        (
            {"overrides": [{"pattern": "x"}]},
            InputError,
            r"either a scheme, or bits and group, or skip",
        ),
        ({"overrides": [{"pattern": "re:(", "skip": True}]}, InputError, r"'re:\(' is not valid"),
        ({"samples": "many"}, InputError, r"samples: .*got 'many'"),
        ({"samples": 0}, InputError, r"at least 1 sample"),
        ({"scheme": "int4"}, RefusedError, r"wanted <grid>-g<group>"),
        ({"method": "magic"}, RefusedError, r"a method of rtn, gptq, awq, awq\+gptq, got 'magic'"),
        (
            {"format": "gguf"},
            RefusedError,
            r"a format of compressed-tensors, gptq, bitwright, got 'gguf'",
        ),
        ({"options": {"dampnig": 0.1}}, InputError, r"damping, order, scales.*got dampnig"),
        ({"method": "rtn", "options": {"damping": 0.1}}, InputError, r"scales.*got damping"),
    ],
)
def test_wrong_wishes_are_one_sentence(tmp_path, wish, kind, said):
    with pytest.raises(kind, match=said):
        bitwright.quantize(embedded_model(), wish, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bits_and_group_change_the_recipes_scheme():
    wish = {
        "scheme": "int4-g64-asym",
        "overrides": [
            {"pattern": "*.0.*up_proj", "bits": 8},
            {"pattern": "*.down_proj", "group": "channel"},
            {"pattern": "*", "bits": 3, "group": 32},
        ],
    }
    schemes, _ = recipe.resolve(recipe.from_dict(wish), NAMES)
    names = [s.name for s in schemes.values()]
    assert names == ["int8-g64-asym", "int4-channel-asym", "int3-g32-asym"]
    for bad in ({"bits": 9}, {"group": "row"}, {"group": -3}):
        with pytest.raises(RefusedError, match=r"wanted <grid>"):
            recipe.from_dict({"overrides": [{"pattern": "*", **bad}]})
    with pytest.raises(InputError, match=r"or bits and group, or skip"):
        recipe.from_dict({"overrides": [{"pattern": "*", "bits": 3, "skip": True}]})


@pytest.mark.parametrize("text", ["- a\n- b\n", "scheme: [\n", ""])
def test_files_that_are_no_recipe(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=r"r\.yaml"):
        recipe.merge(tmp_path / "r.yaml", {})


def test_options_reach_the_solver(tmp_path):
    wish = {"samples": 4, "length": 64, "options": {"damping": 0.5, "order": "natural"}}
    report = bitwright.quantize(embedded_model(), wish, out=tmp_path / "out")
    assert {linear.damping for linear in report.linears} == {0.5}


WRONG_OPTIONS = [
    ({"scales": "magic"}, "scales must be feedback, hessian, mse or minmax, got 'magic'"),
    ({"order": "up"}, "order must be gar, act or natural, got 'up'"),
    ({"refine": "cxl"}, "refine must consist of c and l, got 'cxl'"),
    ({"alpha": 2.0}, 'alpha must be 0 to 1 or "auto", got 2.0'),
    ({"alpha": "most"}, "got 'most'"),
    ({"attention": -1}, "attention must be a whole number from 0 on, got -1"),
    ({"compare": 0.5}, "compare must be 0 or a number from 1 on, got 0.5"),
    ({"compare": "all"}, "compare must be 0 or a number from 1 on, got 'all'"),
    ({"damping": -0.1}, "damping must be a number from 0 on, got -0.1"),
]


@pytest.mark.parametrize(("options", "said"), WRONG_OPTIONS)
def test_options_that_no_solver_could_use_are_refused_at_once(options, said):
    with pytest.raises(InputError) as error:
        recipe.from_dict({"options": options})
    assert said in str(error.value)


def test_efforts():
    assert recipe.solver_options(recipe.from_dict({"effort": "fast"}))["refine"] == ""
    both = recipe.from_dict({"effort": "fast", "options": {"refine": "c"}})
    assert recipe.solver_options(both)["refine"] == "c"  # the option wins
    with pytest.raises(InputError, match="wanted an effort of fast, default, max, got 'turbo'"):
        recipe.from_dict({"effort": "turbo"})
