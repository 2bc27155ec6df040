"""Several groups in one body: how `push_batch`, `put_batch` and `take` send them.

    "slf1"                      4 bytes
    length of the index         4 bytes, little-endian
    index                       UTF-8 JSON: one object a group, with its ``num_bytes`` among others
    groups                      one after the other, each as `buffer.payload` has it

Everything is little-endian and nothing follows. Bytes may come from anywhere: `unpack` checks the frame, and who reads
a group checks the group.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NoReturn, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from slime.errors import DataError

MAGIC = b"slf1"
MEDIA_TYPE = "application/x-slime-groups"
MAX_GROUPS = 4096
_PREFIX = struct.Struct("<4sI")

Entry = TypeVar("Entry", bound=BaseModel)


def pack(groups: Iterable[tuple[BaseModel, bytes]]) -> bytes:
    """One body of ``(entry, group)`` pairs; ``num_bytes`` is added to every entry."""
    groups = list(groups)
    index = to_json([{**entry.model_dump(), "num_bytes": len(group)} for entry, group in groups])
    return b"".join((_PREFIX.pack(MAGIC, len(index)), index, *(group for _, group in groups)))


def unpack(body: bytes, entries: TypeAdapter[list[Entry]]) -> list[tuple[Entry, bytes]]:
    """The pairs of a body.

    Args:
        entries: what an entry has besides ``num_bytes``.

    Raises:
        DataError: it is no such body; names what is wrong.
    """
    index, offset = _index(body)
    if len(index) > MAX_GROUPS:
        _refuse(f"{len(index)} groups", right=f"at most {MAX_GROUPS}")
    sizes = [_size(entry) for entry in index]
    if len(body) != offset + sum(sizes):
        _refuse(f"{len(body)} bytes", right=f"{offset + sum(sizes)}, as the index says")
    try:
        checked = entries.validate_python(index)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        _refuse(f"an index with {'.'.join(map(str, first['loc']))}: {first['msg']}", right="one as OpenAPI has it")
    groups = []
    for entry, size in zip(checked, sizes, strict=True):
        groups.append((entry, body[offset : offset + size]))
        offset += size
    return groups


def _index(body: bytes) -> tuple[list[object], int]:
    if len(body) < _PREFIX.size or body[:4] != MAGIC:
        _refuse(f"{body[:8]!r}", right=f"bytes that begin with {MAGIC!r}")
    _, index_bytes = _PREFIX.unpack_from(body)
    offset = _PREFIX.size + index_bytes
    try:
        index = from_json(body[_PREFIX.size : offset], allow_inf_nan=False)
    except ValueError as error:
        _refuse(f"an index that is not JSON ({error})", right="UTF-8 JSON of the stated length")
    if not isinstance(index, list) or offset > len(body):
        _refuse("an index that is no list", right="a list with one object a group")
    return index, offset


def _size(entry: object) -> int:
    """Takes ``num_bytes`` out of an entry."""
    size = entry.pop("num_bytes", None) if isinstance(entry, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        _refuse(f"a group of {size!r} bytes", right="num_bytes, a number from 0 on")
    return size


def _refuse(got: str, *, right: str) -> NoReturn:
    raise DataError(
        f"a body of groups: got {got}; right would be {right}. Pack it with buffer.service.frames, or push JSON."
    )
