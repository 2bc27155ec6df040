"""A served buffer for tests: a real server in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.service.app import ServedRun, create_app
from buffer.service.serve import serving

RUN = "run-1"
TOKEN = "0123456789abcdef"
OpenRun = Callable[[Ledger], LocalBuffer]


@contextmanager
def served(
    run_dir: Path, *, open_buffer: OpenRun, port: int = 0, max_wait_s: float = 60.0, **options: Any
) -> Iterator[str]:
    """Serve the run of a directory; yields the service's URL.

    Args:
        options: of `ServedRun`.
    """
    url: Future[str] = Future()
    stop: Future[Callable[[], None]] = Future()

    async def serve() -> None:
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.set_result(lambda: loop.call_soon_threadsafe(asked.set))
        with Ledger(run_dir) as ledger:
            run = ServedRun(buffer=open_buffer(ledger), ledger=ledger, **options)
            app = create_app({RUN: run}, token=TOKEN, max_wait_s=max_wait_s)
            async with serving(app, port=port) as address:
                url.set_result(address)
                await asked.wait()

    def run_loop() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if not url.done():
                url.set_exception(error)
            raise

    thread = threading.Thread(target=run_loop, name="service under test")
    thread.start()
    try:
        yield url.result(timeout=30)
    finally:
        stop.result(timeout=30)()
        thread.join(timeout=30)
        assert not thread.is_alive()
