"""Staged weights: how a trainer hands a full set of tensors to engines on the same host.

A staging directory (under /dev/shm, so that it is memory) holds ``weights.bin``, the raw little-endian bytes of every
tensor one after the other, and ``manifest.json``, which names them. Raw bytes, because both sides map them without a
copy and neither has to unpickle anything.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

ALIGNMENT_BYTES = 64
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedTensor:
    """One tensor inside ``weights.bin``."""

    name: str
    """Its Hugging Face name."""
    dtype: str
    """torch's name without the prefix: ``bfloat16``, ``float32``."""
    shape: tuple[int, ...]
    offset: int
    """First byte; a multiple of ALIGNMENT_BYTES."""
    num_bytes: int
    checksum: str
    """xxh3_64 of its bytes, 16 hex digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a staging directory holds."""

    file: Path
    """weights.bin"""
    num_bytes: int
    tensors: tuple[StagedTensor, ...]


def write_manifest(directory: Path, tensors: list[StagedTensor], num_bytes: int) -> Path:
    """Write ``manifest.json`` beside ``weights.bin`` and return its path."""
    path = directory / "manifest.json"
    body = {"format": FORMAT, "num_bytes": num_bytes, "tensors": [asdict(tensor) for tensor in tensors]}
    path.write_text(json.dumps(body))
    return path


def read_manifest(path: Path) -> Manifest:
    """Read ``manifest.json``.

    Raises:
        ValueError: it is of another format.
    """
    body = json.loads(path.read_text())
    if body["format"] != FORMAT:
        raise ValueError(f"{path}: format {body['format']}, expected {FORMAT}")
    tensors = tuple(StagedTensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in body["tensors"])
    return Manifest(file=path.parent / "weights.bin", num_bytes=body["num_bytes"], tensors=tensors)
