"""Transforms rescale a group without changing the model's function, for a gain that absorbs it.

`plan(weights, stats, scheme) -> Rescale`; `fold.fold` moves a Rescale into the norm in front.
"""

NAMES = ("awq",)
