"""Read and check a Hugging Face model directory, without torch and in milliseconds.

Everything that can be wrong with it is said here, before a process is started: the files, the family, the features,
and the name, shape and dtype of every tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime.errors import ModelError
from trainer import families

DTYPES = ("BF16", "F16", "F32")
"""safetensors' names of the dtypes that can be trained."""

_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a safetensors file, as its header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Llama 3's scaling of rotary frequencies (``rope_type = "llama3"``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HfConfig:
    """A model directory that slime can train."""

    path: Path
    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    tied: bool
    """The output projection is the embedding."""
    tensors: Mapping[str, StoredTensor]
    """Every tensor in the directory, by its Hugging Face name."""

    @property
    def dimensions(self) -> families.Dimensions:
        return {
            "hidden": self.hidden_size,
            "ffn": self.ffn_size,
            "vocab": self.vocab_size,
            "head": self.head_dim,
            "query": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
        }

    def parameters(self) -> list[families.Parameter]:
        """The model's Megatron parameters and what they are made of."""
        return list(families.parameters(self.family, num_layers=self.num_layers, tied=self.tied))


def read_model_config(path: Path | str) -> HfConfig:
    """Read ``config.json`` and the headers of the weights in `path`.

    Raises:
        ModelError: not a directory, no or broken config.json, no or incomplete weights, a family or feature slime
            does not train, missing, extra or wrongly shaped tensors.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelError(
            f"{path} is not a directory. Give model.path a Hugging Face directory (config.json and safetensors), "
            "or download the model there first."
        )
    raw = _read_json(path / "config.json", why="it describes the model")
    _check_features(path, raw)
    config = _from_json(path, raw, _read_tensors(path))
    _check_tensors(config)
    return config


def _read_json(path: Path, *, why: str) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist; {why}. Point model.path at a complete Hugging Face directory, "
            "or save the model there with save_pretrained."
        ) from None
    except (OSError, ValueError) as cause:
        raise ModelError(f"{path} cannot be read: {cause}. Repair it, or fetch the model again.") from cause
    if not isinstance(body, dict):
        raise ModelError(f"{path} holds a {type(body).__name__}, expected an object. Fetch the model again.")
    return body


def _check_features(path: Path, raw: dict[str, Any]) -> None:
    """Refuse what would otherwise be trained as something else."""
    family = raw.get("model_type")
    if family not in families.FAMILIES:
        raise ModelError(
            f"{path}/config.json: model_type is {family!r}; slime trains {', '.join(sorted(families.FAMILIES))}. "
            "Use a model of one of these families, or add a table for this one to trainer/families.py."
        )
    windows = raw.get("layer_types") or ()
    unsupported = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "use_sliding_window": bool(raw.get("use_sliding_window")),
        "layer_types": any(kind != "full_attention" for kind in windows),
        "quantization_config": raw.get("quantization_config") is not None,
    }
    for key, refused in unsupported.items():
        if refused:
            raise ModelError(
                f"{path}/config.json: {key} = {raw[key]!r} is a feature slime does not train. "
                "Use a model without it, or convert this one first."
            )


def _from_json(path: Path, raw: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> HfConfig:
    fields = _Fields(path / "config.json", raw)
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads = {num_heads}")
    theta, scaling = _read_rope(fields)
    return HfConfig(
        path=path,
        family=raw["model_type"],
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_size=fields.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.integer("head_dim", default=hidden_size // num_heads),
        vocab_size=fields.integer("vocab_size"),
        max_positions=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=bool(raw.get("tie_word_embeddings", False)),
        tensors=tensors,
    )


def _read_rope(fields: _Fields) -> tuple[float, Llama3Rope | None]:
    """Base and scaling: ``rope_parameters`` of transformers 5, ``rope_theta`` and ``rope_scaling`` of older ones."""
    parameters = fields.raw.get("rope_parameters") or fields.raw.get("rope_scaling") or {}
    rope = _Fields(fields.path, {"rope_theta": fields.raw.get("rope_theta", 10000.0), **parameters})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if rope.number("partial_rotary_factor", default=1.0) != 1.0:
        raise rope.error("partial_rotary_factor", rope.raw["partial_rotary_factor"], "1.0")
    theta = rope.number("rope_theta")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise rope.error("rope_type", kind, '"default" or "llama3"')
    return theta, Llama3Rope(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """The fields of a config.json, with errors that name file and key."""

    path: Path
    raw: dict[str, Any]

    def integer(self, key: str, *, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, value, "a whole number above 0")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self.error(key, value, "a number above 0")
        return float(value)

    def error(self, key: str, value: object, right: str) -> ModelError:
        return ModelError(
            f"{self.path}: {key} is {value!r}, expected {right}. Correct it, or use another model directory."
        )


def _read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The headers of all weight files of a directory."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index, why="it lists the weights").get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map. Fetch the model again, or save it with save_pretrained.")
        files = sorted(set(weight_map.values()))
        if missing := [file for file in files if not (path / file).is_file()]:
            raise ModelError(
                f"{path} lacks {_some(missing)}, which model.safetensors.index.json names. Fetch the missing files, "
                "or save the model again."
            )
    elif (path / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        raise ModelError(
            f"{path} has no safetensors weights (model.safetensors or model.safetensors.index.json). Point model.path "
            "at a directory that has them, or convert the weights with save_pretrained."
        )
    return {name: tensor for file in files for name, tensor in _read_header(path / file).items()}


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The header of one safetensors file: 8 bytes of length, little-endian, then JSON, then the data it describes."""
    try:
        with file.open("rb") as stream:
            num_bytes = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(min(num_bytes, _MAX_HEADER_BYTES)))
        header.pop("__metadata__", None)
        end = 8 + num_bytes + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {
            name: StoredTensor(file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]))
            for name, entry in header.items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ModelError(f"{file} is not a safetensors file. Fetch it again, or save the model again.") from None
    if file.stat().st_size != end:
        raise ModelError(
            f"{file} has {file.stat().st_size} bytes, its header says {end}: the file is torn. Fetch it again, "
            "or save the model again."
        )
    return tensors


def _check_tensors(config: HfConfig) -> None:
    """Names, shapes and dtypes are those of the family's table."""
    expected = {
        name: tuple(config.dimensions[dimension] for dimension in shape)
        for parameter in config.parameters()
        for name, shape in parameter.hf.items()
    }
    if config.tied and families.HEAD in config.tensors:  # some writers store the tied head a second time
        expected[families.HEAD] = expected[families.EMBEDDING]
    # Older Llama checkpoints store the rotary frequencies, which follow from the configuration.
    stored = {name: t for name, t in config.tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    way_out = "Use the directory as its authors saved it, or correct config.json."
    if missing := sorted(expected.keys() - stored.keys()):
        raise ModelError(f"{config.path} lacks {_some(missing)}, which a {config.family} model has. {way_out}")
    if extra := sorted(stored.keys() - expected.keys()):
        raise ModelError(f"{config.path} holds {_some(extra)}, which a {config.family} model does not have. {way_out}")
    if wrong := [
        f"{name} {list(tensor.shape)} instead of {list(expected[name])}"
        for name, tensor in stored.items()
        if tensor.shape != expected[name]
    ]:
        raise ModelError(f"{config.path} has tensors of the wrong shape: {_some(wrong)}. {way_out}")
    if wrong := [f"{name} ({tensor.dtype})" for name, tensor in stored.items() if tensor.dtype not in DTYPES]:
        raise ModelError(f"{config.path}: {_some(wrong)} is none of {', '.join(DTYPES)}. {way_out}")


def _some(names: Iterable[str]) -> str:
    """The first few of them, and how many more."""
    names = list(names)
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + rest
