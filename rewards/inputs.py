"""What a reward function is given, and how it travels to a worker process: as JSON, so that nothing is unpickled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime.types import Message, Prompt, Sample, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardInput:
    """One sample and its prompt in plain values, as a reward function sees them."""

    response: str
    """What the policy wrote, without special tokens."""
    label: Any
    """The prompt's label, as it stands in the data file."""
    messages: tuple[Message, ...]
    """The prompt as chat messages; empty if it is plain text."""
    text: str
    """The prompt as plain text; empty if it is messages."""
    tags: tuple[str, ...]
    metadata: Mapping[str, Any]
    """The prompt's metadata, overlaid with what the rollout recorded on the sample."""
    num_response_tokens: int
    status: Status
    """`completed`, or `truncated` by the token limit."""

    def values(self) -> dict[str, Any]:
        """All arguments a reward function may name: ``sample`` and the fields."""
        return {"sample": self, **{name: getattr(self, name) for name in FIELDS}}


FIELDS = tuple(field.name for field in dataclasses.fields(RewardInput))
ARGUMENTS = ("sample", *FIELDS)


def reward_input(sample: Sample, prompt: Prompt) -> RewardInput:
    """What a reward function sees of `sample`."""
    return RewardInput(
        response=sample.response,
        label=prompt.label,
        messages=prompt.messages,
        text=prompt.text,
        tags=prompt.tags,
        metadata={**prompt.metadata, **sample.metadata},
        num_response_tokens=sample.num_response_tokens,
        status=sample.status,
    )


def encode_input(value: RewardInput) -> bytes:
    """JSON. Numpy values and dates, which parquet files hold, become plain ones; tuples become lists.

    Raises:
        TypeError, ValueError: something in it has no plain form.
    """
    return json.dumps({name: getattr(value, name) for name in FIELDS}, default=_plain).encode()


def decode_input(body: dict[str, Any]) -> RewardInput:
    """The inverse of `encode_input`, after ``json.loads``."""
    changed = {"messages": tuple(body["messages"]), "tags": tuple(body["tags"]), "status": Status(body["status"])}
    return RewardInput(**{**body, **changed})


def _plain(value: Any) -> Any:
    for method in ("tolist", "isoformat"):
        if hasattr(value, method):
            return getattr(value, method)()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(
        f"a {type(value).__name__} cannot be sent to a reward worker; use text, numbers, lists and dicts in labels and "
        f"metadata, or convert it when the prompts are made"
    )
