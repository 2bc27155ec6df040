"""One SGLang server: its process, its life and its weights.

    SGLangEngine ── stdin pipe: arguments, and life ──► rollout.server ──► SGLang's processes (one session, one group)
         │                                                   ▲
         └────────── HTTP: pause, load, resume, offload ─────┘         generation requests come from rollout.client

A plain asyncio class without ray; it runs in whichever process owns the engine, and the server dies with that process.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

from rollout.engine_options import LOAD_FORMAT, server_environment, server_options
from rollout.process_group import kill_group
from slime.config import EngineConfig
from slime.errors import EngineError

HEALTH_INTERVAL_S = 0.2
CLOSE_TIMEOUT_S = 10.0
NUM_LOG_LINES = 25
MEMORY_TAGS = ("weights", "kv_cache")


class SGLangEngine:
    """Implements slime.protocols.RolloutEngine with one SGLang server on this host.

    Args:
        model_path: Hugging Face directory.
        config: the profile's engine table.
        device: ``"cpu"`` or ``"cuda"``; which CUDA devices is the environment's to say.
        threads: CPU threads of each of its processes.
        log_path: file the server's output is appended to.
        token: bearer token every endpoint but the health check wants.
        index: which engine of the run, counting from 0.
    """

    def __init__(
        self, model_path: str, *, config: EngineConfig, device: str, threads: int, log_path: str, token: str, index: int
    ) -> None:
        self._model_path = model_path
        self._config = config
        self._device = device
        self._threads = threads
        self._log_path = Path(log_path)
        self._token = token
        self._index = index
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None
        self._url = ""
        self._scratch = ""
        self._paused = False
        self._update_is_open = False
        self._released: set[str] = set()

    async def start(self) -> str:
        """Launch the server and wait until it is healthy. Returns its base URL.

        Raises:
            ConfigError: an option of ``[profile.engine.sglang]`` does not exist.
            EngineError: the port is taken, or, with the server's last lines, it ended or was not healthy in time.
        """
        with reserve_port(self._config.base_port, index=self._index) as reservation:
            await self._start(port=reservation.getsockname()[1])
        return self._url

    async def _start(self, *, port: int) -> None:
        options = server_options(
            self._model_path, config=self._config, device=self._device, port=port, token=self._token
        )
        self._url = f"http://127.0.0.1:{port}"
        self._launch(options)
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._token}"},
            timeout=aiohttp.ClientTimeout(total=self._config.request_timeout_s),
        )
        try:
            await asyncio.wait_for(self._until_healthy(), self._config.start_timeout_s)
            # SGLang asks this of itself, often before it listens. Unfrozen, each offload collects garbage for 0.4 s.
            await self._post("/freeze_gc")
        except TimeoutError:
            await self.close()
            raise EngineError(
                f"engine {self._index} was not healthy within {self._config.start_timeout_s:g} s. Raise "
                f"profile.engine.start_timeout_s, or see what it waits for:\n{self.last_lines()}"
            ) from None
        except BaseException:
            await self.close()
            raise

    async def pause(self) -> None:
        """Stop stepping; requests in flight give up their KV cache, keep their tokens and wait."""
        await self._post("/pause_generation", mode="retract")
        self._paused = True

    async def resume(self) -> None:
        """Continue after `pause`.

        Raises:
            EngineError: a weight update was begun and did not end: the weights are a mixture and may not answer.
        """
        if self._update_is_open:
            raise EngineError(
                f"engine {self._index} holds part of a weight update and cannot resume. Load the same weights again, "
                "or close the engine and start another"
            )
        await self._post("/continue_generation", torch_empty_cache=self._device != "cpu")
        self._paused = False

    async def offload(self) -> None:
        """Give weights and KV cache back to the device. The engine must be idle or paused."""
        tags = [tag for tag in MEMORY_TAGS if tag not in self._released]
        if tags:
            await self._post("/release_memory_occupation", tags=tags)
            self._released.update(tags)

    async def onload(self, *, what: str) -> None:
        """Take memory back: ``"weights"`` (their values are undefined until the next `load_weights`) or ``"kv_cache"``.

        Raises:
            ValueError: `what` is neither.
        """
        if what not in MEMORY_TAGS:
            raise ValueError(f"onload what={what!r}: expected one of {MEMORY_TAGS}")
        if what in self._released:  # SGLang's scheduler dies when asked to take back what it never released
            await self._post("/resume_memory_occupation", tags=[what])
            self._released.discard(what)

    async def load_weights(self, manifest: str, *, version: int) -> None:
        """Load and verify every tensor of the staged `manifest`, and answer as `version` from then on.

        The prefix cache is dropped, requests in flight are kept. On failure the update stays open, so that `resume`
        refuses; the call may be made again with good weights.

        Raises:
            EngineError: the engine is not paused, or the weights did not load completely.
        """
        if not self._paused:
            raise EngineError(f"engine {self._index}: load_weights needs a paused engine; call pause first")
        if not self._update_is_open:
            await self._post("/begin_weight_update")
            self._update_is_open = True
        payload = base64.b64encode(named_tensor_payload(manifest)).decode()
        await self._post(
            "/update_weights_from_tensor",
            serialized_named_tensors=[payload],
            load_format=LOAD_FORMAT,
            flush_cache=True,
        )
        await self._post("/end_weight_update")
        await self._post("/update_weight_version", new_version=str(version), abort_all_requests=False)
        self._update_is_open = False

    async def health(self) -> dict[str, Any]:
        """What the server says of itself: model path, weight version and SGLang's other facts."""
        facts: dict[str, Any] = json.loads(await self._request("GET", "/model_info"))
        return facts

    async def close(self) -> None:
        """End the server and everything it started. May be called again, and after a start that failed."""
        if self._session is not None:
            await self._session.close()
            self._session = None
        if self._process is None:
            return
        kill_group(self._process.pid)
        try:
            await asyncio.wait_for(self._exited.wait(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            raise EngineError(
                f"engine {self._index} (process {self._process.pid}) survived SIGKILL for {CLOSE_TIMEOUT_S:g} s: it "
                "hangs in the kernel. Look at its device and storage, or restart the machine"
            ) from None
        with self._process:  # reaps it and closes the pipe
            pass
        self._process = None
        shutil.rmtree(self._scratch, ignore_errors=True)

    def last_lines(self) -> str:
        """The end of the server's log, for messages."""
        if not self._log_path.exists():
            return f"({self._log_path} was not written)"
        lines = self._log_path.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:]
        return "\n".join([f"last lines of {self._log_path}:", *(f"  {line}" for line in lines)])

    def _launch(self, options: dict[str, Any]) -> None:
        self._exited.clear()
        self._paused = self._update_is_open = False
        self._released.clear()
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.mkdtemp(prefix="slime-engine-")
        environment = server_environment(
            os.environ, config=self._config, device=self._device, threads=self._threads, scratch=self._scratch
        )
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rollout.server"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._watch_exit(self._process.pid)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already; the health check says so with its last lines
            self._process.stdin.write(json.dumps({"options": options, "scratch": self._scratch}).encode() + b"\n")
            self._process.stdin.flush()

    def _watch_exit(self, pid: int) -> None:
        # A pidfd works in every thread and event loop; asyncio's own child watchers want the main thread's signals.
        loop = asyncio.get_running_loop()
        pidfd = os.pidfd_open(pid)

        def exited() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self._exited.set()

        loop.add_reader(pidfd, exited)

    async def _until_healthy(self) -> None:
        assert self._session is not None
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._exited.wait(), HEALTH_INTERVAL_S)
                raise EngineError(
                    f"engine {self._index} ended while it started. Correct what its last lines name, or compare "
                    f"profile.engine with the shipped profiles:\n{self.last_lines()}"
                )
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with self._session.get(self._url + "/health") as response:
                    if response.status == 200:
                        return

    async def _post(self, path: str, **body: Any) -> None:
        await self._request("POST", path, body=body)

    async def _request(self, method: str, path: str, *, body: dict[str, Any] | None = None) -> str:
        if self._session is None:
            raise EngineError(f"engine {self._index} is not running: {path} needs start first")
        try:
            async with self._session.request(method, self._url + path, json=body) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as cause:
            raise EngineError(
                f"engine {self._index} did not answer {path} ({type(cause).__name__}: {cause}). Start it again, or see "
                f"why it stopped:\n{self.last_lines()}"
            ) from cause
        if response.status != 200:
            raise EngineError(f"engine {self._index} refused {path} with status {response.status}: {text[:2000]}")
        return text


def reserve_port(base_port: int | None, *, index: int) -> socket.socket:
    """Hold ``base_port + index``, or a free port when there is no base, until the returned socket is closed.

    A port that is only found and let go may be an outgoing connection's by the time SGLang binds it, seconds later; it
    then neither serves nor ends. This one is bound and does not listen: nobody is given it, and a server that sets
    SO_REUSEADDR, as SGLang's does, may listen on it beside us.

    Raises:
        EngineError: somebody listens on ``base_port + index``.
    """
    reservation = socket.socket()
    wanted = 0 if base_port is None else base_port + index
    if base_port is not None:  # connections of an earlier run may linger there
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reservation.bind(("127.0.0.1", wanted))
    except OSError as cause:
        reservation.close()
        raise EngineError(
            f"port {wanted} for engine {index} is taken (profile.engine.base_port = {base_port}). Choose another "
            "base_port, or leave it out and free ports are found"
        ) from cause
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return reservation


def named_tensor_payload(manifest: str) -> bytes:
    """The pickle of ``[(manifest, torch.Tensor())]``: how SGLang receives named tensors, here one name and no data.

    Written as opcodes because torch would have to be imported to pickle one empty tensor. ``torch.Tensor`` is among the
    few names SGLang's restricted unpickler allows.
    """
    name = manifest.encode()
    return b"\x80\x02](X" + len(name).to_bytes(4, "little") + name + b"ctorch\nTensor\n)Rta."
