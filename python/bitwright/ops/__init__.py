"""The verbs of the C++ core over NumPy arrays: the only importers of `_core`.

Contracts and formulas: csrc/ops.h; a plain NumPy twin of every op: tests/ref. Here inputs are made
contiguous in plain sight, dtypes and dimensions are checked with a sentence, outputs are allocated.

Threads: `threads()` starts as the CPUs this process may use (affinity, then the cgroup's quota).
"""

from bitwright.ops.arrays import BFLOAT16 as BFLOAT16
from bitwright.ops.arrays import as_numpy as as_numpy
from bitwright.ops.block import NO_MASK as NO_MASK
from bitwright.ops.block import DecoderBlock as DecoderBlock
from bitwright.ops.block import KeyValues as KeyValues
from bitwright.ops.block import blocks as blocks
from bitwright.ops.block import head as head
from bitwright.ops.codes import SEARCH_FACTORS as SEARCH_FACTORS
from bitwright.ops.codes import block_steps as block_steps
from bitwright.ops.codes import decode as decode
from bitwright.ops.codes import encode as encode
from bitwright.ops.codes import fit as fit
from bitwright.ops.codes import global_scale as global_scale
from bitwright.ops.codes import pack as pack
from bitwright.ops.codes import qlinear as qlinear
from bitwright.ops.codes import round_pack as round_pack
from bitwright.ops.codes import rows_of as rows_of
from bitwright.ops.codes import stacked as stacked
from bitwright.ops.codes import unpack as unpack
from bitwright.ops.linear import PackedMatrix as PackedMatrix
from bitwright.ops.linear import linear as linear
from bitwright.ops.linear import pack_linear as pack_linear
from bitwright.ops.linear import unpack_linear as unpack_linear
from bitwright.ops.probe import CHAINS as CHAINS
from bitwright.ops.probe import chain as chain
from bitwright.ops.probe import dot_chain as dot_chain
from bitwright.ops.probe import word_sum as word_sum
from bitwright.ops.solve import CLIP_FACTORS as CLIP_FACTORS
from bitwright.ops.solve import DAMPING_ATTEMPTS as DAMPING_ATTEMPTS
from bitwright.ops.solve import FEEDBACK_FACTORS as FEEDBACK_FACTORS
from bitwright.ops.solve import POWER_FACTORS as POWER_FACTORS
from bitwright.ops.solve import TABLE_FACTORS as TABLE_FACTORS
from bitwright.ops.solve import awq_clip as awq_clip
from bitwright.ops.solve import awq_scale as awq_scale
from bitwright.ops.solve import drift as drift
from bitwright.ops.solve import factor as factor
from bitwright.ops.solve import feedback_factors as feedback_factors
from bitwright.ops.solve import gptq as gptq
from bitwright.ops.solve import gptq_search as gptq_search
from bitwright.ops.solve import refine as refine
from bitwright.ops.sums import column_stats as column_stats
from bitwright.ops.sums import cross as cross
from bitwright.ops.sums import energy as energy
from bitwright.ops.sums import gram as gram
from bitwright.ops.sums import mirror as mirror
from bitwright.ops.sums import products_of as products_of
from bitwright.ops.sums import quadratic as quadratic
from bitwright.ops.sums import relative_error as relative_error
from bitwright.ops.threads import available_cpus as available_cpus
from bitwright.ops.threads import isa as isa
from bitwright.ops.threads import levels as levels
from bitwright.ops.threads import multiplies_bf16 as multiplies_bf16
from bitwright.ops.threads import panel_rows as panel_rows
from bitwright.ops.threads import resolve_threads as resolve_threads
from bitwright.ops.threads import set_threads as set_threads
from bitwright.ops.threads import threads as threads
from bitwright.ops.words import QWords as QWords
from bitwright.ops.words import unpacked as unpacked
