"""Hugging Face weights into Megatron's model and out again."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from slime.errors import ModelError
from tests.builders import make_model
from trainer.hf_io import named_hf_tensors, write_hf_directory
from trainer.model import build_model

pytestmark = pytest.mark.usefixtures("process_group")


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_bit_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tie", [True, False])
def test_load_and_export_return_every_bit(family: str, tie: bool, tmp_path: Path) -> None:
    """Exchanged heads or halves that are exchanged back on export are invisible; here names, shapes and bits meet."""
    directory = make_model(tmp_path / "source", family, tie=tie)
    model = build_model(directory, precision="bf16")
    assert_bit_equal(dict(named_hf_tensors(model)), stored(directory))
    write_hf_directory(tmp_path / "out", named_hf_tensors(model), source=directory)
    assert_bit_equal(stored(tmp_path / "out"), stored(directory))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()


def test_a_wrapped_model_exports_the_same(tmp_path: Path) -> None:
    """The trainer wraps the model for data parallelism before it ever exports."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    model = build_model(make_model(tmp_path), precision="bf16")
    assert_bit_equal(dict(named_hf_tensors(Wrapper(Wrapper(model)))), dict(named_hf_tensors(model)))


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    """Only large models are sharded, so a broken index would first show on one of them."""
    whole = make_model(tmp_path / "whole", "qwen2", tie=False)
    model = build_model(whole, precision="bf16")
    write_hf_directory(tmp_path / "sharded", named_hf_tensors(model), source=whole, shard_bytes=50_000)
    files = sorted(file.name for file in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(whole).values())
    assert_bit_equal(stored(tmp_path / "sharded"), stored(whole))

    write_hf_directory(
        tmp_path / "again",
        named_hf_tensors(build_model(tmp_path / "sharded", precision="bf16")),
        source=tmp_path / "sharded",
    )
    assert (tmp_path / "again" / "model.safetensors").is_file()
    assert not (tmp_path / "again" / "model.safetensors.index.json").exists()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype=torch.bfloat16)
    assert_bit_equal(theirs.state_dict(), stored(whole))


def test_a_tied_head_that_is_stored_comes_back(tmp_path: Path) -> None:
    """Some writers store it; readers that look for it must find it again."""
    directory = make_model(tmp_path / "source")
    weights = stored(directory)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, directory / "model.safetensors")
    model = build_model(directory, precision="bf16")
    write_hf_directory(tmp_path / "out", named_hf_tensors(model), source=directory)
    assert_bit_equal(stored(tmp_path / "out"), weights)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    """One of the two would be dropped without a word."""
    directory = make_model(tmp_path)
    weights = stored(directory)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head\.weight differs"):
        build_model(directory, precision="bf16")


def test_an_fp32_checkpoint_trained_in_bf16_says_so(tmp_path: Path) -> None:
    """config.json's dtype decides how others load the export."""
    directory = make_model(tmp_path / "source", "llama", dtype="float32")
    model = build_model(directory, precision="bf16")
    write_hf_directory(tmp_path / "out", named_hf_tensors(model), source=directory)
    assert_bit_equal(stored(tmp_path / "out"), {n: t.bfloat16() for n, t in stored(directory).items()})
    before, after = (json.loads((d / "config.json").read_text()) for d in (directory, tmp_path / "out"))
    assert before.pop("dtype") == "float32"
    assert after.pop("dtype") == "bfloat16"
    assert before == after


def test_an_existing_directory_is_left_alone(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "source")
    before = stored(directory)
    with pytest.raises(ModelError, match="exists already"):
        write_hf_directory(directory, [("x", torch.ones(1))], source=directory)
    assert_bit_equal(stored(directory), before)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond a few kilobytes: writing fails as on a full disk. The test run's own log would, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_no_half_export(tmp_path: Path) -> None:
    """Half a directory would pass for a model until someone loads it."""
    directory = make_model(tmp_path / "source")
    model = build_model(directory, precision="bf16")
    with full_disk(), pytest.raises(ModelError, match="could not be written"):
        write_hf_directory(tmp_path / "out", named_hf_tensors(model), source=directory)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_failing_source_of_tensors_leaves_no_half_export(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "source")

    def fail() -> Iterator[tuple[str, Tensor]]:
        yield "model.norm.weight", torch.ones(3)
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        write_hf_directory(tmp_path / "out", fail(), source=directory)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
