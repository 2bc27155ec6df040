"""The model families slime trains: for each, how its Hugging Face tensors make up Megatron's parameters.

One table a family, read in both directions: `trainer.hf_io` loads and exports by it, `trainer.hf_config` checks a
directory against it. No torch here, so that a wrong directory is found out before anything heavy starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

LAYER = "{layer}"
"""Stands for the layer's number in names that exist once a layer."""

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


class Layout(Enum):
    """How several Hugging Face tensors lie in one Megatron parameter."""

    COPY = auto()
    """One tensor, as it is."""
    QKV = auto()
    """For each query group: its query heads, its key head, its value head, stacked along dimension 0."""
    GATE_UP = auto()
    """The gate projection over the up projection, stacked along dimension 0."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One Megatron parameter and the Hugging Face tensors it is made of.

    Shapes are written with the names of dimensions, see `Dimensions`.
    """

    megatron: str
    layout: Layout
    hf: dict[str, tuple[str, ...]]
    """Name → shape, in the layout's order."""


Dimensions = dict[str, int]
"""``hidden``, ``ffn``, ``vocab``, ``head``, ``query`` (all query heads) and ``kv`` (all key heads) → size."""


def _copy(megatron: str, hf: str, *shape: str) -> Parameter:
    return Parameter(megatron, Layout.COPY, {hf: shape})


_IN, _OUT = f"model.layers.{LAYER}.", f"decoder.layers.{LAYER}."

_EMBEDDING = (_copy("embedding.word_embeddings.weight", EMBEDDING, "vocab", "hidden"),)
_QKV_WEIGHT = (
    Parameter(
        _OUT + "self_attention.linear_qkv.weight",
        Layout.QKV,
        {
            _IN + "self_attn.q_proj.weight": ("query", "hidden"),
            _IN + "self_attn.k_proj.weight": ("kv", "hidden"),
            _IN + "self_attn.v_proj.weight": ("kv", "hidden"),
        },
    ),
)
_QKV_BIAS = (
    Parameter(
        _OUT + "self_attention.linear_qkv.bias",
        Layout.QKV,
        {
            _IN + "self_attn.q_proj.bias": ("query",),
            _IN + "self_attn.k_proj.bias": ("kv",),
            _IN + "self_attn.v_proj.bias": ("kv",),
        },
    ),
)
_QK_NORM = (
    _copy(_OUT + "self_attention.q_layernorm.weight", _IN + "self_attn.q_norm.weight", "head"),
    _copy(_OUT + "self_attention.k_layernorm.weight", _IN + "self_attn.k_norm.weight", "head"),
)
_LAYER = (
    _copy(_OUT + "input_layernorm.weight", _IN + "input_layernorm.weight", "hidden"),
    _copy(_OUT + "self_attention.linear_proj.weight", _IN + "self_attn.o_proj.weight", "hidden", "query"),
    _copy(_OUT + "pre_mlp_layernorm.weight", _IN + "post_attention_layernorm.weight", "hidden"),
    Parameter(
        _OUT + "mlp.linear_fc1.weight",
        Layout.GATE_UP,
        {_IN + "mlp.gate_proj.weight": ("ffn", "hidden"), _IN + "mlp.up_proj.weight": ("ffn", "hidden")},
    ),
    _copy(_OUT + "mlp.linear_fc2.weight", _IN + "mlp.down_proj.weight", "hidden", "ffn"),
)
_TOP = (
    _copy("decoder.final_layernorm.weight", "model.norm.weight", "hidden"),
    _copy("output_layer.weight", HEAD, "vocab", "hidden"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What one architecture has beyond the decoder that all families share."""

    parameters: tuple[Parameter, ...]
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family(parameters=(*_EMBEDDING, *_QKV_WEIGHT, *_LAYER, *_TOP)),
    "qwen2": Family(parameters=(*_EMBEDDING, *_QKV_WEIGHT, *_QKV_BIAS, *_LAYER, *_TOP), qkv_bias=True),
    "qwen3": Family(parameters=(*_EMBEDDING, *_QKV_WEIGHT, *_QK_NORM, *_LAYER, *_TOP), qk_norm=True),
}
"""By the `model_type` of config.json."""

FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Where TransformerEngine's layer keeps two of the norms: inside the projection that follows them."""


def parameters(family: str, *, num_layers: int, tied: bool) -> Iterator[Parameter]:
    """Every parameter of a model, layers written out, in the order of the forward pass; `tied` leaves out the head."""
    table = FAMILIES[family].parameters
    first = next(i for i, entry in enumerate(table) if LAYER in entry.megatron)
    repeated = [entry for entry in table if LAYER in entry.megatron]
    yield from table[:first]
    for layer in range(num_layers):
        for entry in repeated:
            yield Parameter(
                entry.megatron.format(layer=layer),
                entry.layout,
                {name.format(layer=layer): shape for name, shape in entry.hf.items()},
            )
    for entry in table[first + len(repeated) :]:
        if not (tied and HEAD in entry.hf):
            yield entry
