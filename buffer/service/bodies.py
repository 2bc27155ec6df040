"""Every JSON body of the service, as pydantic models: what OpenAPI documents and what the client sends and reads.

Bodies come from anywhere. Unknown keys, NaN and Infinity are refused, and every string, list and number has a limit.
Arrays of tokens that a program reads travel as bytes instead: `buffer.payload`, `buffer.service.frames`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from buffer.payload import MAX_REWARD, MIN_TEMPERATURE, PromptPart
from buffer.records import Instance
from buffer.service import frames
from slime.types import Lease, Prompt

MAX_WAIT_S = 60.0
"""A long poll is answered with 204 after this at the latest, and the client asks again."""


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _all_whole(values: object) -> object:
    if isinstance(values, list) and float in set(map(type, values)):  # quick for what is as it should be
        return [_whole(value) for value in values]
    return values


def _finite(value: Any) -> Any:
    """Refuses 1e400, which JSON allows and no float holds."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(part)
    return value


WHOLE = BeforeValidator(_whole)
"""To JSON Schema 1.0 is an integer, but true and "1" are none."""
ALL_WHOLE = BeforeValidator(_all_whole)
"""The same for long lists."""
Token = Annotated[int, Field(ge=0, lt=2**31)]
Ordinal = Annotated[int, Field(ge=0, lt=2**53), WHOLE]
Count = Annotated[int, Field(ge=0, lt=2**31), WHOLE]
Step = Annotated[int, Field(ge=1, lt=2**31), WHOLE]
Incarnation = Annotated[int, Field(ge=1, lt=2**53), WHOLE]
Json = Annotated[Any, AfterValidator(_finite)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_finite)]
WaitS = Annotated[float, Field(ge=0, le=MAX_WAIT_S)]
RequestName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
Reason = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,200}$")]
CheckpointName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
Text = Annotated[str, Field(max_length=2**22)]
Tag = Annotated[str, Field(max_length=256)]


class Body(BaseModel):
    """Base of every body."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ErrorBody(Body):
    """Why a request was refused. What was accepted before stands."""

    error: str
    """The class of the error, as in slime.errors."""
    message: str
    """What was got, what would be right, and ways out."""


class Health(Body):
    status: Literal["ok"] = "ok"


class AdmitBody(Body):
    request: RequestName
    """A name of the client's own for this request; sent again under the same name it gets the same lease."""
    wait_s: WaitS = 30.0
    """How long to wait until there is room."""


class LeaseBody(Body):
    """The right to roll out one prompt instance."""

    ordinal: Ordinal
    """Number of the instance in the run."""
    attempt: Count
    """Goes with every word about the instance; a result of an older attempt is acknowledged and discarded."""
    epoch: Count
    prompt: PromptPart
    """What to ask, and what is right."""
    has_partial: bool
    """Whether an earlier attempt left samples to begin with: GET them from `partial`."""
    lease_s: float | None
    """The instance is given to somebody else unless it is handed in or renewed within these seconds; null for ever."""


def lease_body(lease: Lease, *, lease_s: float | None) -> LeaseBody:
    """What a client is told of a lease."""
    prompt = lease.prompt
    return LeaseBody.model_construct(
        ordinal=lease.ordinal,
        attempt=lease.attempt,
        epoch=lease.epoch,
        prompt=PromptPart.model_construct(
            uid=prompt.uid,
            messages=prompt.messages,
            text=prompt.text,
            label=prompt.label,
            tags=prompt.tags,
            metadata=prompt.metadata,
        ),
        has_partial=lease.partial is not None,
        lease_s=lease_s,
    )


def leased_prompt(body: LeaseBody) -> Prompt:
    """The prompt of a lease that a service told of."""
    return Prompt(**{name: getattr(body.prompt, name) for name in PromptPart.model_fields})


class AttemptBody(Body):
    """Names a leased instance."""

    ordinal: Ordinal
    attempt: Count


class DropBody(AttemptBody):
    reason: Reason


class RenewBody(Body):
    leases: Annotated[list[AttemptBody], Field(max_length=frames.MAX_GROUPS)]


class RenewedBody(Body):
    renewed: list[bool]
    """In the order asked; false for a lease that is over: stop working on it."""


class RecordedBody(Body):
    recorded: bool
    """False when it was discarded: of an older attempt, or handed in before."""


class PutEntry(AttemptBody):
    """One group of `put_batch`."""

    drop: Reason | None = None
    """Why it is not to be trained; null to train it."""


class PushEntry(Body):
    """One group of `push_batch`."""

    request: RequestName
    """A name for the group; sent again under the same name it changes nothing."""


class TakenEntry(AttemptBody):
    """One group of the answer to `take`."""

    epoch: Count


class Answer(Body):
    """What became of one group of a batch: it was recorded or discarded, has this ordinal, or was refused."""

    recorded: bool | None = None
    ordinal: Ordinal | None = None
    error: ErrorBody | None = None


class AnswersBody(Body):
    answers: list[Answer]
    """In the order of the groups."""


class MessageBody(BaseModel):
    """One chat message; what else it has is passed to the chat template."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Text | Annotated[list[JsonObject], Field(max_length=256)] | None
    __pydantic_extra__: dict[str, Json] = Field(init=False)

    def as_dict(self) -> dict[str, Any]:
        """As templates want it."""
        return self.model_dump()


class PushedPrompt(Body):
    """A prompt of the pusher's own: either `messages` or `text`."""

    messages: Annotated[list[MessageBody], Field(max_length=4096)] = []
    text: Text = ""
    label: Json = None
    tags: Annotated[list[Tag], Field(max_length=64)] = []
    metadata: JsonObject = {}


class PushedSample(Body):
    """One rollout, scored: either `messages`, or `tokens` with their `loss_mask`."""

    messages: Annotated[list[MessageBody], Field(max_length=4096)] = []
    """What follows the prompt; the assistant's messages are trained. Needs a prompt of messages."""
    tokens: Annotated[list[Token], Field(max_length=2**22), ALL_WHOLE] = []
    """Prompt and response."""
    loss_mask: Annotated[list[Annotated[int, Field(ge=0, le=1)]], Field(max_length=2**22), ALL_WHOLE] = []
    """1 for every token that the policy sampled."""
    logprobs: Annotated[list[Annotated[float, Field(ge=-1e30, le=1e-3)]], Field(max_length=2**22)] | None = None
    """Natural log-probability of every sampled token, anything where the mask is 0; null when the engine told none."""
    version: Count
    """Of the weights that sampled it; the oldest, if there were several."""
    reward: Annotated[float, Field(ge=-MAX_REWARD, le=MAX_REWARD)]
    temperature: Annotated[float, Field(ge=MIN_TEMPERATURE, le=100)] = 1.0
    truncated: bool = False
    """The token limit ended it."""
    response: Text = ""
    """The sampled text, for people."""
    metadata: JsonObject = {}


class PushBody(Body):
    """A group of samples of one prompt, rolled out elsewhere."""

    request: RequestName
    """A name for the group; sent again under the same name it changes nothing."""
    prompt: PushedPrompt
    samples: Annotated[list[PushedSample], Field(min_length=1, max_length=1024)]
    wait_s: WaitS = 0.0
    """Wait so long for room before it is refused with 429."""


class PushedBody(Body):
    ordinal: Ordinal
    """Number of the instance it became."""


class CommitBody(Body):
    """A point the run can be continued from."""

    step: Count
    checkpoint: CheckpointName
    state: JsonObject


class ConsumerBody(Body):
    consumer: Incarnation
    """Goes with everything this consumer says; when another takes over, it is refused."""
    last_commit: CommitBody | None
    """What training continues from."""


class ConsumerWord(Body):
    consumer: Incarnation


class TakeBody(ConsumerWord):
    step: Step
    num_groups: Annotated[int, Field(ge=1, le=frames.MAX_GROUPS), WHOLE]
    wait_s: WaitS = 30.0


class PublishedBody(ConsumerWord):
    version: Count
    """What the engines answer as from now on."""


class CommitWord(ConsumerWord, CommitBody):
    """Makes a checkpoint that is on disk the current one, and everything packed up to its step trained."""


class ReleasedBody(Body):
    num_released: Count
    """Groups that were packed and not committed; they can be taken again."""


class Stats(Body):
    version: int | None
    """What the engines answer as; null before the first publish."""
    num_waiting: int
    """Given back, and admitted again first."""
    num_running: int
    num_ready: int
    """Graded, kept and not taken yet."""
    num_packed: int
    """Taken and not committed yet."""
    num_committed: int
    capacity: int
    """How many more may be admitted now."""
    dropped: dict[str, int]
    """By reason."""
    num_requeued: int
    num_stale: int
    """Late or repeated results that were discarded."""
    idle_s: float
    """Since anything moved."""
    summary: str
    """Who waits for what, oldest first."""


class InstanceBody(Body):
    """Where one instance of a prompt stands."""

    ordinal: Ordinal
    epoch: Count
    attempt: Count
    state: str
    step: int | None
    """The training step it is packed into."""
    reason: str
    """Why it was dropped."""


class InstancesBody(Body):
    instances: list[InstanceBody]


def instance_body(instance: Instance) -> InstanceBody:
    """What a client is told of an instance."""
    return InstanceBody(**{name: getattr(instance, name) for name in InstanceBody.model_fields})
