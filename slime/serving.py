"""The buffer of a run for programs elsewhere: beside the run that trains, or as a process of its own, without one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path

import click

from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.lock import RunLock
from buffer.prompts.split import load_split
from buffer.service.app import ServedRun, create_app
from buffer.service.serve import read_or_make_token, serve_until_stopped, serving
from rollout.tokenizer import Tokenizer
from slime.buffering import open_buffer, prompt_order
from slime.config import RunConfig
from slime.errors import DataError, boundary
from slime.preflight import check_model, save_config
from slime.types import Message

TOKEN_FILE = "buffer.token"
"""In the run directory, unless told otherwise."""
URL_FILE = "buffer.url"
"""In the run directory of a run that trains."""
BESIDE_LEASE_S = 120.0
"""A run that trains may have to wait for a lease whose holder is gone; one that works on it renews it."""
LOCK_TIMEOUT_S = 2.0
"""While the ledger waits, the service answers nobody; its clients can wait better."""


def serve_run(
    config: RunConfig, *, base_dir: Path, host: str = "127.0.0.1", port: int = 0, token_file: Path | None = None
) -> None:
    """Serve the buffer of a run until SIGINT or SIGTERM. Started again, it goes on: leases, consumer and token stay.

    Args:
        base_dir: the run file's folder.
        port: 0 takes a free one.
        token_file: where clients read the token; made when there is none.

    Raises:
        SlimeError: the run is held by another process, or something about it, the address or the token is wrong.
    """
    check_model(config.model.path, base_dir=base_dir)
    order = prompt_order(config, load_split(config.data, num_eval=0))
    token_file = token_file or config.run_dir / TOKEN_FILE
    name = config.run_dir.resolve().name
    with RunLock(config.run_dir), Ledger(config.run_dir, lock_timeout_s=LOCK_TIMEOUT_S) as ledger:
        save_config(config)
        token = read_or_make_token(token_file)

        async def serve() -> None:
            buffer = open_buffer(config, ledger, order, recover=False)
            served = ServedRun(buffer=buffer, ledger=ledger, render=Renderer(str(config.model.path)))
            app = create_app({name: served}, token=token)
            await serve_until_stopped(app, host=host, port=port, ready=ready)

        def ready(url: str) -> None:
            click.echo(f"serving {config.run_dir} at {url}/runs/{name}\nits token is in {token_file}")

        asyncio.run(serve())


@asynccontextmanager
async def serve_beside(config: RunConfig, buffer: LocalBuffer, ledger: Ledger) -> AsyncIterator[str]:
    """Take rollouts from other programs while a run trains, where its profile names a port. Yields the URL, or "".

    As long as it is served, the file ``buffer.url`` in the run directory says where; ``buffer.token`` has the token.

    Raises:
        ConfigError: something about the port or the token is wrong.
    """
    if config.profile.buffer_port is None:
        yield ""
        return
    run_dir = config.run_dir.resolve()
    render = Renderer(str(config.model.path))
    served = ServedRun(buffer=buffer, ledger=ledger, lease_s=BESIDE_LEASE_S, render=render, takes_consumers=False)
    app = create_app({run_dir.name: served}, token=read_or_make_token(run_dir / TOKEN_FILE))
    async with serving(app, port=config.profile.buffer_port) as address:
        url = f"{address}/runs/{run_dir.name}"
        (run_dir / URL_FILE).write_text(url + "\n")
        try:
            yield url
        finally:
            (run_dir / URL_FILE).unlink(missing_ok=True)


class Renderer:
    """Conversations as tokens, by a model's chat template; loaded with the first one. See `buffer.service.pushed`."""

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._model_path)

    def __call__(self, prompt: Sequence[Message], answers: Sequence[Message]) -> Iterator[tuple[Sequence[int], bool]]:
        """The conversation's tokens as segments; sampled are those of the assistant's answers, up to their end token.

        Raises:
            DataError: the template cannot render the messages, or writes earlier ones anew as later ones come.
        """
        rendered: list[int] = []
        messages = list(prompt)
        for message in answers:
            sampled = message["role"] == "assistant"
            if sampled:
                opening = self._tokens(messages, open_answer=True)
                yield _added(rendered, opening), False
                rendered = opening
            messages.append(message)
            whole = self._tokens(messages, open_answer=False)
            segment = _added(rendered, whole)
            end = self._answer_end(segment) if sampled else 0
            yield segment[:end], True
            yield segment[end:], False
            rendered = whole

    def _tokens(self, messages: Sequence[Message], *, open_answer: bool) -> list[int]:
        with boundary(DataError, "the model's chat template"):
            return self._tokenizer.encode_messages(messages, open_answer=open_answer)

    def _answer_end(self, answer: Sequence[int]) -> int:
        """Templates add a line break after the token that ends an answer, which the policy never samples."""
        ends = [i + 1 for i, token in enumerate(answer) if token in self._tokenizer.eos_token_ids]
        return ends[-1] if ends else len(answer)


def _added(before: Sequence[int], after: Sequence[int]) -> Sequence[int]:
    if after[: len(before)] != before:
        raise DataError(
            "the model's chat template renders earlier messages anew when later ones come, so their tokens are not "
            "those that were sampled. Push one turn a group, or push tokens."
        )
    return after[len(before) :]
