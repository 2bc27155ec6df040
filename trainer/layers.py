"""The layers slime puts into Megatron's own block spec where TransformerEngine is missing; nothing is patched.

Megatron's local attention refuses packed rows and its local norm refuses sequence parallelism. These do neither, and
run on any device. Shapes: s tokens, b batch, h heads, g key/value heads, d channels a head; T, P, n, L as in `packed`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from trainer import fused
from trainer.hf_config import HfConfig
from trainer.packed import PackedRow, Rotation, pad, unpad

MAX_SHORT_LENGTH = 64
"""Up to this length a whole matrix of probabilities is faster than flash attention's blocks on a CPU."""


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm as TransformerEngine gives it: computed in fp32, weight marked for sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return fused.rms_norm(x, self.weight, self.eps)


class SwiGLU(MegatronModule):  # type: ignore[misc]
    """The gated activation of all our families, in the place of TransformerEngine's.

    A Megatron module, because its MLP asks every part for a sharded state.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)

    def forward(self, x: Tensor) -> Tensor:
        return fused.swiglu(x)


class PackedRotaryEmbedding(RotaryEmbedding):  # type: ignore[misc]
    """Rotary embedding of packed rows: each token turns by its position in its own sequence.

    The row takes cosines and sines along to `PackedAttention`, which turns queries and keys by them: Megatron would
    compute both again in every layer. Padded batches go Megatron's way.
    """

    inv_freq: Tensor

    def __init__(self, config: HfConfig) -> None:
        super().__init__(
            kv_channels=config.head_dim, rotary_percent=1.0, rotary_base=config.rope_theta, use_cpu_initialization=True
        )
        if scaling := config.rope_scaling:
            self.inv_freq = self._apply_scaling(
                self.inv_freq,
                factor=scaling.factor,
                low_freq_factor=scaling.low_freq_factor,
                high_freq_factor=scaling.high_freq_factor,
                original_max_position_embeddings=scaling.original_max_position_embeddings,
            )

    def get_rotary_seq_len(
        self, inference_context: Any, transformer: Any, transformer_input: Any, transformer_config: Any, row: Any = None
    ) -> Any:
        """What `forward` gets: Megatron's length, or the row itself, whose positions replace it."""
        if isinstance(row, PackedRow) and row.qkv_format != "thd":
            return row
        return super().get_rotary_seq_len(inference_context, transformer, transformer_input, transformer_config, row)

    def forward(self, length: int | PackedRow, **options: Any) -> Tensor | None:
        """Angles [s, 1, 1, d]; None for a packed row, which then holds them itself."""
        if not isinstance(length, PackedRow):
            angles: Tensor = super().forward(length, **options)
            return angles
        self.inv_freq = self.inv_freq.to(length.positions.device)
        half = torch.outer(length.positions.to(self.inv_freq.dtype), self.inv_freq)[:, None]
        length.rotation = Rotation(cos=half.cos(), sin=half.sin())
        return None


class PackedAttention(torch.nn.Module):
    """Causal core attention on torch, for padded batches and for packed rows, with fewer key/value heads than heads."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale: float = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedRow | None = None,
        **_: Any,
    ) -> Tensor:
        """query [s, b, h, d], key and value [s, b, g, d] → [s, b, h * d]; s is T and b is 1 for a packed row."""
        if packed_seq_params is None:
            return self._attend(*(x.transpose(0, 1) for x in (query, key, value))).transpose(0, 1).flatten(2)
        row = packed_seq_params
        turned = (fused.rotate(x.squeeze(1), row.rotation.cos, row.rotation.sin) for x in (query, key))
        padded = [pad(x, row.plan) for x in (*turned, value.squeeze(1))]
        outputs, start = [], 0
        for num_sequences, length in row.plan.buckets:
            end = start + num_sequences * length
            outputs.append(self._attend(*(x[start:end].view(num_sequences, length, *x.shape[1:]) for x in padded)))
            start = end
        output = unpad(torch.cat([x.flatten(0, 1) for x in outputs]), row.plan)
        return output.flatten(1).unsqueeze(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[n, L, h, d] and twice [n, L, g, d] → [n, L, h, d]. Causal, so padding at the end needs no mask.

        On a CPU in fp32 throughout: flash attention's backward pass in bf16 is several times slower there.
        """
        dtype = query.dtype
        if query.device.type == "cpu":
            query, key, value = query.float(), key.float(), value.float()
            if query.shape[1] <= MAX_SHORT_LENGTH:
                return fused.short_attention(query, key, value, self.scale).to(dtype)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=True)
        return output.transpose(1, 2).to(dtype)
