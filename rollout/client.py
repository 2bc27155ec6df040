"""The one way generation requests reach the engines: token ids in, token ids and log-probs out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from slime.errors import EngineError
from slime.types import VersionSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine sampled after one prompt, checked."""

    tokens: list[int]
    """Includes the stop token: the policy sampled it."""
    logprobs: list[float]
    """Natural log-probability of each token under softmax(logits / temperature); under softmax(logits) when greedy."""
    version_spans: list[VersionSpan]
    """Weights that produced each token, as the engine reports; positions count from the first sampled token."""
    finish_reason: str
    """``stop``, ``length`` or ``abort``."""
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""


class GenerationClient:
    """Sends requests to the least loaded engine; the samples of one request go to one engine and share its prefix.

    An asynchronous context manager, bound to one event loop.

    Args:
        urls: base URLs of the engines.
        token: their bearer token.
        timeout_s: deadline of one request.
    """

    def __init__(self, urls: Sequence[str], *, token: str, timeout_s: float) -> None:
        if not urls:
            raise EngineError("there is no engine to generate with; start at least one (profile.engine.num_engines)")
        self._load = dict.fromkeys(urls, 0)
        self._token = token
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._open_session()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. May be called again."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def generate(
        self,
        prompt_tokens: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        num_samples: int = 1,
        seeds: Sequence[int] | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> list[Completion]:
        """Sample `num_samples` completions of one prompt.

        Args:
            prompt_tokens: never empty.
            max_new_tokens: a completion that is longer is cut there.
            temperature: of the sampling distribution; 0 is greedy.
            num_samples: completions.
            seeds: one a sample, honoured by engines in deterministic mode.
            stop_token_ids: end a completion, in addition to those of the model's own configuration.

        Raises:
            EngineError: the engine, which is named, did not answer in time, refused, or answered anything else than
                `num_samples` complete completions.
        """
        if seeds is not None and len(seeds) != num_samples:
            raise ValueError(f"{len(seeds)} seeds for {num_samples} samples")
        body = request_body(
            prompt_tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            num_samples=num_samples,
            seeds=seeds,
            stop_token_ids=stop_token_ids,
        )
        url = min(self._load, key=self._load.__getitem__)
        self._load[url] += num_samples
        try:
            reply = await self._post(url, body)
        finally:
            # Put back at the end of the order, so that equally loaded engines take turns.
            self._load[url] = self._load.pop(url) - num_samples
        replies = reply if isinstance(reply, list) else [reply]
        if len(replies) != num_samples:
            raise EngineError(f"engine {url} answered {len(replies)} completions, {num_samples} were asked for")
        return [parse_completion(reply, url=url, max_new_tokens=max_new_tokens) for reply in replies]

    async def _post(self, url: str, body: bytes) -> Any:
        try:
            async with self._open_session().post(url + "/generate", data=body) as response:
                content = await response.read()
        except TimeoutError as cause:
            raise EngineError(
                f"engine {url} did not answer within {self._timeout_s:g} s. See its log in the run directory, or raise "
                "profile.engine.request_timeout_s"
            ) from cause
        except aiohttp.ClientError as cause:
            raise EngineError(
                f"engine {url} is gone ({type(cause).__name__}: {cause}). Its log in the run directory ends with the "
                "reason; the same command continues from the last commit"
            ) from cause
        if response.status != 200:
            raise EngineError(f"engine {url} refused a request with status {response.status}: {content[:1000]!r}")
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError as cause:
            raise EngineError(f"engine {url} answered something that is not JSON: {content[:200]!r}") from cause

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # the engine queues; a limit here would hide its load
                headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            )
        return self._session


def request_body(
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    num_samples: int,
    seeds: Sequence[int] | None,
    stop_token_ids: Sequence[int],
) -> bytes:
    """One ``/generate`` request for all samples of a prompt.

    Without seeds this is SGLang's parallel sampling, ``n``: the prompt is computed once, before the samples start; mere
    copies of it that arrive together would each be computed. With seeds the samples differ in a parameter, which `n`
    does not allow.
    """
    parameters: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if stop_token_ids:
        parameters["stop_token_ids"] = list(stop_token_ids)
    body: dict[str, Any] = {"return_logprob": True}
    if seeds is None:
        body |= {"input_ids": list(prompt_tokens), "sampling_params": {**parameters, "n": num_samples}}
    else:
        body |= {
            "input_ids": [list(prompt_tokens)] * num_samples,
            "sampling_params": [{**parameters, "sampling_seed": seed} for seed in seeds],
        }
    return orjson.dumps(body)


def parse_completion(reply: Any, *, url: str, max_new_tokens: int) -> Completion:
    """Check one reply of ``/generate`` and take from it what a sample needs.

    Raises:
        EngineError: a part is missing, counts disagree, a log-prob is not finite, or versions do not cover the tokens.
    """
    try:
        meta = reply["meta_info"]
        pairs = meta["output_token_logprobs"]
        completion = Completion(
            tokens=[pair[1] for pair in pairs],
            logprobs=[pair[0] for pair in pairs],
            version_spans=[
                VersionSpan(start=span["start"], end=span["end"], version=int(span["version"]))
                for span in meta["weight_versions"]
            ],
            finish_reason=meta["finish_reason"]["type"],
            cached_tokens=meta["cached_tokens"],
        )
        num_reported = meta["completion_tokens"]
    except (KeyError, IndexError, TypeError, ValueError) as cause:
        raise EngineError(
            f"engine {url} answered without what a sample needs ({type(cause).__name__}: {cause}): {str(reply)[:500]}"
        ) from cause
    ids = reply.get("output_ids")
    problem = _problem(completion, num_reported=num_reported, output_ids=ids, limit=max_new_tokens)
    if problem:
        raise EngineError(f"engine {url} answered {problem}. Its log may say why; the samples are not used")
    return completion


def _problem(completion: Completion, *, num_reported: int, output_ids: Any, limit: int) -> str:
    tokens, spans = completion.tokens, completion.version_spans
    if not len(tokens) == num_reported <= limit:
        return f"{len(tokens)} tokens, said {num_reported}, and was allowed {limit}"
    if output_ids is not None and output_ids != tokens:
        return "token ids that differ from the ids its log-probs belong to"
    if not all(isinstance(logprob, float) and math.isfinite(logprob) for logprob in completion.logprobs):
        return "a log-prob that is not a finite number"
    edges = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != edges[:-1] or edges[-1] != len(tokens):
        return f"weight versions {spans} that do not cover its {len(tokens)} tokens"
    if completion.finish_reason not in ("stop", "length", "abort"):
        return f"the unknown finish reason {completion.finish_reason!r}"
    return ""
