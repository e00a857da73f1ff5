"""Unsigned integers of 1 to 8 bits: code c has the value c; the zero point makes them signed."""

from bitwright.spec import Grid

GRIDS = {
    f"int{bits}": Grid(f"int{bits}", bits, tuple(float(c) for c in range(1 << bits)))
    for bits in range(1, 9)
}
