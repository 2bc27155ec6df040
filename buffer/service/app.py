"""The buffer over HTTP, for rollout workers and trainers in other processes, ours or not.

    clients ── token ─▶ StrictRequest: size, depth, JSON ─▶ bodies, frames ─▶ LocalBuffer ─▶ ledger
                                                                 │
    admit, take ◀── Polls: woken by the buffer, or ended by the deadline, the client's leaving, the service's end
    LeaseTimer ─▶ LocalBuffer.expire

Every request may be sent again: admit and push carry a name of the client's own, a put names its attempt, take and
commit their step. What a request has changed is in the ledger before it is answered. Tokens travel as bytes
(`buffer.payload`, `buffer.service.frames`); only groups from programs that know no slime come as JSON.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Path, Query, Request, Response
from pydantic import TypeAdapter

from buffer import payload
from buffer.intake import Result
from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.service import bodies, frames
from buffer.service.bodies import Ordinal, Reason
from buffer.service.expiry import LeaseTimer
from buffer.service.gate import OPEN_PATHS, StrictRoute, TokenGate
from buffer.service.polls import Polls
from buffer.service.pushed import Render, pushed_group
from buffer.service.refusals import RESPONSES, answer_errors, refusal
from slime.errors import ConfigError, LedgerError, SlimeError

MAX_BODY_BYTES = 64 * 2**20
RUN_NAME = r"^[A-Za-z0-9._-]{1,64}$"

_PUTS = TypeAdapter(list[bodies.PutEntry])
_PUSHES = TypeAdapter(list[bodies.PushEntry])


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRun:
    """A run that is served.

    Args:
        lease_s: a lease that is neither handed in nor renewed for so long is given to others; None for never.
        render: the model's tokenizer, for groups that are pushed as messages.
        takes_consumers: whether the trainer is a client. False where the process that serves the run trains it.
    """

    buffer: LocalBuffer
    ledger: Ledger
    lease_s: float | None = 600.0
    render: Render | None = None
    takes_consumers: bool = True


@dataclass(frozen=True, slots=True)
class _Open:
    """A served run, with its timers and polls."""

    run: ServedRun
    leases: LeaseTimer | None
    polls: Polls

    @property
    def buffer(self) -> LocalBuffer:
        return self.run.buffer


def create_app(
    runs: Mapping[str, ServedRun],
    *,
    token: str,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_wait_s: float = bodies.MAX_WAIT_S,
) -> FastAPI:
    """The service over some runs, by name. Create it in the event loop it serves in; `close_app` ends its waits.

    Args:
        max_wait_s: of any long poll, whatever its client asks for.

    Raises:
        ConfigError: a name that is not a plain file name, or a token that can be guessed.
    """
    for name in runs:
        if not re.fullmatch(RUN_NAME, name) or name in (".", ".."):
            raise ConfigError(f"got the run name {name!r}. Use up to 64 letters, digits, '.', '_' and '-'.")
    if len(token) < 16 or not token.isascii():
        raise ConfigError("got a token of fewer than 16 ASCII characters. Let `slime buffer serve` make one.")
    app = FastAPI(title="slime buffer", version="1", docs_url=None, redoc_url=None)
    app.add_middleware(TokenGate, token=token)
    app.state.max_body_bytes = max_body_bytes
    app.state.polls = Polls(max_wait_s=max_wait_s)
    app.state.runs = {name: _open(run, app.state.polls) for name, run in runs.items()}
    answer_errors(app)
    app.include_router(_router)
    _describe_token(app)

    @app.get("/health", responses={422: RESPONSES[422]})
    async def health() -> bodies.Health:
        return bodies.Health()

    return app


def _describe_token(app: FastAPI) -> None:
    """Say in OpenAPI what `TokenGate` does."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        schema = describe()
        schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            for operation in operations.values() if path not in OPEN_PATHS else ():
                operation["security"] = [{"token": []}]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def close_app(app: FastAPI) -> None:
    """End long polls and timers; leases stay in the ledger."""
    app.state.polls.close()
    for served in app.state.runs.values():
        if served.leases:
            served.leases.close()


def _open(run: ServedRun, polls: Polls) -> _Open:
    if run.lease_s is None:
        return _Open(run, None, polls)
    leases = LeaseTimer(run.buffer, lease_s=run.lease_s)
    if run.takes_consumers:  # else what is out is the process's own
        for lease in run.buffer.leases():
            leases.grant(lease)
    return _Open(run, leases, polls)


RunName = Annotated[str, Path(pattern=RUN_NAME)]


async def _named(request: Request, run: RunName) -> _Open:
    served: _Open | None = request.app.state.runs.get(run)
    if served is None:
        raise HTTPException(404, "no run of this name is served here. See what `slime buffer serve` printed.")
    return served


Served = Annotated[_Open, Depends(_named)]
OrdinalQuery = Annotated[Ordinal, Query()]
AttemptQuery = Annotated[bodies.Count, Query()]
_router = APIRouter(
    prefix="/runs/{run}",
    route_class=StrictRoute,
    responses=RESPONSES,
)


def _takes(media_type: str, *, required: bool = True) -> dict[str, Any]:
    """A body of bytes, for OpenAPI."""
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    return {"requestBody": {"content": content, "required": required}}


_NOTHING: dict[int | str, dict[str, Any]] = {204: {"description": "Nothing came in time: ask again."}}


@_router.post("/push")
async def push(request: Request, run: RunName, body: bodies.PushBody) -> bodies.PushedBody:
    """Hand in a graded group of any prompt that nobody was leased, rolled out elsewhere, as tokens or as messages."""
    served = await _named(request, run)  # not as a dependency: finding out what it depends on takes its time
    if any(sample.messages for sample in body.samples):  # a tokenizer takes its time
        group = await asyncio.to_thread(pushed_group, body, render=served.run.render)
    else:
        group = pushed_group(body, render=None)
    name, encoded, summary = f"push:{body.request}", payload.encode(group), payload.summarise(group)
    ordinal = None
    if body.wait_s:
        in_turn = served.buffer.push_in_turn(name, encoded, summary=summary)
        ordinal = await served.polls.wait(request, in_turn, wait_s=body.wait_s)
    if ordinal is None:
        (ordinal,) = await served.buffer.push([(name, encoded)], summarise=lambda _: summary)
    if isinstance(ordinal, SlimeError):
        raise ordinal
    return bodies.PushedBody(ordinal=ordinal)


@_router.post("/put", openapi_extra=_takes(payload.CONTENT_TYPE))
async def put(
    request: Request,
    served: Served,
    ordinal: OrdinalQuery,
    attempt: AttemptQuery,
    drop: Annotated[Reason | None, Query()] = None,
) -> bodies.RecordedBody:
    """Hand in the graded group of a lease; `drop` is the reason why it is not to be trained."""
    result = Result(ordinal=ordinal, attempt=attempt, payload=await request.body(), drop=drop or "")
    (recorded,) = await served.buffer.put_payloads([result])
    if isinstance(recorded, SlimeError):
        raise recorded
    return bodies.RecordedBody(recorded=recorded)


@_router.post("/admit", responses=_NOTHING)
async def admit(request: Request, served: Served, body: bodies.AdmitBody) -> bodies.LeaseBody:
    """Lease the next prompt instance, as soon as the staleness bound allows one more group."""
    lease = await served.polls.wait(request, served.buffer.admit(request=f"admit:{body.request}"), wait_s=body.wait_s)
    if lease is None:
        return Response(status_code=204)  # type: ignore[return-value]  # FastAPI passes responses through
    if served.leases:
        served.leases.grant(lease)
    return bodies.lease_body(lease, lease_s=served.run.lease_s)


@_router.post("/take", response_class=Response, responses={**_NOTHING, 200: {"content": {frames.MEDIA_TYPE: {}}}})
async def take(request: Request, served: Served, body: bodies.TakeBody) -> Response:
    """The groups of a training step, as soon as there are enough. The same ones when asked again."""
    served.buffer.check_consumer(body.consumer)
    work = served.buffer.take_payloads(body.num_groups, step=body.step, consumer=body.consumer)
    taken = await served.polls.wait(request, work, wait_s=body.wait_s)
    if taken is None:
        return Response(status_code=204)
    groups = [
        (bodies.TakenEntry(ordinal=group.ordinal, attempt=group.attempt, epoch=group.epoch), group.payload)
        for group in taken
    ]
    return Response(frames.pack(groups), media_type=frames.MEDIA_TYPE)


@_router.post("/push_batch", openapi_extra=_takes(frames.MEDIA_TYPE))
async def push_batch(request: Request, served: Served) -> bodies.AnswersBody:
    """`push`, of many groups as bytes, in one transaction. An answer for each."""
    groups = frames.unpack(await request.body(), _PUSHES)
    return bodies.AnswersBody(
        answers=[
            bodies.Answer(error=refusal(ordinal)) if isinstance(ordinal, SlimeError) else bodies.Answer(ordinal=ordinal)
            for ordinal in await served.buffer.push([(f"push:{entry.request}", group) for entry, group in groups])
        ]
    )


@_router.post("/put_batch", openapi_extra=_takes(frames.MEDIA_TYPE))
async def put_batch(request: Request, served: Served) -> bodies.AnswersBody:
    """`put`, of many groups in one transaction. An answer for each."""
    results = [
        Result(ordinal=entry.ordinal, attempt=entry.attempt, payload=group, drop=entry.drop or "")
        for entry, group in frames.unpack(await request.body(), _PUTS)
    ]
    return bodies.AnswersBody(
        answers=[
            bodies.Answer(error=refusal(recorded))
            if isinstance(recorded, SlimeError)
            else bodies.Answer(recorded=recorded)
            for recorded in await served.buffer.put_payloads(results)
        ]
    )


@_router.post("/renew")
async def renew(served: Served, body: bodies.RenewBody) -> bodies.RenewedBody:
    """Keep leases for another `lease_s`."""
    known = served.leases.renew if served.leases else lambda lease: served.buffer.leased(lease) is not None
    return bodies.RenewedBody(renewed=[known(lease) for lease in body.leases])


@_router.post("/generated")
async def generated(served: Served, body: bodies.AttemptBody) -> bodies.RecordedBody:
    """All samples of a lease are there, and go to be graded. Optional."""
    return bodies.RecordedBody(recorded=await served.buffer.generated(body))


@_router.post("/drop")
async def drop(served: Served, body: bodies.DropBody) -> bodies.RecordedBody:
    """The instance yields nothing, for this reason. Its place is given to another prompt."""
    return bodies.RecordedBody(recorded=await served.buffer.drop(body, reason=body.reason))


@_router.post("/requeue", openapi_extra=_takes(payload.CONTENT_TYPE, required=False))
async def requeue(
    request: Request,
    served: Served,
    ordinal: OrdinalQuery,
    attempt: AttemptQuery,
    reason: Annotated[Reason, Query()],
) -> bodies.RecordedBody:
    """Give a lease back for no fault of its prompt. The next attempt begins with the samples in the body, if any."""
    lease = bodies.AttemptBody(ordinal=ordinal, attempt=attempt)
    partial = await request.body() or None
    return bodies.RecordedBody(recorded=await served.buffer.requeue_payload(lease, reason=reason, partial=partial))


@_router.get("/partial", response_class=Response, responses={200: {"content": {payload.CONTENT_TYPE: {}}}})
async def partial(served: Served, ordinal: OrdinalQuery, attempt: AttemptQuery) -> Response:
    """The samples that a lease begins with."""
    lease = served.buffer.leased(bodies.AttemptBody(ordinal=ordinal, attempt=attempt))
    if lease is None or lease.partial is None:
        raise HTTPException(404, f"no lease of instance {ordinal}, attempt {attempt}, with samples is out.")
    return Response(payload.encode(lease.partial), media_type=payload.CONTENT_TYPE)


@_router.post("/published", status_code=204)
async def published(served: Served, body: bodies.PublishedBody) -> None:
    """The engines answer as this version now: admission may go on."""
    served.buffer.check_consumer(body.consumer)
    await served.buffer.published(body.version)


@_router.post("/commit", status_code=204)
async def commit(served: Served, body: bodies.CommitWord) -> None:
    """Everything taken up to this step is trained, and its checkpoint, which is on disk, is the current one."""
    served.buffer.check_consumer(body.consumer)
    await served.buffer.commit(body.step, checkpoint=body.checkpoint, state=body.state)


@_router.post("/release")
async def release(served: Served, body: bodies.ConsumerWord) -> bodies.ReleasedBody:
    """Give back every group that is taken and not committed."""
    served.buffer.check_consumer(body.consumer)
    return bodies.ReleasedBody(num_released=served.buffer.release())


@_router.put("/consumer")
async def consume(served: Served) -> bodies.ConsumerBody:
    """Train this run from its last commit on, in place of whoever did before."""
    if not served.run.takes_consumers:
        raise LedgerError("the process that serves this run trains it. Push to it, or serve the run stand-alone.")
    consumer = served.buffer.consume()
    last = served.run.ledger.last_commit()
    commit = bodies.CommitBody.model_construct(**asdict(last)) if last else None
    return bodies.ConsumerBody.model_construct(consumer=consumer, last_commit=commit)


@_router.get("/stats")
async def stats(served: Served) -> bodies.Stats:
    """Counts, and who waits for what."""
    buffer = served.buffer
    return bodies.Stats(**asdict(buffer.state()), idle_s=buffer.idle_s, summary=buffer.describe())


@_router.get("/instances/{prompt_uid}")
async def instances(
    served: Served, prompt_uid: Annotated[str, Path(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
) -> bodies.InstancesBody:
    """Where every instance of a prompt stands."""
    known = served.run.ledger.instances_of(prompt_uid)
    if not known:
        raise HTTPException(404, "no prompt of this uid was issued yet.")
    return bodies.InstancesBody(instances=[bodies.instance_body(instance) for instance in known])
