"""Stage weights for engines on the same host: one pass over the tensors, at about the speed of a copy.

The layout is `slime.weights`'. Bytes are written rather than stored through a mapping: on a full /dev/shm a write
raises an error where a store would end the process with SIGBUS. Hashing goes block by block just ahead of the write,
while the block is in the cache. The manifest is written last, so a directory with one is complete; the files are new
ones each time, so an engine that still maps the old ones keeps reading what they held.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import xxhash
from torch import Tensor

from slime.errors import TrainerError
from slime.weights import ALIGNMENT_BYTES, StagedTensor, write_manifest

BLOCK_BYTES = 1 << 18
NamedTensors = Iterable[tuple[str, Tensor]]


def stage(tensors: NamedTensors, *, directory: Path) -> Path:
    """Write every tensor and return the manifest's path. `directory` is made; what it held is replaced.

    Raises:
        TrainerError: the bytes could not be written, for instance because shared memory is full.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(directory)
        for name in ("manifest.json", "weights.bin"):
            (directory / name).unlink(missing_ok=True)
        with open(directory / "weights.bin", "wb", buffering=0) as file:
            staged = [_write(name, tensor, file=file) for name, tensor in tensors]
            num_bytes = file.tell()
        return write_manifest(directory, staged, num_bytes)
    except OSError as cause:
        raise TrainerError(
            f"staging weights in {directory} failed: {cause}. Give shared memory more room (in a container: "
            "--shm-size) or remove what fills it (ls -la /dev/shm)"
        ) from cause


def _require_own(directory: Path) -> None:
    """Others can write to /dev/shm too, and the name can be guessed."""
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise TrainerError(
            f"{directory} is not a directory that only this user can open: someone else may have made it. "
            "Remove it, or choose another run_dir, which gives it another name"
        )


def time_stage(tensors: Callable[[], NamedTensors], *, directory: Path) -> tuple[float, float]:
    """Seconds of one `stage`, and of one plain write of the same bytes into the same directory right after it."""
    started_s = time.perf_counter()
    manifest = stage(tensors(), directory=directory)
    staged_s = time.perf_counter() - started_s
    plain = np.fromfile(manifest.with_name("weights.bin"), dtype=np.uint8).data
    started_s = time.perf_counter()
    (directory / "copy.bin").write_bytes(plain)
    copied_s = time.perf_counter() - started_s
    (directory / "copy.bin").unlink()
    return staged_s, copied_s


def _write(name: str, tensor: Tensor, *, file: BinaryIO) -> StagedTensor:
    offset = file.seek(-file.tell() % ALIGNMENT_BYTES, 1)
    digest = xxhash.xxh3_64()
    for block in _blocks(tensor):
        digest.update(block)
        _write_all(file, block)
    return StagedTensor(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        offset=offset,
        num_bytes=file.tell() - offset,
        checksum=digest.hexdigest(),
    )


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data
    return (flat[start : start + BLOCK_BYTES] for start in range(0, len(flat), BLOCK_BYTES))


def _write_all(file: BinaryIO, block: memoryview) -> None:
    while block:
        block = block[file.write(block) :]
