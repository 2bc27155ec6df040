"""The layers slime puts into Megatron's own block spec where TransformerEngine is missing; nothing is patched.

Megatron's local attention refuses packed rows and its local norm refuses sequence parallelism. These do neither, and
run on any device. Shapes: s tokens, b batch, h heads, g key/value heads, d channels a head; T, P, n, L as in `packed`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from trainer.hf_config import HfConfig
from trainer.packed import PackedRow, pad, unpad


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm as TransformerEngine gives it: computed in fp32, weight marked for sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


class PackedRotaryEmbedding(RotaryEmbedding):  # type: ignore[misc]
    """Rotary angles by the position of each token in its own sequence, for a whole packed row at once."""

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

    def forward(self, length: int | PackedRow, **options: Any) -> Tensor:
        """Angles [s, 1, 1, d]."""
        if not isinstance(length, PackedRow):
            angles: Tensor = super().forward(length, **options)
            return angles
        self.inv_freq = self.inv_freq.to(length.positions.device)
        angles = torch.outer(length.positions.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


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
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

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
        plan = packed_seq_params.plan
        query, key, value = (pad(x.squeeze(1), plan) for x in (query, key, value))
        outputs, start = [], 0
        for num_sequences, length in plan.buckets:
            end = start + num_sequences * length
            bucket = (x[start:end].view(num_sequences, length, *x.shape[1:]) for x in (query, key, value))
            outputs.append(self._attend(*bucket).flatten(0, 1))
            start = end
        output = unpad(torch.cat(outputs), plan)
        return output.flatten(1).unsqueeze(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[n, L, h, d] and twice [n, L, g, d] → [n, L, h, d]. Causal, so padding at the end needs no mask."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=True)
        return output.transpose(1, 2)
