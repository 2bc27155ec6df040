"""Check the `trainer.megatron` table of a profile against the installed megatron-core, without importing it."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slime.errors import ConfigError

KEY = "profile.trainer.megatron"

FROM_MODEL = frozenset(
    {
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
        "normalization", "layernorm_epsilon", "gated_linear_unit", "activation_func", "add_bias_linear",
        "add_qkv_bias", "qk_layernorm", "hidden_dropout", "attention_dropout", "num_moe_experts",
    }
)  # fmt: skip
"""Given by the model directory."""

FROM_PROFILE = {
    "bf16": "precision", "fp16": "precision", "params_dtype": "precision", "pipeline_dtype": "precision",
    "autocast_dtype": "precision", "recompute_granularity": "recompute", "recompute_method": "recompute",
    "recompute_num_layers": "recompute", "calculate_per_token_loss": "", "use_cpu_initialization": "",
    "perform_initialization": "",
}  # fmt: skip
"""Decided by another key of the profile, or by slime itself."""

PARALLEL = frozenset(
    {
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
        "expert_model_parallel_size", "expert_tensor_parallel_size", "virtual_pipeline_model_parallel_size",
        "sequence_parallel",
    }
)  # fmt: skip


def check_megatron_options(options: Mapping[str, Any]) -> None:
    """Refuse options that megatron-core does not have, or that are not free.

    Raises:
        ConfigError: naming the option and the nearest right one.
    """
    for name, value in options.items():
        where = f"{KEY}.{name} = {value!r}"
        if name not in option_names():
            near = difflib.get_close_matches(name, option_names(), n=1)
            hint = f"Did you mean {near[0]}? Otherwise remove it." if near else "Remove it."
            raise ConfigError(f"{where}: megatron-core's TransformerConfig has no such field. {hint}")
        if name in FROM_MODEL:
            raise ConfigError(f"{where}: the model directory decides this. Remove it, or use another model.")
        if name in FROM_PROFILE:
            other = f"set profile.trainer.{FROM_PROFILE[name]}" if FROM_PROFILE[name] else "leave it to slime"
            raise ConfigError(f"{where}: slime decides this itself. Remove it and {other}.")
        if name in PARALLEL and value not in (1, None, False):
            raise ConfigError(f"{where}: training is data-parallel only. Remove it, and set profile.trainer.num_ranks.")


@functools.cache
def option_names() -> frozenset[str]:
    """The fields of the installed TransformerConfig and its base class, read from their source."""
    spec = importlib.util.find_spec("megatron")
    if spec is None or spec.submodule_search_locations is None:
        raise ConfigError("megatron-core is not installed. Run `make setup`, or install slime with its dependencies.")
    core = next(path for root in spec.submodule_search_locations if (path := Path(root) / "core").is_dir())
    return frozenset(
        statement.target.id
        for file in ("model_parallel_config.py", "transformer/transformer_config.py")
        for node in ast.parse((core / file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name in ("ModelParallelConfig", "TransformerConfig")
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    )
