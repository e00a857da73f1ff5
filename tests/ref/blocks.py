"""A decoder block of the Llama kind, in float64, for one sequence:

x += o(attention(q, k, v of rms(x)));  x += down(silu(gate) up),  gate, up of rms(x)

products: the seven matrices as functions of their inputs (q, k, v, o, gate, up, down), biases of
each or 0. gains: of the norms; of q's and k's heads or None. keys, values: (kv_heads, past, width)
of the tokens before. seen: (t, past + t) booleans. Returns x and the keys and values of all tokens.
"""

import numpy as np


def rms(x, gain, epsilon):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon) * gain


def turn(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin


def attention(q, keys, values, seen, scale):
    """Heads first; heads of q share those of the keys in runs; nothing seen: 0."""
    share = len(q) // len(keys)
    keys, values = (np.repeat(x, share, 0) for x in (keys, values))
    scores = np.where(seen, q @ keys.transpose(0, 2, 1) * scale, -np.inf)
    most = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(most), most, 0))
    total = weights.sum(-1, keepdims=True)
    return weights @ values / np.where(total == 0, 1, total)


def blocks(x, products, biases, gains, heads, epsilon, scale, cos, sin, keys, values, seen):
    x, t, width = x.astype(np.float64), len(x), keys.shape[-1]
    parts = [f(rms(x, gains[0], epsilon)) + b for f, b in zip(products[:3], biases, strict=False)]
    q, k, v = (p.reshape(t, -1, width).transpose(1, 0, 2) for p in parts)
    if gains[2] is not None:
        q, k = rms(q, gains[2], epsilon), rms(k, gains[3], epsilon)
    if cos is not None:
        q, k = turn(q, cos, sin), turn(k, cos, sin)
    keys, values = np.concatenate([keys, k], 1), np.concatenate([values, v], 1)
    mixed = attention(q, keys, values, seen, scale)
    x = x + products[3](mixed.transpose(1, 0, 2).reshape(t, heads * width)) + biases[3]
    gate, up = (products[i](rms(x, gains[1], epsilon)) + biases[i] for i in (4, 5))
    x = x + products[6](gate / (1 + np.exp(-gate)) * up) + biases[6]
    return x, keys, values
