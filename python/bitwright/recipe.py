"""Recipes from keywords, dicts, YAML and JSON, checked; and what they mean for each linear.

    scheme: int4-g64
    method: gptq
    overrides:
      - {pattern: "*.down_proj", scheme: int8-channel}
      - {pattern: "*.v_proj", bits: 8, group: 32}
      - {pattern: "re:.*layers\\.0\\..*", skip: true}

Unknown keys are refused. The first override whose pattern matches a linear's full name wins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from fnmatch import fnmatchcase
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from bitwright import registry, schemes
from bitwright.spec import InputError, Override, Recipe, RefusedError, Scheme

_ADAPTER = TypeAdapter(Recipe)


def load(path: str | Path) -> dict[str, Any]:
    """The wishes in a YAML or JSON file, not yet checked."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"[recipe] could not read {path}: {line}") from error
    if not isinstance(content, dict):
        raise InputError(f"[recipe] wanted keys and values in {path}, got {type(content).__name__}")
    return content


def from_dict(wishes: Mapping[str, Any]) -> Recipe:
    """A checked Recipe; InputError names unknown keys and wrong values."""
    _require_known(wishes, Recipe)
    overrides = wishes.get("overrides") or ()
    if not isinstance(overrides, list | tuple):
        raise InputError(f"[recipe] wanted a list of overrides, got {type(overrides).__name__}")
    for override in overrides:
        if isinstance(override, Mapping):
            _require_known(override, Override)
    try:
        recipe = _ADAPTER.validate_python(dict(wishes))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"[recipe] {where}: {first['msg'].lower()}, got {first.get('input')!r}"
        ) from error
    check(recipe)
    return recipe


def _require_known(wishes: Mapping[str, Any], kind: type) -> None:
    known = [field.name for field in fields(kind)]
    strange = [str(key) for key in wishes if key not in known]
    if strange:
        raise InputError(
            f"[recipe] wanted keys of {kind.__name__} ({', '.join(known)}), got "
            f"{', '.join(strange)}"
        )


def merge(
    recipe: Recipe | Mapping[str, Any] | str | Path | None, wishes: Mapping[str, Any]
) -> Recipe:
    """A recipe from any of its forms with single fields replaced by keywords (None: not given)."""
    if recipe is None:
        base: Mapping[str, Any] = {}
    elif isinstance(recipe, Recipe):
        base = asdict(recipe)
    elif isinstance(recipe, Mapping):
        base = recipe
    else:
        base = load(recipe)
    return from_dict({**base, **{k: v for k, v in wishes.items() if v is not None}})


def check(recipe: Recipe) -> None:
    """RefusedError for an unknown scheme, method or format, InputError for impossible numbers."""
    default = schemes.parse(recipe.scheme)
    if recipe.method not in registry.METHODS:
        raise RefusedError(
            f"[recipe] wanted a method of {', '.join(registry.METHODS)}, got {recipe.method!r}"
        )
    if recipe.format not in registry.names("formats"):
        known = ", ".join(registry.names("formats"))
        raise RefusedError(f"[recipe] wanted a format of {known}, got {recipe.format!r}")
    if recipe.samples < 1 or recipe.length < 2:
        raise InputError(
            f"[recipe] wanted at least 1 sample of 2 tokens, got {recipe.samples} of "
            f"{recipe.length}"
        )
    _require_options(recipe)
    for override in recipe.overrides:
        _matcher(override.pattern)
        wishes = (override.skip, override.scheme is not None, _changes(override))
        if sum(wishes) != 1:
            raise InputError(
                "[recipe] wanted either a scheme, or bits and group, or skip for the override "
                f"{override.pattern!r}"
            )
        _chosen(override, default)


def _require_options(recipe: Recipe) -> None:
    """The effort and the options must be known to the solver that the method ends in."""
    solver = registry.get("solvers", solver_of(recipe.method))
    if recipe.effort not in solver.EFFORTS:
        raise InputError(
            f"[recipe] wanted an effort of {', '.join(solver.EFFORTS)}, got {recipe.effort!r}"
        )
    keywords = signature(solver.solve).parameters.values()
    inner = {"prepared", "whole", "last", "errors"}
    known = [p.name for p in keywords if p.kind is p.KEYWORD_ONLY and p.name not in inner]
    strange = [str(key) for key in recipe.options if key not in known]
    if strange:
        raise InputError(
            f"[recipe] wanted options of {recipe.method} ({', '.join(known)}), got "
            f"{', '.join(strange)}"
        )
    solver.check(solver_options(recipe))


def solver_options(recipe: Recipe) -> dict[str, Any]:
    """The solver's keywords: those of the effort, then the recipe's own."""
    solver = registry.get("solvers", solver_of(recipe.method))
    return {**solver.EFFORTS[recipe.effort], **recipe.options}


def solver_of(method: str) -> str:
    """The solver that a method ends in: AWQ alone is followed by rounding."""
    return "rtn" if method in ("rtn", "awq") else "gptq"


def _changes(override: Override) -> bool:
    return override.bits is not None or override.group is not None


def _chosen(override: Override, default: Scheme) -> Scheme | None:
    """The scheme that an override asks for, None where it skips."""
    if override.skip:
        return None
    if override.scheme is not None:
        return schemes.parse(override.scheme)
    grid = default.grid.name if override.bits is None else f"int{override.bits}"
    where = default.name.split("-")[1]
    if override.group is not None:
        where = f"g{override.group}" if isinstance(override.group, int) else override.group
    rest = default.name.split("-")[2:]
    return schemes.parse("-".join([grid, where, *rest]))


def _matcher(pattern: str) -> re.Pattern[str] | None:
    if not pattern.startswith("re:"):
        return None
    try:
        return re.compile(pattern[3:])
    except re.error as error:
        raise InputError(f"[recipe] the pattern {pattern!r} is not valid: {error}") from error


def matches(pattern: str, name: str) -> bool:
    """Whether a shell pattern, or "re:" and a regular expression, matches the whole name."""
    expression = _matcher(pattern)
    if expression is None:
        return fnmatchcase(name, pattern)
    return expression.fullmatch(name) is not None


def resolve(
    recipe: Recipe, names: Iterable[str]
) -> tuple[dict[str, Scheme | None], tuple[str, ...]]:
    """The scheme of each linear (None: kept in float) and the patterns that matched none."""
    default, used = schemes.parse(recipe.scheme), set()
    resolved: dict[str, Scheme | None] = {}
    for name in names:
        hit = next((o for o in recipe.overrides if matches(o.pattern, name)), None)
        if hit is not None:
            used.add(hit.pattern)
        resolved[name] = default if hit is None else _chosen(hit, default)
    unused = tuple(o.pattern for o in recipe.overrides if o.pattern not in used)
    return resolved, unused
