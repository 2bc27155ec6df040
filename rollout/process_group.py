"""Ends an engine's process group and removes what SIGKILL makes SGLang leave in shared memory."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def kill_group(group: int) -> None:
    """SIGKILL every process of `group`, the caller last if it belongs to it, and unlink the shared memory they used.

    SIGKILL at once: an engine holds nothing durable, and SGLang's SIGTERM waits for running requests. Files in
    directories, such as staged weights, belong to whoever made the directory and stay.
    """
    members = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _group_of(pid) == group]
    inodes = {inode for pid in members for inode in _mapped_inodes(pid)}
    for pid in members:
        if pid != os.getpid():
            _kill(pid)
    for path in SHARED_MEMORY.iterdir():
        if path.is_file() and path.stat().st_ino in inodes:
            path.unlink(missing_ok=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _group_of(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


def _mapped_inodes(pid: int) -> set[int]:
    # By inode: glibc maps a semaphore under a temporary name and links the lasting one afterwards.
    with contextlib.suppress(OSError):  # it ended just now
        fields = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        return {int(field[4]) for field in fields if len(field) == 6 and field[5].startswith(f"{SHARED_MEMORY}/")}
    return set()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
