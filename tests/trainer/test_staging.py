"""Staged weights: every byte, and what happens when there is no room."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from slime.errors import TrainerError
from slime.weights import ALIGNMENT_BYTES, read_manifest
from trainer.staging import stage, time_stage


def tensors() -> list[tuple[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    big = torch.randn(700, 513, generator=g)
    return [
        ("bf16", big.bfloat16()),
        ("odd", torch.arange(3, dtype=torch.bfloat16)),
        ("fp32", big),
        ("transposed", big.t()),
        ("scalar", torch.tensor(1.5)),
        ("empty", torch.zeros(0, 4)),
        ("parameter", torch.nn.Parameter(torch.tensor([float("nan"), -0.0, float("inf")]))),
    ]


def test_staged_tensors_are_read_back_bit_for_bit(tmp_path: Path) -> None:
    """Pins a dtype converted on the way, a stride ignored, an offset off by one tensor."""
    manifest = read_manifest(stage(iter(tensors()), directory=tmp_path / "staged"))
    data = np.fromfile(manifest.file, dtype=np.uint8)
    assert manifest.num_bytes == len(data)
    for entry, (name, tensor) in zip(manifest.tensors, tensors(), strict=True):
        raw = data[entry.offset : entry.offset + entry.num_bytes]
        restored = torch.frombuffer(bytearray(raw.tobytes()) or bytearray(4), dtype=getattr(torch, entry.dtype))
        assert (entry.name, entry.dtype, entry.shape) == (name, str(tensor.dtype)[6:], tuple(tensor.shape))
        assert entry.offset % ALIGNMENT_BYTES == 0
        assert entry.checksum == xxhash.xxh3_64(raw).hexdigest()
        got = restored[: tensor.numel()].reshape(tensor.shape)
        assert got.view(-1).view(torch.uint8).equal(tensor.detach().contiguous().view(-1).view(torch.uint8))


def test_staging_again_leaves_a_reader_of_the_old_weights_undisturbed(tmp_path: Path) -> None:
    """Pins an engine that maps the old file and reads new bytes, or dies of SIGBUS, in the middle of a load."""
    old = read_manifest(stage([("w", torch.zeros(5000))], directory=tmp_path))
    mapped = np.memmap(old.file, dtype=np.uint8, mode="r")
    stage([("w", torch.ones(10))], directory=tmp_path)
    assert not mapped.any()


def test_a_failed_stage_leaves_no_manifest_and_says_what_to_do(tmp_path: Path) -> None:
    """Pins engines that load the old manifest with half of the new bytes. A file size limit stands for a full disk."""
    stage([("w", torch.zeros(10))], directory=tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(TrainerError, match=r"File too large.* --shm-size"):
            stage([("w", torch.ones(10_000))], directory=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "manifest.json").exists()


def test_timing_returns_both_times_and_leaves_only_the_staged_files(tmp_path: Path) -> None:
    """Pins a benchmark that compares with nothing."""
    stage_s, copy_s = time_stage(lambda: iter(tensors()), directory=tmp_path)
    assert stage_s > 0
    assert copy_s > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "weights.bin"]
