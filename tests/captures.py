"""A capture over a tiny model with given solutions, and transformers' own forward beside it."""

from __future__ import annotations

import numpy as np
import torch

import tiny_models
from bitwright.calib.capture import Capture
from bitwright.calib.skeleton import Skeleton
from bitwright.spec import InputError, Stats


class Keeper:
    """Statistics that keep all they saw; H as the formula says."""

    def __init__(self, k: int, heads: int = 0) -> None:
        self.k, self.heads, self.seen, self.before = k, heads, [], []
        self.sums = []

    def update(self, x, drift_from=None, stream=None):
        assert x.shape[-1] == self.k
        assert not self.heads or len(x) == self.heads
        shape = (self.heads, -1, self.k) if self.heads else (-1, self.k)
        for kept, given in ((self.seen, x), (self.before, drift_from)):
            if given is not None:
                kept.append(given.reshape(shape).to(torch.float32).numpy().copy())
        if stream is not None:
            self.sums.append([s.flatten(0, -2).float().numpy().copy() for s in stream])
        return self

    def finish(self) -> Stats:
        X = np.concatenate(self.seen, axis=-2)
        if not np.isfinite(X).all():
            raise InputError("[stats] wanted finite inputs, got NaN or infinity")
        W = X.astype(np.float64)
        stats = Stats(
            X.shape[-2],
            W.swapaxes(-1, -2) @ W / X.shape[-2],
            *(f(X, 0) for f in (np.mean, np.max, np.min, np.max)),
        )
        object.__setattr__(stats, "X", X)
        before = np.concatenate(self.before, axis=-2) if self.before else None
        object.__setattr__(stats, "before", before)
        sums = [np.concatenate(s) for s in zip(*self.sums, strict=True)] if self.sums else None
        object.__setattr__(stats, "sums", sums)
        return stats


def skeleton(model, dtype="float32", **changes) -> Skeleton:
    weights = {**tiny_models.weights(model), **changes}
    return Skeleton(model.config, weights.__getitem__, weights, dtype)


def rounded(model, arch) -> dict[str, np.ndarray]:
    """Coarsely rounded (n, k) weights of every linear in a block, by full name."""
    out = {}
    for i in range(len(model.get_submodule(arch.blocks))):
        for group in arch.groups:
            for linear in group.linears:
                name = f"{arch.blocks}.{i}.{linear.name}"
                weight = model.get_parameter(f"{name}.weight").detach().numpy()
                weight = weight.T if linear.transposed else weight
                out[name] = (np.round(weight * 16) / 16).astype(np.float32)
    return out


def swap_in(model, arch, weights) -> None:
    transposed = {x.name for group in arch.groups for x in group.linears if x.transposed}
    with torch.no_grad():
        for name, weight in weights.items():
            inner = name.removeprefix(f"{arch.blocks}.").partition(".")[2]
            tensor = torch.from_numpy(weight)
            model.get_parameter(f"{name}.weight").copy_(tensor.T if inner in transposed else tensor)


@torch.inference_mode()
def plain(model, arch, ids) -> tuple[list[list[torch.Tensor]], list[torch.Tensor], dict]:
    """transformers' own forward: hidden states after each block, logits, and linears' inputs."""
    inputs: dict[str, list[np.ndarray]] = {}
    blocks = model.get_submodule(arch.blocks)
    after: list[list[torch.Tensor]] = [[] for _ in blocks]
    handles = [
        block.register_forward_hook(lambda _m, _a, out, i=i: after[i].append(out))
        for i, block in enumerate(blocks)
    ]
    for i in range(len(blocks)):
        for group in arch.groups:
            for linear in group.linears:
                name = f"{arch.blocks}.{i}.{linear.name}"

                def keep(_module, args, name=name):
                    x = args[0].reshape(-1, args[0].shape[-1])
                    inputs.setdefault(name, []).append(x.float().numpy().copy())

                handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    logits = [model(batch, use_cache=False).logits for batch in ids]
    for handle in handles:
        handle.remove()
    return after, logits, {name: np.concatenate(x) for name, x in inputs.items()}


def quantize(body, arch, ids, weights, rerun=False, solved=None, mix=0, streams=1, sums=False):
    """All blocks with `weights` for solutions: hidden states after each, stats by group. Of a fused
    projection the first rows are solved alone, the others stay as they are until then."""
    capture = Capture(body, arch, Keeper, mix, sums)
    hidden = [(body.embed(batch),) * streams for batch in ids]
    after, seen = [], {}
    for i in range(body.count):
        prefix = f"{arch.blocks}.{i}."

        def solution(group, prefix=prefix):
            return {x.name: weights[prefix + x.name] for x in group.linears}

        def solve(group, stats, prefix=prefix, solution=solution):
            name = prefix + group.linears[0].name
            if group.rows is None:
                seen[name] = stats
                return solution(group)
            seen[name + ("[v]" if group.inside_attention else "[qk]")] = stats
            stored = body.get(f"{name}.weight")
            float_rows = (stored.t() if group.linears[0].transposed else stored).numpy()
            rows = (solution(group)[group.linears[0].name][: group.rows[1]], float_rows)
            return {group.linears[0].name: np.concatenate([rows[0], rows[1][group.rows[1] :]])}

        def done(group, i=i, solution=solution):
            return solution(group) if solved is not None and solved(i, group) else None

        hidden = capture.run_block(i, hidden, solve, done, rerun)
        after.append([h[0] for h in hidden] if streams == 1 else hidden)
        hidden = list(hidden)
    return after, seen, capture


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
