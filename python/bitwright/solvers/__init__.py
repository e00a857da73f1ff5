"""Solvers round one matrix: `solve(W, stats, scheme, **options) -> (QTensor, Report)`.

A module says with NEEDS_H whether it wants Stats with H. `prepare(stats, scheme, **options)`
computes what all matrices with these inputs share; `solve` takes it as `prepared`.
EFFORTS names sets of options, `check(options)` refuses what `solve` could not use.
"""

NAMES = ("rtn", "gptq")
