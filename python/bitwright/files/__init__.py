"""Bytes on disk to named arrays and back; knows nothing of quantization."""
