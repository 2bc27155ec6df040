"""Directories that are either complete or not there.

`new_checkpoint` hands out ``<final>.tmp``; when its block ends, every file is synced and hashed, ``manifest.json`` is
written, and one rename makes the checkpoint exist. Whatever kills the process before that leaves a ``.tmp`` that
`prune_checkpoints` and the next attempt sweep away. What could go wrong afterwards (a lost or flipped byte, a lost
file) is found by `verify_checkpoint`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from slime.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
UNFINISHED = ".tmp"
BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def new_checkpoint(final: Path) -> Iterator[Path]:
    """Give an empty directory to fill; it becomes `final` when the block ends, and goes if the block raises.

    Raises:
        CheckpointError: `final` exists, or the disk is full or otherwise refuses. Nothing is left of the attempt.
    """
    if final.exists():
        raise CheckpointError(
            f"checkpoint {final} exists already: remove it to write it again, or continue from it with the same command"
        )
    unfinished = final.with_name(final.name + UNFINISHED)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        _seal(unfinished, final=final)
    except BaseException as cause:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(cause, OSError):
            raise _refused(cause, final=final) from cause
        raise


def verify_checkpoint(directory: Path) -> None:
    """Read every file and compare it with the manifest.

    Raises:
        CheckpointError: names the first file that is missing, of another size or with other bytes.
    """
    for name, expected in _read_manifest(directory).items():
        path = directory / name
        if not path.is_file():
            raise _torn(directory, f"{name} is missing")
        if path.stat().st_size != expected["num_bytes"]:
            raise _torn(directory, f"{name} has {path.stat().st_size} bytes, expected {expected['num_bytes']}")
        if _checksum(path) != expected["xxh3_64"]:
            raise _torn(directory, f"{name} has other bytes than were written")


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first. Their names sort in the order of their steps."""
    return sorted(manifest.parent for manifest in root.glob(f"*/{MANIFEST}") if manifest.parent.suffix != UNFINISHED)


def prune_checkpoints(root: Path, *, keep: int) -> list[Path]:
    """Remove all but the newest `keep` checkpoints, and attempts that were never finished. Returns what was removed."""
    old = list_checkpoints(root)[:-keep] if keep else list_checkpoints(root)
    for directory in old:
        # First out of the list by one rename: a removal that is interrupted leaves no checkpoint with files missing.
        directory.rename(directory.with_name(directory.name + UNFINISHED))
    for unfinished in root.glob(f"*{UNFINISHED}"):
        shutil.rmtree(unfinished)
    return old


def _seal(unfinished: Path, *, final: Path) -> None:
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    entries = {
        str(path.relative_to(unfinished)): {"num_bytes": path.stat().st_size, "xxh3_64": _checksum(path)}
        for path in files
    }
    manifest = unfinished / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1))
    directories = [path for path in unfinished.rglob("*") if path.is_dir()]
    for path in [*files, manifest, *directories, unfinished]:
        _sync(path)
    unfinished.rename(final)
    _sync(final.parent)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        body = json.loads(path.read_text())
        if body["format"] != FORMAT:
            raise _torn(directory, f"{MANIFEST} has format {body['format']}, expected {FORMAT}")
        return dict(body["files"])
    except OSError as cause:
        raise _torn(directory, f"{MANIFEST} cannot be read ({cause})") from cause
    except (ValueError, KeyError, TypeError) as cause:
        raise _torn(directory, f"{MANIFEST} is not what was written ({cause!r})") from cause


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _torn(directory: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {directory} is torn: {what}. Restore it from a copy, or let the run go back to one before"
    )


def _refused(cause: OSError, *, final: Path) -> CheckpointError:
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"no room for checkpoint {final} ({cause.strerror}); nothing of it was kept, the one before it is whole. "
            "Free space on that disk, or keep fewer with checkpoint.keep, and run the same command again"
        )
    return CheckpointError(
        f"checkpoint {final} could not be written: {cause}; nothing of it was kept. Check that the directory is "
        "writable, or move the run with run_dir, and run the same command again"
    )
