"""Build Megatron's GPTModel from a Hugging Face directory, on whatever this machine has."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from slime.errors import ConfigError, TrainerError
from trainer import families
from trainer.hf_config import HfConfig, read_model_config
from trainer.hf_io import load_weights
from trainer.layers import PackedAttention, PackedRotaryEmbedding, RMSNorm, SwiGLU
from trainer.megatron_options import KEY, check_megatron_options
from trainer.packed import PackedRow, make_packed_row

Precision = Literal["bf16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def initialize_distributed(
    *,
    rank: int,
    world_size: int,
    address: str,
    port: int,
    timeout_s: float,
    seed: int,
    device: torch.device,
    listener: socket.socket | None = None,
) -> None:
    """Join the process group of all ranks and set Megatron up on it, data-parallel; seed every generator.

    Rank 0 listens on `address`:`port` (0: any free one), and on no other interface, unless it has a `listener` there
    already. All ranks draw from the same seed: Megatron offsets it where ranks must differ.

    Raises:
        TrainerError: the port is taken, or the ranks did not all come before `timeout_s`.
    """
    _stay_on_loopback(address)
    try:
        if rank == 0:
            listener = listener or socket.create_server((address, port))
        store = _rendezvous(world_size=world_size, address=address, port=port, timeout_s=timeout_s, listener=listener)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (OSError, RuntimeError) as cause:
        raise TrainerError(
            f"rank {rank} of {world_size} could not join the others at {address}:{port} within {timeout_s:.0f} s: "
            f"{cause}. See that every rank has started, or raise profile.trainer.distributed_timeout_s."
        ) from cause
    if device.type == "cuda":
        torch.cuda.set_device(device)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(seed)
    np.random.seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _stay_on_loopback(address: str) -> None:
    """Ranks that meet on the loopback interface talk there too: gloo would listen where the host's name points."""
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback and address in ("127.0.0.1", "localhost", "::1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])


def local_device(kind: str) -> torch.device:
    """The one device of this process; where there are several, Ray shows each rank its own only."""
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")


def _rendezvous(
    *, world_size: int, address: str, port: int, timeout_s: float, listener: socket.socket | None
) -> TCPStore:
    """The store through which ranks find each other. torch alone would have rank 0 listen on every interface."""
    timeout = timedelta(seconds=timeout_s)
    if listener is None:
        return TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    return TCPStore(address, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())


def build_model(
    model: HfConfig | Path | str,
    *,
    precision: Precision,
    recompute: bool = False,
    megatron_options: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> PolicyModel:
    """Build the model of a Hugging Face directory, with its weights, after `initialize_distributed`.

    ``model(tokens, positions, attention_mask=None, packed_seq_params=row)`` takes tokens and positions [1, T] and gives
    logits [1, T, vocab] in the precision's dtype; without a row, tokens [b, s] are padded sequences, all causal.

    Raises:
        ModelError: the directory is not one slime can train.
        ConfigError: `megatron_options` holds an unknown name or a value that Megatron refuses.
    """
    options = dict(megatron_options or {})
    check_megatron_options(options)
    config = model if isinstance(model, HfConfig) else read_model_config(model)
    device = device or local_device("cuda" if torch.cuda.is_available() else "cpu")
    fused = _has_transformer_engine(device)
    try:
        megatron_config = TransformerConfig(**_megatron_fields(config, precision, recompute, fused=fused) | options)
    except (TypeError, ValueError, AssertionError) as cause:
        raise ConfigError(f"{KEY} = {options}: Megatron refuses it: {cause}. Correct or remove it.") from cause
    policy = PolicyModel(config, megatron_config, fused=fused)
    load_weights(policy, config)
    policy.to(device)
    return policy


class PolicyModel(GPTModel):  # type: ignore[misc]
    """Megatron's GPTModel that knows the directory it came from."""

    def __init__(self, config: HfConfig, megatron_config: TransformerConfig, *, fused: bool) -> None:
        """With `fused`, the layers are TransformerEngine's (CUDA; not yet run by us), else torch's."""
        super().__init__(
            config=megatron_config,
            transformer_layer_spec=_block_spec(megatron_config, fused=fused),
            vocab_size=config.vocab_size,
            max_sequence_length=config.max_positions,
            share_embeddings_and_output_weights=config.tied,
            position_embedding_type="rope",
            rotary_base=config.rope_theta,
        )
        self.hf_config = config
        self.norms_are_fused = fused
        self.rotary_pos_emb = PackedRotaryEmbedding(config)


def make_row(cu_seqlens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], *, device: torch.device) -> PackedRow:
    """Describe a packed row to the model: its `packed_seq_params`.

    Args:
        cu_seqlens: [num_sequences + 1]; sequence i is ``[cu_seqlens[i], cu_seqlens[i + 1])``.
        positions: [T], position of each token in its own sequence.
        device: where the model is.

    Raises:
        ValueError: the sequences do not cover exactly the T tokens.
    """
    qkv_format = "thd" if _has_transformer_engine(device) else "packed"
    return make_packed_row(cu_seqlens, positions, device=device, qkv_format=qkv_format)


def _has_transformer_engine(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def _megatron_fields(config: HfConfig, precision: Precision, recompute: bool, *, fused: bool) -> dict[str, Any]:
    """`config` in the words of Megatron's TransformerConfig."""
    family, dtype = families.FAMILIES[config.family], DTYPES[precision]
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_size,
        "num_attention_heads": config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": family.qkv_bias,
        "qk_layernorm": family.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": precision == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "recompute_granularity": "full" if recompute else None,
        "recompute_method": "uniform" if recompute else None,
        "recompute_num_layers": 1 if recompute else None,
        "use_cpu_initialization": True,
        "perform_initialization": False,  # every weight is loaded
        "gradient_accumulation_fusion": False,  # Apex's kernel
        # Kernels of TransformerEngine and torch.compile; without them the spec's activation is taken, which is ours.
        "apply_rope_fusion": fused,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "use_te_activation_func": not fused,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "cuda_graph_scope": [],  # the default is a deprecated word for it, and warns
        "calculate_per_token_loss": True,
    }


def _block_spec(config: TransformerConfig, *, fused: bool) -> Any:
    """Megatron's own block spec; without TransformerEngine, with our norm and core attention in its places."""
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=fused, normalization="RMSNorm")
    if fused:
        return spec
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        layer.submodules.mlp.submodules.activation_func = SwiGLU
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
