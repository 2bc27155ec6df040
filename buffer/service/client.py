"""`HttpBuffer`: the buffer of a served run, for rollout workers and trainers in other processes.

Every request is sent again until it is answered or its time is up, which is safe: the service knows each one by a name,
an attempt or a step.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_json

from buffer import payload
from buffer.intake import Attempt, Result
from buffer.service import bodies, frames
from buffer.service.refusals import as_error
from slime.errors import DataError, NoAnswer, SlimeError
from slime.types import Group, Lease

POLL_S = 30.0
"""Of one long poll; short enough for proxies between."""
Answer = TypeVar("Answer", bound=BaseModel)
_TAKEN = TypeAdapter(list[bodies.TakenEntry])


class HttpBuffer:
    """`slime.protocols.Buffer` of a run that is served at `url`.

    Args:
        url: of the service, or of the run as `slime buffer serve` and the file ``buffer.url`` tell it.
        patience_s: how long a request is sent again while the service cannot be reached, is out of storage or full.
        stall_timeout_s: `take` gives up when nothing has moved in the buffer for so long.
    """

    def __init__(
        self, url: str, *, run: str, token: str, patience_s: float = 60.0, stall_timeout_s: float = 1800.0
    ) -> None:
        self._url = f"{url.strip().rstrip('/').removesuffix(f'/runs/{run}')}/runs/{run}"
        self._http = httpx.AsyncClient(
            base_url=f"{self._url}/",
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(30.0, connect=5.0, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # a proxy of the machine is not meant for the run's own service
        )
        self._patience_s = patience_s
        self._stall_timeout_s = stall_timeout_s
        self._consumer: int | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def admit(self, *, request: str | None = None) -> Lease:
        """Wait until the staleness bound allows one more group, and lease the next prompt instance.

        Args:
            request: a name for this request; sent again under the same name it gets the same lease.
        """
        body = bodies.AdmitBody(request=request or uuid.uuid4().hex, wait_s=POLL_S)
        while (answer := await self._post("admit", body, wait_s=POLL_S)).status_code == 204:
            pass
        lease = _read(answer, bodies.LeaseBody)
        partial = await self._partial(lease) if lease.has_partial else None
        return Lease(
            ordinal=lease.ordinal,
            epoch=lease.epoch,
            attempt=lease.attempt,
            prompt=bodies.leased_prompt(lease),
            partial=partial,
        )

    async def _partial(self, lease: bodies.LeaseBody) -> Group:
        answer = await self._send("GET", "partial", params=_query(lease))
        return payload.decode(answer.content, ordinal=lease.ordinal, epoch=lease.epoch, attempt=lease.attempt)

    async def generated(self, lease: Attempt) -> bool:
        """All samples are there and go to be graded."""
        return _read(await self._post("generated", _attempt(lease)), bodies.RecordedBody).recorded

    async def put(self, lease: Lease, group: Group, *, keep: bool, reason: str = "") -> bool:
        """Hand in a graded group, to be trained if `keep`, else dropped on record for `reason`.

        Returns:
            False when it was discarded: of an older attempt, or handed in before. So do the others.

        Raises:
            LedgerError: the group is not of this lease, or holds tokens of weights that were not published yet.
        """
        drop = "" if keep else reason or "filtered"
        query = _query(lease) | ({"drop": drop} if drop else {})
        answer = await self._send("POST", "put", params=query, content=payload.encode(group))
        return _read(answer, bodies.RecordedBody).recorded

    async def put_batch(self, results: Sequence[Result]) -> list[bool | SlimeError]:
        """`put`, of many groups as bytes in one transaction. One answer each; see `LocalBuffer.put_payloads`."""
        entries = [
            (bodies.PutEntry(ordinal=r.ordinal, attempt=r.attempt, drop=r.drop or None), r.payload) for r in results
        ]
        answers = _read(await self._send("POST", "put_batch", content=frames.pack(entries)), bodies.AnswersBody)
        return [as_error(answer.error) if answer.error else bool(answer.recorded) for answer in answers.answers]

    async def push(self, body: bodies.PushBody) -> int:
        """Hand in a group that nobody was leased, as tokens or messages. Returns the ordinal it got.

        Raises:
            BufferFull: there was no room for it all the time.
        """
        return _read(await self._post("push", body, wait_s=body.wait_s), bodies.PushedBody).ordinal

    async def push_batch(self, groups: Sequence[tuple[str, bytes]]) -> list[int | SlimeError]:
        """`push`, of ``(request, group as bytes)`` each, in one transaction. One answer each: its ordinal, or why not.

        A group that is refused as `BufferFull` may be pushed again later.
        """
        entries = [(bodies.PushEntry(request=request), group) for request, group in groups]
        answers = _read(await self._send("POST", "push_batch", content=frames.pack(entries)), bodies.AnswersBody)
        return [as_error(answer.error) if answer.error else int(answer.ordinal or 0) for answer in answers.answers]

    async def drop(self, lease: Attempt, *, reason: str) -> bool:
        """The instance yields nothing: record why. Its place is given to another prompt."""
        body = bodies.DropBody(ordinal=lease.ordinal, attempt=lease.attempt, reason=reason)
        return _read(await self._post("drop", body), bodies.RecordedBody).recorded

    async def requeue(self, lease: Attempt, *, reason: str, partial: Group | None = None) -> bool:
        """This attempt failed for no fault of the prompt: issue the instance again, beginning with `partial`."""
        content = b"" if partial is None else payload.encode(partial)
        answer = await self._send("POST", "requeue", params=_query(lease) | {"reason": reason}, content=content)
        return _read(answer, bodies.RecordedBody).recorded

    async def renew(self, leases: Sequence[Attempt]) -> list[bool]:
        """Keep leases; False for one that is over."""
        body = bodies.RenewBody(leases=[_attempt(lease) for lease in leases])
        return _read(await self._post("renew", body), bodies.RenewedBody).renewed

    async def consume(self) -> bodies.ConsumerBody:
        """Become the consumer, in place of whoever was; the answer has the commit to continue from.

        The first `take`, `published`, `commit` or `release` does it too.
        """
        consumer = _read(await self._send("PUT", "consumer"), bodies.ConsumerBody)
        self._consumer = consumer.consumer
        return consumer

    async def take(self, num_groups: int, *, step: int) -> list[Group]:
        """Wait for `num_groups` groups and pack them into `step`, in order of issue.

        Raises:
            Fenced: another consumer has taken over.
            SlimeError: nothing has moved for `stall_timeout_s`; the message says what is waited for.
        """
        body = bodies.TakeBody(consumer=await self._incarnation(), step=step, num_groups=num_groups, wait_s=POLL_S)
        since = asyncio.get_running_loop().time()
        while (answer := await self._post("take", body, wait_s=POLL_S)).status_code == 204:
            await self._check_moves(since)
        return [
            payload.decode(group, ordinal=entry.ordinal, epoch=entry.epoch, attempt=entry.attempt)
            for entry, group in frames.unpack(answer.content, _TAKEN)
        ]

    async def release(self) -> int:
        """Give back what is taken and not committed. Returns how many groups."""
        body = bodies.ConsumerWord(consumer=await self._incarnation())
        return _read(await self._post("release", body), bodies.ReleasedBody).num_released

    async def published(self, version: int) -> None:
        """Engines now answer as `version`: admission may go on."""
        await self._post("published", bodies.PublishedBody(consumer=await self._incarnation(), version=version))

    async def commit(self, step: int, *, checkpoint: str, state: dict[str, Any]) -> None:
        """One atomic, durable transaction: everything packed up to `step` is committed and `checkpoint` is current."""
        consumer = await self._incarnation()
        body = bodies.CommitWord(consumer=consumer, step=step, checkpoint=checkpoint, state=state)
        await self._post("commit", body)

    async def stats(self) -> bodies.Stats:
        """Counts, and who waits for what."""
        return _read(await self._send("GET", "stats"), bodies.Stats)

    async def instances(self, prompt_uid: str) -> list[bodies.InstanceBody]:
        """Where every instance of a prompt stands."""
        return _read(await self._send("GET", f"instances/{prompt_uid}"), bodies.InstancesBody).instances

    async def _incarnation(self) -> int:
        return self._consumer or (await self.consume()).consumer

    async def _check_moves(self, since: float) -> None:
        waited_s = asyncio.get_running_loop().time() - since
        if waited_s > self._stall_timeout_s and (stats := await self.stats()).idle_s > self._stall_timeout_s:
            raise SlimeError(
                f"the run stands still: {stats.summary}. Look at those who roll out, or allow more time with "
                "stall_timeout_s if one rollout may take so long."
            )

    async def _post(self, path: str, body: BaseModel, *, wait_s: float = 0.0) -> httpx.Response:
        # NaN is sent as such, to be refused: as null it would be taken for a value.
        content = to_json(body, inf_nan_mode="constants")
        return await self._send("POST", path, content=content, media_type="application/json", wait_s=wait_s)

    async def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        content: bytes | None = None,
        media_type: str = "application/octet-stream",
        wait_s: float = 0.0,
    ) -> httpx.Response:
        """Send until answered.

        Raises:
            SlimeError: what the service refused with; after `patience_s` also when there is no room or no storage.
            NoAnswer: it could not be reached, or what answered is no buffer.
        """
        loop = asyncio.get_running_loop()
        deadline, delay_s = loop.time() + self._patience_s + wait_s, 0.02
        request = self._http.build_request(
            method,
            path,
            params=params,
            content=content,
            headers={"Content-Type": media_type} if content else {},
            timeout=httpx.Timeout(30.0 + wait_s, connect=5.0, pool=None),
        )
        while True:
            try:
                answer = await self._http.send(request)
            except httpx.TransportError as error:
                failure: SlimeError = self._no_answer(f"{type(error).__name__}: {error}".rstrip(": "))
                asked_s = 0.0
            else:
                if answer.status_code < 400:
                    return answer
                failure = self._error(answer)
                if answer.status_code not in (429, 503):
                    raise failure
                asked_s = _retry_after_s(answer)
            pause_s = max(asked_s, delay_s) * random.uniform(1.0, 1.5)
            if loop.time() + pause_s > deadline:
                raise failure
            await asyncio.sleep(pause_s)
            delay_s = min(2 * delay_s, 2.0)

    def _error(self, answer: httpx.Response) -> SlimeError:
        try:
            return as_error(bodies.ErrorBody.model_validate_json(answer.content))
        except ValidationError:
            return self._no_answer(f"HTTP {answer.status_code} {answer.text[:200]!r}")

    def _no_answer(self, got: str) -> NoAnswer:
        return NoAnswer(
            f"{self._url}: the buffer did not answer ({got}). See that `slime buffer serve` runs and that its URL is "
            "right, or allow more time with patience_s."
        )


def _read(answer: httpx.Response, body: type[Answer]) -> Answer:
    try:
        return body.model_validate_json(answer.content)
    except ValidationError as error:
        raise DataError(
            f"{answer.url}: got an answer that is no {body.__name__} ({error.error_count()} problems). Use the same "
            "version of slime on both sides, or check that the URL is a buffer's."
        ) from None


def _query(lease: Attempt) -> dict[str, str | int]:
    return {"ordinal": lease.ordinal, "attempt": lease.attempt}


def _attempt(lease: Attempt) -> bodies.AttemptBody:
    return bodies.AttemptBody(ordinal=lease.ordinal, attempt=lease.attempt)


def _retry_after_s(answer: httpx.Response) -> float:
    try:
        return min(float(answer.headers.get("Retry-After", "0")), 60.0)
    except ValueError:
        return 1.0
