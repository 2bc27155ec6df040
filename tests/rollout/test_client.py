"""The client's checks, on replies as SGLang gives them."""

from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest

from rollout.client import GenerationClient, parse_completion, request_body
from slime.errors import EngineError
from slime.types import VersionSpan

URL = "http://127.0.0.1:1"


def reply(**meta: Any) -> dict[str, Any]:
    info = {
        "finish_reason": {"type": "stop", "matched": 2},
        "output_token_logprobs": [[-0.5, 8, None], [-1.5, 9, None], [-0.25, 2, None]],
        "completion_tokens": 3,
        "cached_tokens": 4,
        "weight_versions": [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}],
    }
    return {"output_ids": [8, 9, 2], "meta_info": {**copy.deepcopy(info), **meta}}


def test_a_reply_becomes_tokens_logprobs_and_version_spans() -> None:
    """Pins the fields that the gradient needs."""
    completion = parse_completion(reply(), url=URL, max_new_tokens=3)
    assert (completion.tokens, completion.logprobs) == ([8, 9, 2], [-0.5, -1.5, -0.25])
    assert completion.version_spans == [VersionSpan(start=0, end=2, version=3), VersionSpan(start=2, end=3, version=4)]
    assert (completion.finish_reason, completion.cached_tokens) == ("stop", 4)


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"output_token_logprobs": [[None, 8, None], [-1.5, 9, None], [-0.25, 2, None]]}, "not a finite number"),
        ({"output_token_logprobs": [[-0.5, 8, None]]}, "1 tokens, said 3"),
        ({"output_token_logprobs": [[-0.5, 8, None], [-1.5, 7, None], [-0.25, 2, None]]}, "ids that differ"),
        ({"weight_versions": [{"version": "3", "start": 0, "end": 2}]}, "do not cover its 3 tokens"),
        ({"weight_versions": [{"version": "3", "start": 1, "end": 3}]}, "do not cover its 3 tokens"),
        ({"weight_versions": [{"version": "default", "start": 0, "end": 3}]}, "invalid literal"),
        ({"weight_versions": None}, "without what a sample needs"),
        ({"finish_reason": None}, "without what a sample needs"),
        ({"finish_reason": {"type": "later"}}, "unknown finish reason 'later'"),
    ],
)
def test_a_reply_that_does_not_add_up_is_an_error_that_names_the_engine(meta: dict[str, Any], reason: str) -> None:
    """Pins that no half-told sample is trained."""
    with pytest.raises(EngineError, match=reason) as error:
        parse_completion(reply(**meta), url=URL, max_new_tokens=3)
    assert URL in str(error.value)


def test_more_tokens_than_allowed_are_an_error() -> None:
    """Pins the response limit, which the batch's memory is planned by."""
    with pytest.raises(EngineError, match="was allowed 2"):
        parse_completion(reply(), url=URL, max_new_tokens=2)


def body_of(**options: Any) -> dict[str, Any]:
    given = {"max_new_tokens": 5, "temperature": 0.7, "num_samples": 2, "seeds": None, "stop_token_ids": (2,)}
    body: dict[str, Any] = orjson.loads(request_body([5, 6], **{**given, **options}))
    return body


def test_samples_without_seeds_are_one_request_that_shares_the_prompt() -> None:
    """Pins the cheap form: copies of the prompt would each be computed."""
    assert body_of()["input_ids"] == [5, 6]
    assert body_of()["sampling_params"] == {"max_new_tokens": 5, "temperature": 0.7, "stop_token_ids": [2], "n": 2}


def test_each_sample_has_its_own_seed() -> None:
    """Pins that a group's samples differ in deterministic mode."""
    body = body_of(seeds=[3, 4])
    assert body["input_ids"] == [[5, 6], [5, 6]]
    assert [parameters["sampling_seed"] for parameters in body["sampling_params"]] == [3, 4]


def test_a_client_without_engines_says_so() -> None:
    """Pins the first mistake in wiring."""
    with pytest.raises(EngineError, match="num_engines"):
        GenerationClient([], token="t", timeout_s=1)


async def test_an_engine_that_is_gone_is_named() -> None:
    """Pins that a refused connection is an EngineError, not an aiohttp one."""
    async with GenerationClient([URL], token="t", timeout_s=5) as client:
        with pytest.raises(EngineError, match=rf"{URL} is gone"):
            await client.generate([1], max_new_tokens=1, temperature=1.0)
