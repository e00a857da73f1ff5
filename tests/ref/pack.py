"""words[r] is a bitstream, least significant bit first: codes[r, i] in bits [i b, i b + b)."""

import numpy as np


def pack(codes, bits):
    n, k = codes.shape
    words = np.zeros((n, -(-k * bits // 32)), np.uint32)
    for i in range(k):
        for bit in range(bits):
            word, place = divmod(i * bits + bit, 32)
            words[:, word] |= (codes[:, i].astype(np.uint32) >> bit & 1) << place
    return words
