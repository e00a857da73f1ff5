"""The four-bit float of bitsandbytes: not E2M1; codes in ascending order, +0 and -0 one code.

The float32 values are those of its code book: multiples of 1 / 12, the smallest of 1 / 192.
"""

from bitwright.spec import Grid

MAGNITUDES = (
    0.0052083334885537624,
    0.1666666716337204,
    0.25,
    0.3333333432674408,
    0.5,
    0.6666666865348816,
    1.0,
)

GRIDS = {"bfp4": Grid("bfp4", 4, (*(-m for m in reversed(MAGNITUDES)), 0.0, *MAGNITUDES))}
