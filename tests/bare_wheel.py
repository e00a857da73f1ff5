"""Run by CI in an environment without torch: the wheel imports and its NumPy API works."""

import importlib.util
import sys

import numpy as np

import bitwright

rng = np.random.default_rng(0)
X = rng.standard_normal((512, 96)).astype(np.float32)
W = rng.standard_normal((32, 96)).astype(np.float32)
stats = bitwright.StatsCollector(96).update(X).finish()
q = bitwright.quantize_matrix(W, stats.H, scheme="int4-g32")
plain = bitwright.quantize_matrix(W, scheme="int4-g32")
error = [((X @ (W - t.dequantize()).T) ** 2).sum() for t in (q, plain)]
if importlib.util.find_spec("torch") is not None or "transformers" in sys.modules:
    sys.exit("this check is for an environment without torch")
if not error[0] < error[1]:
    sys.exit(f"GPTQ must beat rounding, got {error}")
print(f"numpy API without torch: output error {error[0] / error[1]:.2f} of plain rounding's")
