"""codes[r, i] is bits [i b, i b + b) of the bitstream words[r], least significant bit first."""

import numpy as np


def unpack(words, bits, k):
    codes = np.zeros((len(words), k), np.uint8)
    for i in range(k):
        for bit in range(bits):
            word, place = divmod(i * bits + bit, 32)
            codes[:, i] |= ((words[:, word] >> place & 1) << bit).astype(np.uint8)
    return codes
