"""The model card of a quantized checkpoint: base, recipe, what was measured, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitwright.report import RunReport


def _front(report: RunReport, base: Path) -> str:
    tags = ["bitwright", report.recipe.format, report.recipe.scheme]
    lines = ["---", "library_name: transformers", f"base_model: {_model(report, base)}", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---"])


def _model(report: RunReport, base: Path) -> str:
    """A hub id as it is, a folder by its name."""
    named = report.base.count("/") == 1 and not base.exists()
    return report.base if named else base.name


def _recipe(report: RunReport) -> list[str]:
    recipe = report.recipe
    rows = [
        ("scheme", recipe.scheme),
        ("method", recipe.method),
        *([("effort", report.solver())] if report.solver() else []),
        ("format", recipe.format),
        ("calibration", report.calibration),
        ("bits per weight", f"{report.bits_per_weight:.3f} (scales and zero points included)"),
    ]
    rows += [(f"override `{o.pattern}`", o.scheme or "kept in float") for o in recipe.overrides]
    rows += [(f"option {key}", str(value)) for key, value in recipe.options.items()]
    return [f"| {name} | {value} |" for name, value in rows]


def _scores(scores: dict[str, Any]) -> list[str]:
    return [
        "",
        "## Against the original",
        "",
        f"{scores['tokens']} tokens of {scores['text']}, float32 forward of both.",
        "",
        "| KL mean | KL median | KL 99 % | top-1 agreement | perplexity | of the original |",
        "|---|---|---|---|---|---|",
        f"| {scores['kl_mean']:.4f} | {scores['kl_median']:.4f} | {scores['kl_p99']:.4f} "
        f"| {100 * scores['top1']:.2f} % | {scores['perplexity']:.3f} "
        f"| {scores['perplexity_base']:.3f} |",
    ]


def render(report: RunReport, *, bytes_total: int, load_lines: tuple[str, str]) -> str:
    """Markdown. bytes_total: of the weight files. load_lines: the code that loads the folder."""
    base = Path(report.base)
    parts = [
        _front(report, base),
        "",
        f"# {base.name}, {report.recipe.scheme}",
        "",
        f"`{base.name}` quantized after training by bitwright {report.versions.get('bitwright')}: "
        f"{len(report.linears)} linears, {bytes_total / 1e6:.1f} MB of weights. "
        "The original's licence applies.",
        "",
        "| | |",
        "|---|---|",
        *_recipe(report),
    ]
    if report.evaluation:
        parts += _scores(dict(report.evaluation))
    parts += ["", "## Load it", "", "```python", *load_lines, "```"]
    if report.fallbacks:
        names = "".join(f"\n- `{one.name}`: {one.fallback}" for one in report.fallbacks)
        parts += ["", "## Fallbacks", names]
    if report.notes:
        parts += ["", "## Notes", "", *(f"- {note}" for note in report.notes)]
    return "\n".join([*parts, ""])
