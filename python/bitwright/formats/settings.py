"""What a quantization_config may say, by method: a setting that nobody here knows could mean other
weights than those that are read (a rotation, an adapter), so it is refused by its name. Empty ones
(null, false, "", [], {}) say nothing; those that only tell how a file was made are known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from bitwright.spec import RefusedError

# fmt: off
SETTINGS: Mapping[str, Collection[str]] = {
    "awq": (
        "quant_method", "method", "bits", "w_bit", "group_size", "q_group_size", "zero_point",
        "sym", "version", "format", "backend", "modules_to_not_convert", "do_fuse",
        "modules_to_fuse", "fuse_max_seq_len", "exllama_config", "pack_dtype", "meta",
    ),
    "bitsandbytes": (
        "quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit",
        "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight", "llm_int8_skip_modules", "llm_int8_threshold",
    ),
    "bitwright": ("quant_method", "version", "scheme", "schemes", "skip", "ordered"),
    "compressed-tensors": (
        "quant_method", "version", "format", "quantization_status", "global_compression_ratio",
        "ignore", "kv_cache_scheme", "sparsity_config", "config_groups", "producer",
    ),
    "gptq": (
        "quant_method", "method", "bits", "group_size", "desc_act", "sym", "dynamic",
        "checkpoint_format", "format", "pack_dtype", "lm_head", "meta",
        "modules_in_block_to_quantize", "block_name_to_quantize",
        "module_name_preceding_first_block", "damp_percent", "damp_auto_increment",
        "true_sequential", "static_groups", "mse", "act_group_aware", "model_name_or_path",
        "model_file_base_name", "model_seqlen", "tokenizer", "dataset", "batch_size",
        "pad_token_id", "max_input_length", "cache_block_outputs", "use_cuda_fp16",
        "use_exllama", "disable_exllama", "exllama_config", "backend",
    ),
}
# Of compressed-tensors; sparsity_config where its format is "dense".
OF_GROUPS = ("targets", "format", "weights", "input_activations", "output_activations")
OF_WEIGHTS = (
    "format", "num_bits", "type", "symmetric", "strategy", "group_size", "actorder", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
)
# fmt: on


def require_known(where: str, settings: Mapping[str, Any], known: Collection[str]) -> None:
    """RefusedError for a setting that is not among the known ones and not empty."""
    for name, value in settings.items():
        if name not in known and value:
            raise RefusedError(
                f"[{where}] wanted settings that are known, got {name} = {value!s:.80}"
            )
