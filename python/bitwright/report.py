"""What a run did, as data: the file bitwright-report.json, and its summary in numbers.

The file holds nothing that differs between two runs of the same command: seconds and memory are in
`to_dict(measured=True)`, which is what --json prints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bitwright import clock
from bitwright.spec import InputError, NumericalError, Override, Recipe, Report

MEASURED = ("seconds", "blocks", "peak_rss", "peak_device")  # differ from run to run


@dataclass(frozen=True)
class RunReport:
    """A finished run. linears: one Report each, in the order solved. seconds: by phase (clock.py),
    blocks: the same of each block that this call has run. peak_rss, peak_device: bytes, of the
    process and of what lies on a GPU. device: of the forward and the sums; dtype, gram_dtype: of
    the forward, and of the products in the Gram sums (ops.sums). evaluation: scores against the
    original, once somebody has asked for them."""

    base: str
    recipe: Recipe
    calibration: str
    tokens: int
    linears: tuple[Report, ...]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unused_overrides: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    isa: str = ""
    threads: int = 0
    device: str = ""
    dtype: str = ""
    gram_dtype: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    blocks: tuple[Mapping[str, float], ...] = ()
    peak_rss: int = 0
    peak_device: int = 0
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fallbacks(self) -> tuple[Report, ...]:
        """Linears that did not get the method that was asked for."""
        return tuple(linear for linear in self.linears if linear.fallback)

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits per weight of the quantized linears, scales and zero points included."""
        sizes = [linear.shape[0] * linear.shape[1] for linear in self.linears]
        bits = sum(r.bits_per_weight * size for r, size in zip(self.linears, sizes, strict=True))
        return bits / sum(sizes) if sizes else 0.0

    def shares(self) -> dict[str, float]:
        """Parts of the total time: forward, statistics, solve, I/O, rest."""
        return clock.shares(self.seconds)

    def methods(self) -> dict[str, int]:
        """How many linears got which method."""
        return dict(Counter(linear.method for linear in self.linears))

    def solver(self) -> str:
        """What the solver looked at, counted over the linears; "" where that is nothing special."""
        mixed = sum(linear.heads > 0 for linear in self.linears)
        alphas = [linear.alpha for linear in self.linears if linear.alpha is not None]
        refined = [r.error / r.error_swept for r in self.linears if r.error_swept]
        parts = [self.recipe.effort] if any("gptq" in r.method for r in self.linears) else []
        if refined and min(refined) < 1.0:
            parts.append(f"refinement left {100 * sum(refined) / len(refined):.0f} % of the error")
        if mixed:
            parts.append(f"{mixed} with attention-mixed inputs")
        coupled = sum(linear.coupled for linear in self.linears)
        if coupled:
            parts.append(f"{coupled} with rows of q and k coupled")
        if alphas:
            parts.append(
                f"{len(alphas)} corrected for drift, alpha {sum(alphas) / len(alphas):.2g}"
            )
        sums = [linear.residual for linear in self.linears if linear.residual is not None]
        if sums:
            parts.append(f"{len(sums)} for the residual stream's error, {sums[0]:.2g} of it")
        return ", ".join(parts)

    def worst(self, count: int) -> list[Report]:
        """The linears with the largest relative output error."""
        return sorted(self.linears, key=lambda linear: -linear.error)[:count]

    def raise_if_strict(self) -> None:
        """NumericalError that counts and names the fallbacks, if there are any."""
        if self.fallbacks:
            first = self.fallbacks[0]
            raise NumericalError(
                f"[strict] {len(self.fallbacks)} of {len(self.linears)} linears did not get "
                f"{self.recipe.method}; first {first.name}: {first.fallback}"
            )

    def to_dict(self, measured: bool = False) -> dict[str, Any]:
        """As JSON takes it; measured: with seconds and memory."""
        content = asdict(self)
        if measured:
            content["shares"] = self.shares()
        else:
            for key in MEASURED:
                content.pop(key)
            for linear in content["linears"]:
                linear.pop("seconds")
        return content

    def with_evaluation(self, scores: Mapping[str, Any]) -> RunReport:
        return replace(self, evaluation=dict(scores))


def from_dict(content: Mapping[str, Any]) -> RunReport:
    """The report in a bitwright-report.json; InputError if it is not one of ours."""
    try:
        recipe = dict(content["recipe"])
        recipe["overrides"] = tuple(Override(**one) for one in recipe["overrides"])
        linears = [
            Report(**{**one, "shape": tuple(one["shape"]), "notes": tuple(one["notes"])})
            for one in content["linears"]
        ]
        rest = dict(content) | {"recipe": Recipe(**recipe), "linears": tuple(linears)}
        for key in ("skipped", "notes", "unused_overrides"):
            rest[key] = tuple(content[key])
        return RunReport(**rest)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"[report] wanted a report of this version of bitwright: {error}"
        ) from error
