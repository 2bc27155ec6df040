"""Loading staged weights, on a model that behaves like SGLang's: it fuses tensors and skips names it does not know."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rollout.engine import named_tensor_payload
from rollout.weight_loader import load_staged
from slime.errors import EngineError
from tests.rollout.engines import stage


class Fused(torch.nn.Module):
    """`k` and `v` share one parameter, as an engine's fused projections do; unknown names are skipped."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.kv = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16))
        self.norm = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.config = SimpleNamespace(tie_word_embeddings=tied)

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        targets = {"k": self.kv.data[:2], "v": self.kv.data[2:], "norm": self.norm.data}
        for name, tensor in weights:
            if name in targets:
                assert targets[name].shape == tensor.shape
                targets[name].copy_(tensor)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape).bfloat16() for name, shape in [("k", (2, 3)), ("v", (2, 3)), ("norm", (3,))]}


def load(model: Fused, manifest: str) -> None:
    load_staged(model, [(manifest, torch.Tensor())])


def test_every_tensor_arrives_bit_equal(tmp_path: Path) -> None:
    """Pins offsets and types of the mapped file."""
    model, staged = Fused(), tensors()
    load(model, stage(staged, tmp_path / "w"))
    assert torch.equal(model.kv, torch.cat([staged["k"], staged["v"]]))
    assert torch.equal(model.norm, staged["norm"])


def test_a_part_of_a_fused_parameter_that_is_missing_is_refused(tmp_path: Path) -> None:
    """Pins that a parameter half new and half old is noticed: its name alone was seen."""
    staged = tensors()
    del staged["v"]
    with pytest.raises(EngineError, match=r"partly staged 1: kv"):
        load(Fused(), stage(staged, tmp_path / "w"))


def test_a_staged_tensor_that_the_model_skips_is_refused(tmp_path: Path) -> None:
    """Pins that a renamed tensor is not silently left out."""
    with pytest.raises(EngineError, match=r"not used 1: bias"):
        load(Fused(), stage({**tensors(), "bias": torch.ones(3)}, tmp_path / "w"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_skipped_head_is_fine_only_when_it_is_tied_to_the_embedding(tmp_path: Path, tied: bool) -> None:
    """Pins the one tensor that may be skipped."""
    manifest = stage({**tensors(), "lm_head.weight": torch.ones(3)}, tmp_path / "w")
    if tied:
        load(Fused(tied=True), manifest)
    else:
        with pytest.raises(EngineError, match=r"lm_head\.weight"):
            load(Fused(tied=False), manifest)


def test_one_flipped_bit_is_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    """Pins that damaged bytes never become weights."""
    manifest, model = stage(tensors(), tmp_path / "w"), Fused()
    content = bytearray((tmp_path / "w" / "weights.bin").read_bytes())
    content[-1] ^= 1
    (tmp_path / "w" / "weights.bin").write_bytes(content)
    with pytest.raises(EngineError, match=r"norm at byte 128 .* checksum"):
        load(model, manifest)
    assert not model.kv.any()


def test_a_short_file_is_refused(tmp_path: Path) -> None:
    """Pins that reading past the end of a mapping is an error, not a crash of the scheduler."""
    manifest = stage(tensors(), tmp_path / "w")
    (tmp_path / "w" / "weights.bin").write_bytes(b"\0" * 8)
    with pytest.raises(EngineError, match="has 8 bytes"):
        load(Fused(), manifest)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    """Pins that the model's own complaint becomes an EngineError, which the engine answers and survives."""
    with pytest.raises(EngineError, match="loading staged weights"):
        load(Fused(), stage({**tensors(), "k": torch.ones(1, 3).bfloat16()}, tmp_path / "w"))


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    """Pins that trainer and engine of different versions do not misread each other."""
    manifest = Path(stage(tensors(), tmp_path / "w"))
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(EngineError, match="format 99"):
        load(Fused(), str(manifest))


@pytest.mark.parametrize("path", ["/dev/shm/slime/manifest.json", "/tmp/Größe\n'\\/m.json", "/" + "x" * 300])
def test_the_handwritten_pickle_is_one_name_and_an_empty_tensor(path: str) -> None:
    """Pins the wire format against Python's own unpickler."""
    ((name, tensor),) = pickle.loads(named_tensor_payload(path))
    assert name == path
    assert isinstance(tensor, torch.Tensor)
    assert tensor.numel() == 0
