"""Where the workers' own output goes: one bounded log file."""

from __future__ import annotations

import io
from pathlib import Path

MAX_LOG_BYTES = 16 << 20


class OutputLog:
    """Appends what workers print to a file, up to MAX_LOG_BYTES; without a file, drops it."""

    def __init__(self) -> None:
        self._file: io.FileIO | None = None
        self._left_bytes = MAX_LOG_BYTES

    def open(self, path: Path | None) -> None:
        """Append to `path` from now on; its folder is made."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        """Append `data`, or what still fits of it and a last line that says so."""
        if self._file is None or self._left_bytes <= 0:
            return
        self._file.write(data[: self._left_bytes])
        self._left_bytes -= len(data)
        if self._left_bytes <= 0:
            self._file.write(f"\n[slime: {MAX_LOG_BYTES} bytes of output; what follows is dropped]\n".encode())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
