"""Groups that come as JSON: checked, and made of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from buffer.prompts.dataset import prompt_uid
from buffer.service.bodies import PushBody, PushedPrompt, PushedSample
from slime.errors import DataError
from slime.types import Group, Message, Prompt, Sample, Score, Status

Render = Callable[[Sequence[Message], Sequence[Message]], Iterable[tuple[Sequence[int], bool]]]
"""``(prompt, answers)`` → the tokens of the whole conversation in order, as segments: the policy sampled them, or not.

Raises DataError for messages that the model's template cannot render.
"""


def pushed_group(body: PushBody, *, render: Render | None) -> Group:
    """The group of a body. The prompt's uid is the hash of its content, as for prompts from files.

    Raises:
        DataError: arrays that do not belong together, or messages that cannot be rendered.
    """
    prompt = _prompt(body.prompt)
    samples = [_sample(sample, prompt, index=i, render=render) for i, sample in enumerate(body.samples)]
    return Group(prompt=prompt, ordinal=0, epoch=0, attempt=0, samples=samples)


def _prompt(body: PushedPrompt) -> Prompt:
    if bool(body.messages) == bool(body.text):
        raise DataError(
            "prompt: got both 'messages' and 'text', or neither. Give messages for a chat template, or the text alone."
        )
    messages = [message.as_dict() for message in body.messages]
    return Prompt(
        uid=prompt_uid(messages=messages, text=body.text, label=body.label),
        messages=tuple(messages),
        text=body.text,
        label=body.label,
        tags=tuple(body.tags),
        metadata=body.metadata,
    )


def _sample(body: PushedSample, prompt: Prompt, *, index: int, render: Render | None) -> Sample:
    where = f"samples[{index}]"
    if bool(body.messages) == bool(body.tokens):
        raise DataError(f"{where}: got both 'messages' and 'tokens', or neither. Give one of the two.")
    sample = Sample(
        prompt_uid=prompt.uid,
        index=index,
        rollout_id=f"{prompt.uid}/{index}",
        temperature=body.temperature,
        status=Status.TRUNCATED if body.truncated else Status.COMPLETED,
        response=body.response,
        verdict=Score(value=body.reward),
        metadata=body.metadata,
    )
    if body.tokens:
        _append_tokens(sample, body, where=where)
    else:
        _append_messages(sample, body, prompt, where=where, render=render)
    if not sample.num_response_tokens:
        raise DataError(f"{where}: got no token that the policy sampled. Mark them in loss_mask, or leave it out.")
    return sample


def _append_tokens(sample: Sample, body: PushedSample, *, where: str) -> None:
    unknown = [float("nan")] * len(body.tokens)
    logprobs = unknown if body.logprobs is None else body.logprobs
    if not len(body.tokens) == len(body.loss_mask) == len(logprobs):
        raise DataError(
            f"{where}: got {len(body.tokens)} tokens, {len(body.loss_mask)} entries of loss_mask and {len(logprobs)} "
            "logprobs. Give one of each a token; leave logprobs out if the engine told none."
        )
    for sampled, segment in groupby(range(len(body.tokens)), key=body.loss_mask.__getitem__):
        positions = list(segment)
        first, end = positions[0], positions[-1] + 1
        if sampled:
            sample.append(body.tokens[first:end], logprobs=logprobs[first:end], version=body.version)
        else:
            sample.append(body.tokens[first:end])


def _append_messages(sample: Sample, body: PushedSample, prompt: Prompt, *, where: str, render: Render | None) -> None:
    if render is None or not prompt.messages or body.loss_mask or body.logprobs is not None:
        raise DataError(
            f"{where}: got messages, which need a service with the model's tokenizer and a prompt of messages, and go "
            "without loss_mask and logprobs. Push tokens instead, or prompt with messages."
        )
    messages = [message.as_dict() for message in body.messages]
    for tokens, sampled in render(prompt.messages, messages):
        if sampled and tokens:
            sample.append(tokens, logprobs=[float("nan")] * len(tokens), version=body.version)
        else:
            sample.append(tokens)
    if not sample.response:
        sample.response = "\n".join(_content(message) for message in messages if message["role"] == "assistant")


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""
