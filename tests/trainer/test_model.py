"""Megatron's model against Hugging Face transformers with the same weights."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from slime.errors import ConfigError, TrainerError
from tests.builders import make_model
from trainer.hf_io import named_hf_tensors
from trainer.layers import MAX_SHORT_LENGTH
from trainer.model import PolicyModel, build_model, initialize_distributed, make_row
from trainer.packed import PackedRow

pytestmark = pytest.mark.usefixtures("process_group")

FAMILIES = [("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)]
LENGTHS = [50, 1, 31, 33, MAX_SHORT_LENGTH + 40, 7, 7, 2, MAX_SHORT_LENGTH + 1]
"""Several buckets, a single token, and sequences on both sides of the switch to flash attention."""

CPU = torch.device("cpu")


def reference(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model.get_input_embeddings().padding_idx = None  # else transformers leaves out the gradient of token 0
    return model


def packed(lengths: list[int], *, seed: int = 0) -> tuple[Tensor, PackedRow, list[slice]]:
    """Random tokens [1, T], the row they make, and where each sequence is."""
    cu_seqlens = np.cumsum([0, *lengths])
    positions = np.concatenate([np.arange(length) for length in lengths])
    tokens = torch.randint(0, 128, (1, int(cu_seqlens[-1])), generator=torch.Generator().manual_seed(seed))
    row = make_row(cu_seqlens, positions, device=CPU)
    return tokens, row, [slice(a, b) for a, b in itertools.pairwise(cu_seqlens)]


def packed_logits(model: PolicyModel, tokens: Tensor, row: PackedRow) -> Tensor:
    return model(tokens, row.positions[None], attention_mask=None, packed_seq_params=row)


def reference_logits(model: Any, tokens: Tensor, sequences: list[slice]) -> Tensor:
    return torch.cat([model(tokens[:, sequence]).logits for sequence in sequences], dim=1)


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


@pytest.mark.parametrize(("family", "tie"), FAMILIES)
def test_packed_logits_and_all_gradients_equal_transformers(family: str, tie: bool, tmp_path: Path) -> None:
    """A wrong mask, angle, head order or weight crashes nothing: another model is trained than the one served."""
    directory = make_model(tmp_path, family, tie=tie, dtype="float32")
    ours, theirs = build_model(directory, precision="fp32"), reference(directory)
    tokens, row, sequences = packed(LENGTHS)
    logits, expected = packed_logits(ours, tokens, row), reference_logits(theirs, tokens, sequences)
    assert logits.shape == expected.shape
    assert largest_difference(logits, expected) < 1e-4

    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    logits.backward(weights)
    expected.backward(weights)
    gradients = gradients_by_hf_name(ours)
    for name, parameter in theirs.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


def gradients_by_hf_name(model: PolicyModel) -> dict[str, Tensor]:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.grad
    return dict(named_hf_tensors(model))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_padded_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    """The unpacked path has its own rotary embedding and its own attention layout."""
    directory = make_model(tmp_path, family, dtype="float32")
    ours, theirs = build_model(directory, precision="fp32"), reference(directory)
    for length in (MAX_SHORT_LENGTH, MAX_SHORT_LENGTH + 30):
        tokens = torch.randint(0, 128, (3, length), generator=torch.Generator().manual_seed(length))
        positions = torch.arange(length).expand(3, -1)
        assert largest_difference(ours(tokens, positions, attention_mask=None), theirs(tokens).logits) < 1e-4


def test_llama3_rope_scaling_equals_transformers(tmp_path: Path) -> None:
    """Unscaled frequencies agree for short sequences and drift apart slowly with the position."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    directory = make_model(tmp_path, "llama", dtype="float32", rope_parameters=rope)
    ours, theirs = build_model(directory, precision="fp32"), reference(directory)
    tokens, row, sequences = packed([400, 20])
    expected = reference_logits(theirs, tokens, sequences)
    assert largest_difference(packed_logits(ours, tokens, row), expected) < 1e-4
    positions = torch.arange(400)[None]
    assert largest_difference(ours(tokens[:, :400], positions, attention_mask=None), expected[:, :400]) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bf16_logits_are_as_near_to_fp32_as_those_of_transformers(family: str, tmp_path: Path) -> None:
    """An operation that loses more than bf16 must shows up here, long before a reward curve shows it."""
    directory = make_model(tmp_path, family)
    tokens, row, sequences = packed(LENGTHS)
    with torch.no_grad():
        exact = reference_logits(reference(directory), tokens, sequences)
        theirs = reference_logits(reference(directory, torch.bfloat16), tokens, sequences).float()
        ours = packed_logits(build_model(directory, precision="bf16"), tokens, row)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).abs().mean() < 1.1 * (theirs - exact).abs().mean()


def test_sequences_of_a_row_do_not_see_each_other(tmp_path: Path) -> None:
    """A leak between neighbours looks like slightly better predictions."""
    model = build_model(make_model(tmp_path, "qwen3"), precision="bf16")
    tokens, row, sequences = packed(LENGTHS)
    with torch.no_grad():
        before = packed_logits(model, tokens, row)
        tokens[:, sequences[3]] = 5
        after = packed_logits(model, tokens, row)
    for i, sequence in enumerate(sequences):
        assert torch.equal(before[:, sequence], after[:, sequence]) == (i != 3)


def test_recomputation_changes_no_gradient(tmp_path: Path) -> None:
    """The recomputed forward pass must see the same row."""
    directory = make_model(tmp_path, "qwen3", dtype="float32")
    gradients = []
    for recompute in (False, True):
        model = build_model(directory, precision="fp32", recompute=recompute)
        tokens, row, _ = packed(LENGTHS)
        packed_logits(model, tokens, row).square().sum().backward()
        gradients.append(gradients_by_hf_name(model))
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("cu_seqlens", [[0, 3], [1, 5], [0, 4, 3, 5], [0], [0, 6]])
def test_a_row_that_its_sequences_do_not_cover_is_refused(cu_seqlens: list[int]) -> None:
    """Tokens outside of every sequence would attend to nothing and be trained on noise."""
    with pytest.raises(ValueError, match="do not cover"):
        make_row(np.array(cu_seqlens), np.arange(5), device=CPU)


def test_a_row_may_hold_an_empty_sequence(tmp_path: Path) -> None:
    """A sequence without tokens must not shift its neighbours."""
    model = build_model(make_model(tmp_path, "llama", dtype="float32"), precision="fp32")
    tokens, row, _ = packed([4, 0, 3])
    _, without, _ = packed([4, 3])
    with torch.no_grad():
        assert torch.equal(packed_logits(model, tokens, row), packed_logits(model, tokens, without))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layernorm_epsilonn": 1.0}, "Did you mean layernorm_epsilon?"),
        ({"zzz": 1}, "no such field. Remove it"),
        ({"num_layers": 3}, "model directory"),
        ({"params_dtype": "bf16"}, "profile.trainer.precision"),
        ({"tensor_model_parallel_size": 2}, "data-parallel only"),
        ({"cuda_graph_impl": "nonsense"}, "Megatron refuses it"),
    ],
)
def test_megatron_options_are_checked(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A misspelt option that is ignored leaves a run that is not the one its owner described."""
    with pytest.raises(ConfigError) as caught:
        build_model(make_model(tmp_path), precision="fp32", megatron_options=options)
    assert message in str(caught.value)
    assert next(iter(options)) in str(caught.value)


def test_a_megatron_option_reaches_the_model(tmp_path: Path) -> None:
    model = build_model(make_model(tmp_path), precision="fp32", megatron_options={"recompute_modules": ["mlp"]})
    assert model.config.recompute_modules == ["mlp"]


def test_a_taken_port_is_named() -> None:
    """Two runs on one port would wait for each other's ranks."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TrainerError, match=f"127.0.0.1:{port}"):
            join(rank=0, port=port)


def test_a_rank_that_waits_alone_gives_up_in_time() -> None:
    """A rank whose peers never start must not hang the run."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(TrainerError, match="rank 1 of 2"):
        join(rank=1, port=port)


def join(*, rank: int, port: int) -> None:
    initialize_distributed(rank=rank, world_size=2, address="127.0.0.1", port=port, timeout_s=1, seed=0, device=CPU)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of sockets")
def test_ranks_listen_on_the_loopback_interface_only() -> None:
    """The rendezvous takes orders from whoever reaches it."""
    descriptors = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    sockets = {os.readlink(path) for path in descriptors if os.path.lexists(path)}
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[i] for i in (1, 3, 9))
            if f"socket:[{inode}]" in sockets and state == "0A":
                listening.append(local.split(":")[0])
    assert listening
    assert set(listening) <= {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
