"""A group as bytes: how it is stored in the ledger and sent over HTTP. Written once, read into arrays without parsing.

    "slg1"                      4 bytes
    length of the header        4 bytes, little-endian
    header                      UTF-8 JSON: `Header`
    tokens                      int32[n], every sample's, one after the other
    log-probabilities           float32[n], NaN in samples that came without any
    loss mask                   uint8[n]

Everything is little-endian and nothing follows. Which instance it is an attempt at is not part of it: that is the
ledger's to say. Bytes may come from anywhere: `decode` and `inspect` check all of it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from buffer.nesting import MAX_DEPTH, is_too_deep
from buffer.policy import Versions
from slime.errors import DataError
from slime.types import Abstain, Failed, Group, Prompt, Sample, Score, Status, Verdict, VersionSpan

MAGIC = b"slg1"
CONTENT_TYPE = "application/x-slime-group"
_PREFIX = struct.Struct("<4sI")
_NOISE = 1e-3
"""An engine's float32 softmax may round a certain token's log-probability to just above 0."""
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_JSON = json.JSONEncoder(default=repr)
_BYTES_A_TOKEN = 4 + 4 + 1
MAX_REWARD = 1e9
"""Of what comes from elsewhere, either way of 0: the moments of much larger ones are no numbers any more."""
MIN_TEMPERATURE = 1e-3
"""Of what comes from elsewhere: logits that are divided by much less are no numbers any more."""

Count = Annotated[int, Field(ge=0, lt=2**40)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class PromptPart(_Part):
    """A prompt, with its whole content: what is pushed from outside stands in no file of the run."""

    uid: str
    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""
    label: Any = None
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] = {}


class SamplePart(_Part):
    """A sample without its arrays."""

    index: Count
    rollout_id: str
    num_tokens: Count
    versions: tuple[tuple[Count, Count, Count], ...]
    """``(start, end, version)`` of every run of sampled tokens."""
    has_logprobs: bool = True
    """False for a sample whose engine told none: a conversation that was rolled out elsewhere."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    status: Status
    response: str = ""
    verdict: Score | Abstain | Failed | None = None
    metadata: dict[str, Any] = {}


class Header(_Part):
    """Everything but the arrays."""

    prompt: PromptPart
    samples: tuple[SamplePart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the ledger wants to know of a group."""

    prompt_uid: str
    versions: Versions | None
    """None when no token was sampled."""
    rewards: tuple[float, ...]
    """Of the samples with a score."""
    response_tokens_mean: float
    """Sampled tokens of those samples; 0 without any."""
    largest_token: int
    """Token id, over all samples; 0 without any."""
    num_tokens_max: int
    """Of the longest sample, prompt and response."""


class _Arrays(NamedTuple):
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    mask: npt.NDArray[np.uint8]

    def slice(self, start: int, end: int) -> _Arrays:
        return _Arrays(self.tokens[start:end], self.logprobs[start:end], self.mask[start:end])


def encode(group: Group) -> bytes:
    """The bytes of a group. What JSON does not have in its metadata is written as its `repr`.

    Raises:
        DataError: what `decode` would refuse: a token is no 32-bit number, a log-probability is infinite as one, or
            metadata is nested too deep.
    """
    samples = group.samples
    if is_too_deep([group.prompt.label, dict(group.prompt.metadata), *(sample.metadata for sample in samples)]):
        raise DataError(
            f"group {group.id}: got a label or metadata nested more than {MAX_DEPTH - 1} deep. Keep flatter ones, or "
            "their JSON as a string."
        )
    header = {
        "prompt": _prompt_record(group.prompt),
        "samples": [_sample_record(sample) for sample in samples],
    }
    text = _JSON.encode(header).encode()
    try:
        tokens = np.array([token for sample in samples for token in sample.tokens], dtype="<i4")
    except OverflowError as error:
        raise DataError(f"group {group.id}: {error}. Token ids are 32-bit numbers: correct the rollout.") from None
    logprobs = np.array([value for sample in samples for value in sample.rollout_logprobs], dtype=np.float64)
    if (np.abs(logprobs) > _FLOAT32_MAX).any():
        raise DataError(
            f"group {group.id}: got a log-probability that is infinite in 32 bits. Report those of the tokens that "
            "were sampled, or drop the group."
        )
    mask = np.array([value for sample in samples for value in sample.loss_mask], dtype="u1")
    return b"".join(
        (_PREFIX.pack(MAGIC, len(text)), text, tokens.tobytes(), logprobs.astype("<f4").tobytes(), mask.tobytes())
    )


def decode(body: bytes, *, ordinal: int, epoch: int, attempt: int) -> Group:
    """The group of these bytes, as an attempt at an instance.

    Raises:
        DataError: they are no group; names what is wrong.
    """
    header, arrays = _parse(body)
    prompt = _prompt(header.prompt)
    starts = _starts(header)
    samples = [
        _sample(part, arrays.slice(start, end), uid=prompt.uid)
        for part, start, end in zip(header.samples, starts, starts[1:], strict=False)
    ]
    return Group(prompt=prompt, ordinal=ordinal, epoch=epoch, attempt=attempt, samples=samples)


def inspect(body: bytes) -> Summary:
    """Check bytes as `decode` does and for numbers that no step survives; summarise the group without its samples.

    Raises:
        DataError: they are no group; names what is wrong.
    """
    header, arrays = _parse(body)
    _check_range(header)
    scored = [i for i, part in enumerate(header.samples) if isinstance(part.verdict, Score)]
    starts = _starts(header)
    response_tokens = [int(arrays.mask[starts[i] : starts[i + 1]].sum()) for i in scored]
    return Summary(
        prompt_uid=header.prompt.uid,
        versions=_versions([version for part in header.samples for _, _, version in part.versions]),
        rewards=tuple(part.verdict.value for part in header.samples if isinstance(part.verdict, Score)),
        response_tokens_mean=_mean(response_tokens),
        largest_token=int(arrays.tokens.max(initial=0)),
        num_tokens_max=max((part.num_tokens for part in header.samples), default=0),
    )


def summarise(group: Group) -> Summary:
    """What `inspect` says of its bytes."""
    scored = [sample for sample in group.samples if isinstance(sample.verdict, Score)]
    return Summary(
        prompt_uid=group.prompt.uid,
        versions=versions_of(group.samples),
        rewards=tuple(sample.reward for sample in scored),
        response_tokens_mean=_mean([sample.num_response_tokens for sample in scored]),
        largest_token=max((max(sample.tokens, default=0) for sample in group.samples), default=0),
        num_tokens_max=max((len(sample.tokens) for sample in group.samples), default=0),
    )


def versions_of(samples: Sequence[Sample]) -> Versions | None:
    """The weights that sampled them; None when no token was sampled."""
    return _versions([span.version for sample in samples for span in sample.version_spans])


def _versions(versions: Sequence[int]) -> Versions | None:
    return Versions(oldest=min(versions), newest=max(versions)) if versions else None


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _parse(body: bytes) -> tuple[Header, _Arrays]:
    header, offset = _header(body)
    num_tokens = sum(part.num_tokens for part in header.samples)
    if len(body) != offset + num_tokens * _BYTES_A_TOKEN:
        _refuse(f"{len(body)} bytes", right=f"{offset + num_tokens * _BYTES_A_TOKEN} for {num_tokens} tokens")
    arrays = _Arrays(
        np.frombuffer(body, dtype="<i4", count=num_tokens, offset=offset),
        np.frombuffer(body, dtype="<f4", count=num_tokens, offset=offset + 4 * num_tokens),
        np.frombuffer(body, dtype="u1", count=num_tokens, offset=offset + 8 * num_tokens),
    )
    if num_tokens:
        _check(header, arrays)
    return header, arrays


def _header(body: bytes) -> tuple[Header, int]:
    if len(body) < _PREFIX.size or body[:4] != MAGIC:
        _refuse(f"{body[:8]!r}", right=f"bytes that begin with {MAGIC!r}")
    _, header_bytes = _PREFIX.unpack_from(body)
    offset = _PREFIX.size + header_bytes
    try:
        header = Header.model_validate(from_json(body[_PREFIX.size : offset], allow_inf_nan=False))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        _refuse(
            f"a header with {'.'.join(map(str, first['loc']))}: {first['msg']}", right="one as buffer.payload has it"
        )
    except ValueError as error:
        _refuse(f"a header that is not JSON ({error})", right="UTF-8 JSON of the stated length")
    return header, offset


def _starts(header: Header) -> list[int]:
    """Where each sample begins in the arrays, and where the last one ends."""
    return [0, *accumulate(part.num_tokens for part in header.samples)]


def _check(header: Header, arrays: _Arrays) -> None:
    """Over whole arrays, because a group is checked whenever one is handed in."""
    tokens, logprobs, mask = arrays
    if mask.max() > 1:
        _refuse(f"a loss mask with the value {mask.max()}", right="0 and 1")
    if tokens.min() < 0:
        _refuse(f"the token {tokens.min()}", right="token ids from 0 on")
    covered = np.zeros(len(mask), dtype=np.uint8)
    for part, offset in zip(header.samples, _starts(header), strict=False):
        last = 0
        for start, end, _ in part.versions:
            if not last <= start < end <= part.num_tokens:
                _refuse(
                    f"sample {part.index} with the version span [{start}, {end}) in {part.num_tokens} tokens",
                    right="spans inside the sample, in order, that do not overlap",
                )
            covered[offset + start : offset + end] = 1
            last = end
    if (mask > covered).any():
        _refuse(f"the sampled token {(mask > covered).argmax()} of no version", right="a span for every sampled token")
    known = np.isfinite(logprobs)
    if not known.all():
        _check_unknown(header, arrays, known=known)
    if (worst := np.max(logprobs, initial=-np.inf, where=known)) > _NOISE:
        _refuse(f"the log-probability {worst}", right="numbers up to 0")


def _check_range(header: Header) -> None:
    for part in header.samples:
        if part.temperature < MIN_TEMPERATURE:
            _refuse(f"sample {part.index} of temperature {part.temperature}", right=f"{MIN_TEMPERATURE} or more")
        if isinstance(part.verdict, Score) and abs(part.verdict.value) > MAX_REWARD:
            _refuse(f"sample {part.index} of reward {part.verdict.value}", right=f"up to {MAX_REWARD} either way of 0")


def _check_unknown(header: Header, arrays: _Arrays, *, known: npt.NDArray[np.bool_]) -> None:
    """Some log-probability is no finite number: that is for samples that say so, and then for all they sampled."""
    told = np.repeat([part.has_logprobs for part in header.samples], [part.num_tokens for part in header.samples])
    if not known[told].all() or (known & ~told & arrays.mask.view(bool)).any() or np.isinf(arrays.logprobs).any():
        _refuse(
            "log-probabilities that are not finite, or some where has_logprobs is false",
            right="a finite one for every token of a sample, or NaN for all that it sampled",
        )


def _prompt(part: PromptPart) -> Prompt:
    return Prompt(
        uid=part.uid,
        messages=part.messages,
        text=part.text,
        label=part.label,
        tags=part.tags,
        metadata=part.metadata,
    )


def _sample(part: SamplePart, own: _Arrays, *, uid: str) -> Sample:
    return Sample(
        prompt_uid=uid,
        index=part.index,
        rollout_id=part.rollout_id,
        tokens=own.tokens.tolist(),
        loss_mask=own.mask.tolist(),
        rollout_logprobs=own.logprobs.tolist(),
        version_spans=[VersionSpan(start=start, end=end, version=version) for start, end, version in part.versions],
        temperature=part.temperature,
        status=part.status,
        response=part.response,
        verdict=part.verdict,
        metadata=part.metadata,
    )


def _prompt_record(prompt: Prompt) -> dict[str, Any]:
    return {
        "uid": prompt.uid,
        "messages": [dict(message) for message in prompt.messages],
        "text": prompt.text,
        "label": prompt.label,
        "tags": prompt.tags,
        "metadata": dict(prompt.metadata),
    }


def _sample_record(sample: Sample) -> dict[str, Any]:
    return {
        "index": sample.index,
        "rollout_id": sample.rollout_id,
        "num_tokens": len(sample.tokens),
        "versions": [(span.start, span.end, span.version) for span in sample.version_spans],
        "has_logprobs": not any(map(math.isnan, sample.rollout_logprobs)),
        "temperature": sample.temperature,
        "status": sample.status.value,
        "response": sample.response,
        "verdict": _verdict_record(sample.verdict) if sample.verdict else None,
        "metadata": sample.metadata,
    }


def _verdict_record(verdict: Verdict) -> dict[str, Any]:
    """`dataclasses.asdict`, which takes longer than all the rest of a sample, without its deep copies."""
    record = {field: getattr(verdict, field) for field in verdict.__slots__}
    return record | {"parts": dict(verdict.parts)} if isinstance(verdict, Score) else record


def _refuse(got: str, *, right: str) -> NoReturn:
    raise DataError(f"a group's bytes: got {got}; right would be {right}. Encode it with buffer.payload, or push JSON.")
