"""Bytes that a run holds, stage by stage, on top of what Python and the libraries hold already.

    embed     embeddings, for a moment beside the same in the file's dtype, and the hidden states
    block     the weights of one block (where drift is measured twice, for the float model), what is
              parked at the group in turn (or, where that does not fit, the hidden states and one
              batch: the block then runs again for each group), the group's sums, and the larger of
              one batch's working space and of solving
    write     the largest tensor twice, as read and as written; a matrix, its codes, its packed form

Where the forward runs on a GPU, weights, parked activations and the sums while they are made lie
there (`on_device`); the host holds hidden states, and the sums once they are to be solved.

`calib.memory` counts activations. Sums and solving, for n x k matrices, in bytes per k^2 and per
n k, P matrices H (v's KV heads; else 1):

    sums      8 P k^2 (H); where drift is measured 8 P k^2 (C), as much of both again where tokens
              are held out, and 8 n k (D) where outputs are added to the residual stream
    factor    4 P k^2 (R, kept) and 4 k^2 (half of it in float64)
    target    2 k^2 (half of R as slices), 12 n k (W, its share, the target); then C and D are
              gone, where no other matrix asks for them
    sweep     2 k^2, 9 n k (W, target, codes); without a target 5
    refine    4 k^2 (H in float32), 10 n k
    errors    2 k^2 (half of H in float32), 18 n k (W, target, Q, E, codes); without a target 13

so plain GPTQ takes 16 k^2, or 14 k^2 + 13 n k at the errors (k = 14336 and n = 4096: 3.6 GB, k =
28672 and n = 8192: 14.6 GB), and the default effort 24 k^2 + 8 n k in the factorisation, or 22 k^2
+ 20 n k at the target. AWQ keeps H of the scaled inputs beside H: 8 P k^2 more, and 4 n k.
"""

from __future__ import annotations

import math
from typing import Any

from bitwright.calib.memory import hole_bytes, parked_bytes, working_bytes
from bitwright.job import Job
from bitwright.recipe import solver_of, solver_options
from bitwright.spec import Group

CHUNK = 512  # tokens that the sums take at a time
WORKSPACE = 64 << 20  # of a GPU's libraries: cuBLAS takes 32 MiB on Hopper


class Sizes:
    """Byte counts of a job. item: width of the forward's dtype; batch: tokens of a forward call;
    compared: share of the batches that the float model sees too; shapes: the largest (n, k) of each
    linear over all blocks.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.item = 2 if job.dtype == "bfloat16" else 4
        self.tokens = 0 if job.recipe.method == "rtn" else job.recipe.samples * job.recipe.length
        self.batch = min(self.tokens, job.batch * job.recipe.length)
        self.hidden = job.targets[next(iter(job.targets))].shape[1]
        self.compared = job.compare / -(-job.recipe.samples // job.batch)
        self.streams = 1.0 + self.compared
        self.stream = int(self.streams * self.tokens * self.hidden * self.item)
        self.config: Any = job.skeleton.model.config.get_text_config()
        self.shapes: dict[str, tuple[int, int]] = {}
        for target in job.targets.values():
            n, k = self.shapes.get(target.linear.name, (0, 0))
            self.shapes[target.linear.name] = (max(n, target.shape[0]), max(k, target.shape[1]))

    def shape(self, linear: str) -> tuple[int, int]:
        return self.shapes[linear]

    def columns(self, group: Group) -> int:
        return self.shape(group.linears[0].name)[1]

    def added(self, group: Group) -> bool:
        """Whether D is summed for a group."""
        return self.job.sums and group.stream is not None

    def mixed(self, group: Group) -> bool:
        """Whether v, alone or in a fused projection, has the inputs that attention mixed."""
        return bool(self.job.mix) and any("attn.v" in x.roles for x in group.linears)

    def matrices(self, group: Group) -> int:
        """H of a group: one, or one per pool of v's KV heads (calib.capture)."""
        if not self.mixed(group):
            return 1
        widest = max(self.columns(g) for g in self.job.arch.groups)
        most = max(1, widest**2 // self.columns(group) ** 2)
        heads = int(self.config.num_attention_heads)
        kv = int(getattr(self.config, "num_key_value_heads", None) or heads)
        return max(n for n in range(1, min(kv, most) + 1) if kv % n == 0)

    def _sources(self) -> set[str]:
        """Tensors that lie in no block and are no head of their own."""
        skeleton = self.job.skeleton
        elsewhere = {
            *skeleton.under(skeleton.block_path),
            *(skeleton.under(skeleton.head) if skeleton.head else ()),
        }
        return {skeleton.sources[name] for name in skeleton.slots if name not in elsewhere}

    def _outside(self) -> int:
        entries = self.job.checkpoint.entries
        return sum(math.prod(entries[source][0]) for source in self._sources())

    def embed(self) -> int:
        entries, sources = self.job.checkpoint.entries, self._sources()
        held = self._outside() * self.item
        if self.job.device.type != "cpu":
            return max((entries[source][2] for source in sources), default=0) + self.stream
        converted = [entries[s][2] for s in sources if str(entries[s][1]) != self.job.dtype]
        return held + max(converted, default=0) + self.stream

    def weights(self) -> int:
        """Of one block, of the float model too where it runs alongside."""
        skeleton = self.job.skeleton
        largest = max(
            sum(skeleton.slots[name].meta.numel() for name in skeleton.under(skeleton.path(i)))
            for i in range(skeleton.count)
        )
        return largest * self.item * (2 if self.job.compare else 1)

    def groups(self, rerun: bool) -> dict[str, int]:
        """A block at each of its groups, by the group's label."""
        if self.job.device.type != "cpu":
            largest = self.weights() // (2 if self.job.compare else 1)
            solving = {group.label: self.solving(group) for group in self.job.arch.groups}
            return {label: self.stream + largest + most for label, most in solving.items()}
        held, passing = self.weights(), self.passing(rerun)
        if rerun:
            return {label: held + self.stream + size for label, size in passing.items()}
        held, parked = held + self._holes(), self._parked(rerun)
        return {label: held + parked[label] + size for label, size in passing.items()}

    def _holes(self) -> int:
        return hole_bytes(self.job.arch, self.shape, self.batch, self.item)

    def _parked(self, rerun: bool) -> dict[str, int]:
        """Activations that wait at a group: of all batches, or of one."""
        arch, tokens = self.job.arch, self.batch if rerun else self.tokens
        parked = parked_bytes(arch, self.shape, tokens, self.item)
        return {
            group.label: int(self.streams * parked[group.linears[0].name]) for group in arch.groups
        }

    def passing(self, rerun: bool) -> dict[str, int]:
        """What comes and goes at each group of a block: a batch at work beside the sums, the solve
        after that. Holes of the heap come and go too where blocks run again."""
        arch, parked = self.job.arch, self._parked(rerun)
        working = working_bytes(arch, self.shape, self.batch, self.item) + self._scores()
        working += self._holes() if rerun else 0
        found = {}
        for group in arch.groups:
            arriving = working + (parked[group.label] if rerun else 0)
            found[group.label] = max(self._summing(group) + arriving, self.solving(group))
        return found

    def on_device(self, rerun: bool) -> int:
        """Of a GPU that runs the forward: the embeddings, or a block where it holds most."""
        arch, tokens = self.job.arch, self.batch if rerun else self.tokens
        parked = parked_bytes(arch, self.shape, tokens, self.item)
        working = working_bytes(arch, self.shape, self.batch, self.item) + self._scores()
        working += self._holes()
        held = [
            int(self.streams * parked[group.linears[0].name])
            + sum(self.sums(group))
            + 4 * self.columns(group) ** 2
            for group in arch.groups
        ]
        embed = self._outside() * self.item + self.batch * self.hidden * self.item
        return max(self.weights() + working + max(held), embed) + WORKSPACE

    def block(self, rerun: bool) -> int:
        return max(self.groups(rerun).values())

    def _scores(self) -> int:
        """A mask, and where attention is the model's own, its scores: four of them in turn, two as
        float32; v's mixed inputs, and the scores of one window's sampled queries thrice.
        """
        capped = getattr(self.config, "attn_logit_softcapping", None) is not None
        eager = getattr(self.job.skeleton.model.config, "_attn_implementation", "") == "eager"
        heads = self.config.num_attention_heads if capped or eager else 0
        square = self.batch * self.job.recipe.length
        mixed = 0
        if self.job.mix:
            rows = self.config.num_attention_heads * self.job.recipe.length // self.job.mix
            windows = self.batch // self.job.recipe.length
            mixed = (
                2 * windows * rows * self.hidden * self.item + 12 * rows * self.job.recipe.length
            )
        return int(square * (1 + self.item) + heads * square * (2 * self.item + 8)) + mixed

    def sums(self, group: Group) -> tuple[int, int]:
        """H; C, D and what is held out."""
        H = 8 * self.matrices(group) * self.columns(group) ** 2
        if not self.job.compare:
            return H, 0
        D = 8 * math.prod(self.shape(group.linears[0].name)) if self.added(group) else 0
        return H, H + D + (2 * H if self.job.hold else 0)

    def _summing(self, group: Group) -> int:
        """The sums and the panels of a chunk: of one input, of two and their difference."""
        return sum(self.sums(group)) + CHUNK * self.columns(group) * 4 * (
            3 if self.job.compare else 1
        )

    def _in_turn(self, group: Group) -> list[str]:
        """Linears of a group whose rows are solved in turn."""
        found = [x.name for x in group.linears if x.roles in (("attn.q",), ("attn.k",))]
        coupled = solver_options(self.job.recipe).get("coupled") if found else False
        return found if coupled and self.job.heads(0) is not None else []

    def solving(self, group: Group) -> int:
        """The sums and the most that a step of the solve adds; all but one matrix dense. q and k in
        turn are one matrix."""
        recipe, options = self.job.recipe, solver_options(self.job.recipe)
        in_turn = self._in_turn(group)
        areas = [math.prod(self.shape(x.name)) for x in group.linears if x.name not in in_turn]
        areas += [sum(math.prod(self.shape(name)) for name in in_turn)]
        nk, k2, P = max(areas), self.columns(group) ** 2, self.matrices(group)
        H, others = self.sums(group)
        dense = 4 * (sum(areas) - nk)
        drift = self.job.compare > 0
        if recipe.method.startswith("awq") and group.norm is not None:
            H, nk4 = 2 * H, 4 * nk
        else:
            nk4 = 0
        factor = 4 * k2 if solver_of(recipe.method) == "gptq" else 0
        R = P * factor
        left = 0 if drift and len(group.linears) == 1 else others
        target = 2 * k2 + 12 * nk if drift else 0
        refine = 4 * k2 + 10 * nk if options.get("refine", "c") else 0
        turns = 4 * k2 + 13 * nk if in_turn else 0
        after = max(2 * k2 + (18 if drift else 13) * nk, refine, turns)  # the sweep takes less
        return H + dense + nk4 + max(others + R + max(factor, target), left + R + after)

    def rounding(self) -> int:
        return max(16 * n * k for n, k in self.shapes.values())

    def write(self) -> int:
        largest = max(size for _, _, size in self.job.checkpoint.entries.values())
        return max(2 * largest, self.rounding())

    def stages(self, rerun: bool) -> dict[str, int]:
        """Peak of each stage of the run."""
        if not self.tokens:
            return {"round": self.rounding(), "write": self.write()}
        return {"embed": self.embed(), "block": self.block(rerun), "write": self.write()}

    def output(self) -> int:
        """Bytes of the weight files, but for their headers."""
        entries, job = self.job.checkpoint.entries, self.job
        total = sum(size for _, _, size in entries.values())
        for target in job.targets.values():
            if target.scheme is not None:
                _, dtype, size = entries[job.skeleton.sources[f"{target.name}.weight"]]
                parts = job.format.layout(target.name, target.shape, target.scheme, dtype)
                total += sum(math.prod(s) * d.itemsize for d, s in parts.values()) - size
        return total

    def spooled(self) -> int:
        """Finished linears: words, float32 scales, zeros, steps."""
        total = 0
        for target in self.job.targets.values():
            if target.scheme is not None:
                n, k = target.shape
                words = -(-k * target.scheme.bits // 32)
                cell = 8 if target.scheme.offset else 5  # scale and zero point
                total += 4 * n * (words + target.scheme.blocks(k))
                total += cell * n * target.scheme.groups(k)
        return total

    def disk(self) -> int:
        """The work folder with two hidden states while the second is written, or one and the
        output."""
        return self.spooled() + self.stream + max(self.stream, self.output())
