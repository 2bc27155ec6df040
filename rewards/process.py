"""One reward worker process, seen from the pool: start it, send it calls, read answers under a deadline, end it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.guard import SIGNAL_STATUS
from rewards.verdict import decode_verdict
from slime.errors import HookError, RewardError
from slime.types import Verdict

BUILT_IN = {"exact": "rewards.exact:score", "math": "rewards.math:score"}
LENGTH = struct.Struct(">I")
FRAME_S = 10.0
"""A frame that has begun is complete within this."""
GRACE_S = 0.25
"""After a deadline the answer is looked for once more: it may lie there unread because the event loop was held up."""
END_S = 5.0
"""The guard has killed everything within this."""
TAIL_BYTES = 2000
"""How much of a dead worker's last output its error repeats."""


class WorkerDied(Exception):  # noqa: N818  an outcome of a call
    """The worker ended during a call; the message says how, with its last output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one call came to."""

    verdict: Verdict
    seconds: float
    rss_bytes: int = 0
    """Resident memory of the worker afterwards."""
    worker_is_lost: bool = False
    """The worker hangs or is dead: close it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """How a pool's workers are started."""

    fn: str
    """A built-in's name or a hook's spec."""
    base_dir: Path
    """Folder of the run file; also the workers' working directory."""
    start_timeout_s: float
    memory_limit_bytes: int


class WorkerProcess:
    """A running worker with its function loaded. Made by `start`, ended by `close`."""

    def __init__(self, process: subprocess.Popen[bytes], *, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._process = process
        self._reader = reader
        self._writer = writer
        self._tail = b""
        self._draining: asyncio.Task[None] | None = None
        self.source = ""
        """Hash of the source that was loaded."""
        self.rss_bytes_at_start = 0

    @classmethod
    async def start(cls, spec: WorkerSpec, *, on_output: Callable[[bytes], None]) -> WorkerProcess:
        """Start a worker and wait until its function is loaded.

        Args:
            spec: what it loads.
            on_output: gets all that it prints.

        Raises:
            HookError: the function cannot be used; the worker's own words.
            RewardError: the worker died or took too long while it loaded the function.
        """
        hook = _hook(spec.fn)
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            # Nothing is awaited between here and the try: a cancellation would leave the process behind.
            worker = cls(_popen(spec, hook=hook, channel=theirs), reader=reader, writer=writer)
        worker._draining = asyncio.create_task(worker._drain(on_output), name="reward worker output")
        try:
            await worker._become_ready(spec)
        except BaseException:
            await worker.close()
            raise
        return worker

    def send(self, inputs: Sequence[bytes]) -> None:
        """Hand over a batch of encoded inputs; one `answer` for each follows, in order."""
        body = b"[" + b",".join(inputs) + b"]"
        self._writer.write(LENGTH.pack(len(body)) + body)

    async def answer(self, *, timeout_s: float) -> Answer:
        """Wait for the next call's answer.

        Raises:
            TimeoutError: it took longer than `timeout_s`; the worker must be closed.
            WorkerDied: the worker ended.
        """
        message = await self._receive(timeout_s)
        return Answer(
            verdict=decode_verdict(message["verdict"]), seconds=message["seconds"], rss_bytes=message["rss_bytes"]
        )

    async def close(self) -> None:
        """Kill the worker and everything it started. Also the way to end a call that hangs."""
        self._writer.transport.abort()  # the guard sees the hang-up and kills
        await self._wait_for_end()
        if self._draining:
            await asyncio.wait([self._draining], timeout=END_S)
            self._draining.cancel()

    async def _become_ready(self, spec: WorkerSpec) -> None:
        where = f'reward.fn = "{spec.fn}"'
        try:
            message = await self._receive(spec.start_timeout_s)
        except TimeoutError as cause:
            raise RewardError(
                f"{where} was not loaded within {spec.start_timeout_s:g} s: its file hangs while it is imported.\n"
                f"Move slow work out of the file's top level, or into the function behind functools.cache."
            ) from cause
        except WorkerDied as cause:
            raise RewardError(
                f"{where}: its worker process ended while it loaded the file: {cause}\n"
                f"Run the file with Python alone to see why, or name another function."
            ) from cause
        if "error" in message:
            raise HookError(message["error"])
        self.source, self.rss_bytes_at_start = message["source"], message["rss_bytes"]

    async def _receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            header = await self._header(timeout_s)
            async with asyncio.timeout(FRAME_S):
                body = await self._reader.readexactly(LENGTH.unpack(header)[0])
        except (asyncio.IncompleteReadError, ConnectionError) as cause:
            raise WorkerDied(await self._death()) from cause
        message: dict[str, Any] = json.loads(body)
        return message

    async def _header(self, timeout_s: float) -> bytes:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await self._reader.readexactly(LENGTH.size)
        async with asyncio.timeout(GRACE_S):
            return await self._reader.readexactly(LENGTH.size)

    async def _death(self) -> str:
        await self.close()
        status = self._process.returncode or 0
        signal_number = -status if status < 0 else status - SIGNAL_STATUS
        known = signal_number in set(signal.Signals)
        how = f"killed by {signal.Signals(signal_number).name}" if known else f"it exited with status {status}"
        printed = self._tail.decode(errors="replace").strip()
        return f"{how}; its last output:\n{printed}" if printed else f"{how}, without output"

    async def _wait_for_end(self) -> None:
        if self._process.returncode is not None:
            return
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        pid_fd = os.pidfd_open(self._process.pid)
        loop.add_reader(pid_fd, ended.set)
        try:
            async with asyncio.timeout(END_S):
                await ended.wait()
        except TimeoutError:  # the guard itself is stuck; the worker dies with it
            self._process.kill()
        finally:
            loop.remove_reader(pid_fd)
            os.close(pid_fd)
        self._process.wait(timeout=END_S)

    async def _drain(self, on_output: Callable[[bytes], None]) -> None:
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_read_pipe(lambda: protocol, self._process.stdout)
        with contextlib.closing(transport):
            while data := await reader.read(1 << 16):
                self._tail = (self._tail + data)[-TAIL_BYTES:]
                on_output(data)


def _hook(fn: str) -> str:
    if ":" in fn or fn.endswith(".py"):
        return fn
    if fn not in BUILT_IN:
        known = " and ".join(f'"{name}"' for name in BUILT_IN)
        raise HookError(
            f'reward.fn = "{fn}" is no built-in reward; these are {known}.\n'
            f'Name one of them, or a function of yours: "./reward.py:score", relative to the run file.'
        )
    return BUILT_IN[fn]


def _popen(spec: WorkerSpec, *, hook: str, channel: socket.socket) -> subprocess.Popen[bytes]:
    arguments = [str(channel.fileno()), hook, str(spec.base_dir.resolve()), str(spec.memory_limit_bytes)]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "rewards.worker", *arguments],  # -P: import nothing from the working directory
        cwd=spec.base_dir,
        # One thread each: the workers share the machine with what trains and generates.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        pass_fds=[channel.fileno()],
        start_new_session=True,  # Ctrl-C in a terminal is for the driver
    )
