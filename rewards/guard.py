"""The guard of a reward worker: sees to it that nothing the worker started outlives it or its pool.

A pool starts a guard, and the guard forks the worker. The guard runs no user code; it waits for the first of

* the pool closing its end of their socket (deliberately, or by dying, ``kill -9`` included), or
* the worker ending,

kills the worker and every descendant, and exits with the worker's status. A thread in the worker could not do this:
a C function that holds the interpreter's lock would hold it up. As a subreaper the guard becomes the parent of orphans,
so that also those that left the worker's process group are found. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SIGNAL_STATUS = 128
"""An exit status of 128 + n says that signal n ended the worker."""


def fork_worker(channel: socket.socket) -> None:
    """Fork, and return in the worker, which leads a process group. The calling process becomes the guard.

    Args:
        channel: socket to the pool, used by the worker and watched by the guard.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    worker = os.fork()
    if worker == 0:
        os.setpgid(0, 0)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    with contextlib.suppress(PermissionError, ProcessLookupError):  # the worker was faster
        os.setpgid(worker, worker)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    status = _wait(channel, worker)
    if status is None:
        os.killpg(worker, signal.SIGKILL)
    _kill_descendants()
    os._exit(status or 0)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _wait(channel: socket.socket, worker: int) -> int | None:
    """The worker's status, or None when the pool has gone first. Reaps orphans meanwhile."""
    ended, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(channel, 0)  # only hang-ups: what is written there is for the worker
    poll.register(ended, select.POLLIN)
    while (status := _reap(worker)) is None:
        if any(fd == channel.fileno() for fd, _ in poll.poll()):
            return None
        os.read(ended, 4096)
    return status


def _reap(worker: int) -> int | None:
    found = None
    with contextlib.suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            if child[0] == worker:
                code = os.waitstatus_to_exitcode(child[1])
                found = code if code >= 0 else SIGNAL_STATUS - code
    return found


def _kill_descendants() -> None:
    while children := _children():
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    own, children = str(os.getpid()), []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # "pid (name) state parent ...", and the name may hold anything
            if stat.read_text(errors="replace").rpartition(")")[2].split()[1] == own:
                children.append(int(stat.parent.name))
    return children
