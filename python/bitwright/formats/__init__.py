"""Checkpoint formats: QTensor <-> named arrays and a config. The docstring of a module is its spec.

Each has refuse, notes, layout, write, scheme, read, stored, quantized, shape, config, side_files
and load_line; those that are only read have scheme, read, stored, quantized and shape.
"""

NAMES = ("compressed_tensors", "gptq", "bitwright")
READ_ONLY = ("awq", "bitsandbytes")
