"""The reward worker process, ``python -P -m rewards.worker``: loads one function and calls it for its pool.

    pool → worker   one frame a batch: a JSON list of inputs
    worker → pool   one frame when it is ready, ``{"source": ...}`` or ``{"error": ...}``; then one frame a call

A frame is a 4-byte big-endian length and JSON. Standard output and error are the user's: they go to the pool's log.
Calls come one after the other, so that the pool always knows which one hangs. It is the pool that kills.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import inspect
import io
import json
import os
import resource
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from rewards.guard import fork_worker
from rewards.inputs import ARGUMENTS, RewardInput, decode_input
from rewards.verdict import encode_verdict, to_verdict
from slime.errors import HookError
from slime.hooks import hook_file, hook_source_hash, load_hook, where_raised
from slime.types import Failed, Verdict

LENGTH = struct.Struct(">I")
PAGE_BYTES = resource.getpagesize()


def main(fd: str, spec: str, base_dir: str, memory_limit_bytes: str) -> None:
    """Serve until the pool closes the socket.

    Args:
        fd: number of the inherited socket.
        spec: the reward function, relative to `base_dir`.
        memory_limit_bytes: allocations beyond it raise MemoryError.
    """
    channel = socket.socket(fileno=int(fd))
    fork_worker(channel)
    _confine(int(memory_limit_bytes))
    stream = channel.makefile("rb")
    try:
        hook = load_hook(spec, base_dir=Path(base_dir), what="reward.fn", arguments=ARGUMENTS, by_name=True)
        file = str(hook_file(spec, base_dir=Path(base_dir)))
        source = hook_source_hash(spec, base_dir=Path(base_dir))
    except HookError as error:
        _send(channel, {"error": str(error)})
        return
    _send(channel, {"source": source, "rss_bytes": _rss_bytes()})
    with asyncio.Runner() as runner:
        while (batch := _receive(stream)) is not None:
            for body in batch:
                _answer(channel, hook, decode_input(body), runner, file)


def _answer(
    channel: socket.socket, hook: Callable[..., Any], given: RewardInput, runner: asyncio.Runner, file: str
) -> None:
    pid, began = os.getpid(), time.perf_counter()
    verdict = _call(hook, given, runner, file)
    if os.getpid() != pid:  # the function forked and its child returned too: only one of them may answer
        os._exit(0)
    seconds = time.perf_counter() - began
    _send(channel, {"verdict": encode_verdict(verdict), "seconds": seconds, "rss_bytes": _rss_bytes()})


def _call(hook: Callable[..., Any], given: RewardInput, runner: asyncio.Runner, file: str) -> Verdict:
    try:
        value = hook(**given.values())
        if inspect.isawaitable(value):
            value = runner.run(_result(value))
    except BaseException as error:  # sys.exit too: it ends this call, not the worker
        return Failed(kind="raised", detail=where_raised(error, file=file))
    return to_verdict(value)


async def _result(value: Awaitable[Any]) -> Any:
    return await value


def _confine(memory_limit_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (memory_limit_bytes, memory_limit_bytes))
    with contextlib.suppress(OSError):  # where memory runs out, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    faulthandler.enable()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    channel.sendall(LENGTH.pack(len(body)) + body)


def _receive(stream: io.BufferedIOBase) -> list[dict[str, Any]] | None:
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    body: list[dict[str, Any]] = json.loads(stream.read(LENGTH.unpack(header)[0]))
    return body


if __name__ == "__main__":
    main(*sys.argv[1:])
