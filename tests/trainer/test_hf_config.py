"""Reading model directories: what is accepted, and what is refused with which words."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime.errors import ModelError
from tests.builders import make_model
from trainer.hf_config import Llama3Rope, read_model_config


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", "qwen3")


def change_config(model: Path, **changes: Any) -> None:
    """Write keys into config.json; None removes one."""
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors")


def write_index(model: Path, body: object) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps(body))


def test_a_directory_is_read(model: Path) -> None:
    config = read_model_config(model)
    assert (config.family, config.num_layers, config.hidden_size, config.ffn_size) == ("qwen3", 2, 64, 96)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (4, 2, 32, 128)
    assert (config.rope_theta, config.rope_scaling, config.tied) == (10000.0, None, True)
    stored = config.tensors["model.layers.1.self_attn.k_proj.weight"]
    assert (stored.dtype, stored.shape) == ("BF16", (64, 64))


def test_rope_of_older_checkpoints_is_read(model: Path) -> None:
    """With the key of another transformers version overlooked, a model would get the default base and still talk."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    change_config(model, rope_parameters=None, rope_theta=5e5, rope_scaling=scaling)
    config = read_model_config(model)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
    )


def test_head_dim_defaults_to_an_even_share(tmp_path: Path) -> None:
    """Llama's and Qwen2's config.json usually leave it out."""
    model = make_model(tmp_path, "llama")
    change_config(model, head_dim=None)
    assert read_model_config(model).head_dim == 16


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), "config.json does not exist"),
    "broken config": (lambda m: (m / "config.json").write_text('{"model_type": '), "config.json cannot be read"),
    "config is a list": (lambda m: (m / "config.json").write_text("[]"), "holds a list"),
    "unknown family": (lambda m: change_config(m, model_type="mamba"), "'mamba'; slime trains llama, qwen2, qwen3"),
    "no family": (lambda m: change_config(m, model_type=None), "model_type is None"),
    "sliding window": (lambda m: change_config(m, use_sliding_window=True), "use_sliding_window = True"),
    "sliding layers": (lambda m: change_config(m, layer_types=["sliding_attention"] * 2), "layer_types"),
    "attention bias": (lambda m: change_config(m, attention_bias=True), "attention_bias = True"),
    "other activation": (lambda m: change_config(m, hidden_act="gelu"), "hidden_act = 'gelu'"),
    "quantised": (lambda m: change_config(m, quantization_config={"quant_method": "fp8"}), "quantization_config"),
    "yarn": (lambda m: change_config(m, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "'yarn'"),
    "partial rotary": (
        lambda m: change_config(m, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor is 0.5",
    ),
    "no layers": (lambda m: change_config(m, num_hidden_layers=None), "num_hidden_layers is None"),
    "text for a number": (lambda m: change_config(m, hidden_size="64"), "hidden_size is '64'"),
    "heads do not divide": (lambda m: change_config(m, num_key_value_heads=3), "a divisor of num_attention_heads = 4"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no safetensors weights"),
    "missing shard": (
        lambda m: write_index(m, {"weight_map": {"a": "model-00001-of-00002.safetensors"}}),
        "lacks model-00001-of-00002.safetensors",
    ),
    "index without map": (lambda m: write_index(m, {}), "no weight_map"),
    "torn weights": (
        lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-10]),
        "the file is torn",
    ),
    "not safetensors": (
        lambda m: (m / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "not a safetensors file",
    ),
    "empty weights": (lambda m: (m / "model.safetensors").write_bytes(b""), "not a safetensors file"),
    "missing tensor": (
        lambda m: change_weights(m, lambda w: w.pop("model.layers.0.mlp.up_proj.weight")),
        "lacks model.layers.0.mlp.up_proj.weight",
    ),
    "extra tensor": (
        lambda m: change_weights(m, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(4)})),
        "holds model.layers.0.self_attn.q_proj.bias",
    ),
    "untied without a head": (lambda m: change_config(m, tie_word_embeddings=False), "lacks lm_head.weight"),
    "wrong shape": (lambda m: change_config(m, vocab_size=130), "model.embed_tokens.weight [128, 64] instead of [130"),
    "wrong dtype": (
        lambda m: change_weights(m, lambda w: w.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})),
        "model.norm.weight (I8)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_directory_is_refused_by_name(model: Path, case: str) -> None:
    """Each would otherwise end minutes later in a child process, or train another model than the one meant."""
    break_it, message = BROKEN[case]
    break_it(model)
    with pytest.raises(ModelError) as caught:
        read_model_config(model)
    assert message in str(caught.value)
    assert str(model) in str(caught.value)


def test_what_is_not_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a directory"):
        read_model_config(tmp_path / "nowhere")


def test_a_directory_is_read_without_torch(model: Path) -> None:
    """The check runs before every start; seconds of imports there are seconds of every mistake."""
    code = (
        "import sys; from trainer.hf_config import read_model_config; read_model_config(sys.argv[1]); "
        "assert not {'torch', 'megatron', 'safetensors', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(model)], check=True, timeout=60)
