"""The index of a prompt file: made when the file is first read, mapped into memory at every later start.

It is kept in ``slime/`` below ``$XDG_CACHE_HOME`` (by default ``~/.cache``), and may be removed at any time. Opening it
costs the same for a thousand rows and for a hundred million; a row is read from the file when its prompt is asked for.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import weakref
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from buffer.prompts.dataset import to_prompt
from buffer.prompts.rows import is_parquet, parse_line, read_at
from buffer.prompts.scan import IN_FILE_ORDER, LENGTH, OFFSET, QUESTION, UID, Scan, UInt64, scan
from slime.errors import DataError
from slime.types import Prompt

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the columns and of how rows are read; an index of another one is made anew."""
_HEADER_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """The state of a prompt file that an index is of."""

    version: int
    num_bytes: int
    mtime_ns: int
    require_label: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    file: _File
    num_prompts: int
    num_duplicates: int
    num_copied_bytes: int
    """Size of the copy as ``.jsonl``, where there is one."""
    fingerprint: str
    fingerprint_in_file_order: str


class PromptIndex:
    """The distinct prompts of one file, by their place in canonical order.

    Attributes:
        columns: [5, num_prompts], as `buffer.prompts.scan` names them.
        num_duplicates: rows left out because an earlier row poses the same problem.
    """

    def __init__(self, path: Path, *, header: _Header, columns: UInt64, rows: Path, kept: Path | None) -> None:
        self.path = path
        self.columns = columns
        self.num_duplicates = header.num_duplicates
        self._header = header
        self._rows = rows
        self._kept = kept

    def __len__(self) -> int:
        return self._header.num_prompts

    @property
    def questions(self) -> UInt64:
        """[num_prompts], ascending: the hash of what each prompt asks, whatever its label."""
        questions: UInt64 = self.columns[QUESTION]
        return questions

    def fingerprint(self, *, in_file_order: bool) -> str:
        """Changes with any uid, and where asked for with the order of rows."""
        return self._header.fingerprint_in_file_order if in_file_order else self._header.fingerprint

    def prompt(self, place: int) -> Prompt:
        """Read the row of a prompt.

        Raises:
            DataError: it is not there any more.
        """
        offset, length = int(self.columns[OFFSET, place]), int(self.columns[LENGTH, place])
        where = f"{self.path}, byte {offset}"
        try:
            line = read_at(self._rows, offset, length)
            prompt = to_prompt(parse_line(line, where=where), where=where, require_label=False)
        except (OSError, DataError, OverflowError, MemoryError) as error:  # the latter from a place that no file has
            raise self._changed(where) from error
        if prompt.uid != f"{self.columns[UID, place]:016x}":
            raise self._changed(where)
        return prompt

    def _changed(self, where: str) -> DataError:
        if self._kept:
            with suppress(OSError):  # whatever is wrong, the next start reads the file as it is then
                self._kept.unlink()
        return DataError(
            f"{where}: the row that was indexed here is gone: the file was changed or removed during the run. Restore "
            "the file and start again to continue, or train on what it is now in another run_dir."
        )


def open_index(path: Path, *, require_label: bool = True) -> PromptIndex:
    """Map the index of a prompt file, or make it.

    Raises:
        DataError: the file is missing or wrong; file, line and column are named.
    """
    copied = is_parquet(path)
    file = _state(path, require_label=require_label)
    kept = _kept(path, require_label=require_label)
    return (kept and _load(path, file, kept=kept, copied=copied)) or _make(path, file, kept=kept, copied=copied)


def _state(path: Path, *, require_label: bool) -> _File:
    stat = path.stat()
    return _File(version=VERSION, num_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, require_label=require_label)


def _kept(path: Path, *, require_label: bool) -> Path | None:
    """Where the index of a file is kept; a changed file's replaces the one before."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    with suppress(RuntimeError):  # no home
        caches = caches.expanduser()
    name = blake2b(f"{path.resolve()}\0{require_label}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return caches / "slime" / f"{name}.index" if caches.is_absolute() else None


def _load(path: Path, file: _File, *, kept: Path, copied: bool) -> PromptIndex | None:
    """The index as it was kept; None where there is none, where it is of another state of the file, or damaged."""
    try:
        header = _read_header(kept)
        rows = kept.with_suffix(".jsonl") if copied else path
        is_whole = (
            header.file == file
            and kept.stat().st_size == _HEADER_BYTES + header.num_prompts * 5 * 8
            and (not copied or rows.stat().st_size == header.num_copied_bytes)
        )
        shape = (5, header.num_prompts)
        columns = np.memmap(kept, dtype="<u8", mode="r", offset=_HEADER_BYTES, shape=shape) if is_whole else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if columns is None:
        return None
    return PromptIndex(path, header=header, columns=np.asarray(columns), rows=rows, kept=kept)


def _read_header(kept: Path) -> _Header:
    with kept.open("rb") as opened:
        values, checksum = json.loads(opened.read(_HEADER_BYTES))
    if checksum != _checksum(values):
        raise ValueError("damaged header")
    return _Header(**{**values, "file": _File(**values["file"])})


def _checksum(values: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())


def _make(path: Path, file: _File, *, kept: Path | None, copied: bool) -> PromptIndex:
    with ExitStack() as scratch:
        copy = _scratch_file(kept) if copied else None
        if copy:
            scratch.callback(copy.unlink, missing_ok=True)
        read = scan(path, require_label=file.require_label, copy=copy)
        if _state(path, require_label=file.require_label) != file:
            raise DataError(f"{path}: the file changed while it was read. Start again once it is written, or copy it.")
        header = _header(read, file=file, copy=copy)
        if _keep(kept, header=header, columns=read.columns, copy=copy):
            assert kept is not None
            if index := _load(path, file, kept=kept, copied=copied):
                return index
        index = PromptIndex(path, header=header, columns=read.columns, rows=copy or path, kept=None)
        weakref.finalize(index, scratch.pop_all().close)
        return index


def _header(read: Scan, *, file: _File, copy: Path | None) -> _Header:
    uids = read.columns[UID]
    return _Header(
        file=file,
        num_prompts=len(uids),
        num_duplicates=read.num_duplicates,
        num_copied_bytes=copy.stat().st_size if copy else 0,
        fingerprint=blake2b(uids.tobytes(), digest_size=8).hexdigest(),
        fingerprint_in_file_order=blake2b(uids[read.columns[IN_FILE_ORDER]].tobytes(), digest_size=8).hexdigest(),
    )


def _keep(kept: Path | None, *, header: _Header, columns: UInt64, copy: Path | None) -> bool:
    """Write an index, whole or not at all; the copy of a ``.parquet`` file's rows is moved beside it."""
    if kept is None:
        logger.warning("there is no home folder to keep indices in. Name one with the variable XDG_CACHE_HOME.")
        return False
    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as scratch:
            handle, name = tempfile.mkstemp(dir=kept.parent)
            scratch.callback(Path(name).unlink, missing_ok=True)
            with open(handle, "wb") as unfinished:
                values = asdict(header)
                unfinished.write(json.dumps([values, _checksum(values)]).encode().ljust(_HEADER_BYTES))
                unfinished.write(columns.data)
            if copy:
                copy.replace(kept.with_suffix(".jsonl"))
            Path(name).replace(kept)
    except OSError as error:
        logger.warning(
            "%s: %s: the index is made anew at each start. Make room there or make it writable, or name another folder "
            "with the variable XDG_CACHE_HOME.",
            kept.parent,
            error.strerror,
        )
        return False
    return True


def _scratch_file(kept: Path | None) -> Path:
    """A new file, in the folder of indices if possible, so that it can be moved to its place there."""
    try:
        if kept is not None:
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=kept and kept.parent)
    except OSError:
        handle, name = tempfile.mkstemp()
    os.close(handle)
    return Path(name)
