"""Four-bit floats, E2M1 (OCP MX 1.0): sign, two exponent bits, one mantissa bit, no infinities.

Codes are in ascending order of value; +0 and -0 are one code.
"""

from bitwright.spec import Grid

MAGNITUDES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

GRIDS = {"fp4": Grid("fp4", 4, (*(-m for m in reversed(MAGNITUDES)), 0.0, *MAGNITUDES))}
