"""Groups as bytes: that nothing is lost in them, and that no bytes from outside get further than a typed error."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.payload import decode, encode, inspect, summarise, versions_of
from buffer.policy import Versions
from slime.errors import DataError
from slime.types import Abstain, Failed, Group, Prompt, Sample, Score, Status, VersionSpan
from tests.builders import make_group, make_sample

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
verdicts = st.one_of(
    st.none(),
    st.builds(
        Score,
        value=st.floats(-9, 9),
        parts=st.dictionaries(text, st.floats(-9, 9), max_size=2),
    ),
    st.builds(Abstain, reason=text),
    st.builds(Failed, kind=text, detail=text, retryable=st.booleans()),
)
tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
float32s = st.floats(-80, 0, width=32)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    sample = Sample(
        prompt_uid="p0",
        index=draw(st.integers(0, 99)),
        rollout_id=draw(text),
        temperature=draw(st.floats(0.01, 2)),
        response=draw(text),
        status=draw(st.sampled_from(Status)),
        verdict=draw(verdicts),
        metadata=draw(st.dictionaries(text, json_values, max_size=2)),
    )
    for _ in range(draw(st.integers(0, 4))):
        turn = draw(tokens)
        if draw(st.booleans()):
            logprobs = draw(st.lists(float32s, min_size=len(turn), max_size=len(turn)))
            sample.append(turn, logprobs=logprobs, version=draw(st.integers(0, 9)))
        else:
            sample.append(turn)
    return sample


@st.composite
def groups(draw: st.DrawFn) -> Group:
    messages = draw(st.lists(st.fixed_dictionaries({"role": text, "content": text}), max_size=2))
    prompt = Prompt(
        uid="p0",
        messages=tuple(messages),
        text=draw(text),
        label=draw(json_values),
        tags=tuple(draw(st.lists(text, max_size=2))),
        metadata=draw(st.dictionaries(text, json_values, max_size=2)),
    )
    return Group(prompt=prompt, ordinal=3, epoch=1, attempt=2, samples=draw(st.lists(samples(), max_size=4)))


@given(group=groups())
def test_a_group_comes_out_of_its_bytes_as_it_went_in(group: Group) -> None:
    """Pins a field forgotten on the way to disk: the trainer would use its default in silence."""
    body = encode(group)
    assert decode(body, ordinal=3, epoch=1, attempt=2) == group
    assert inspect(body) == summarise(group)


def test_the_bytes_are_what_the_format_says() -> None:
    """Pins the layout, which clients in other languages write, against one taken apart by hand."""
    group = make_group([0.0, 1.0], response_tokens=[8, 9], logprobs=[-0.5, -0.25])
    body = encode(group)
    magic, header_bytes = struct.unpack("<4sI", body[:8])
    header = json.loads(body[8 : 8 + header_bytes])
    assert magic == b"slg1"
    assert [part["num_tokens"] for part in header["samples"]] == [5, 5]
    assert [part["versions"] for part in header["samples"]] == [[[3, 5, 0]], [[3, 5, 0]]]
    numbers = struct.unpack("<10i10f10B", body[8 + header_bytes :])
    assert numbers[:10] == (5, 6, 7, 8, 9) * 2
    assert numbers[10:20] == (0, 0, 0, -0.5, -0.25) * 2
    assert numbers[20:] == (0, 0, 0, 1, 1) * 2


def test_a_summary_counts_scores_alone() -> None:
    """Pins a failed verdict that enters the statistics of difficulty as a reward."""
    scored, failed = make_sample(reward=0.5, version=3), make_sample(index=1, reward=None, version=2)
    failed.verdict = Failed(kind="timeout", detail="10 s")
    group = make_group([])
    group.samples = [scored, failed]
    summary = inspect(encode(group))
    assert summary.rewards == (0.5,)
    assert summary.response_tokens_mean == 2
    assert summary.versions == Versions(oldest=2, newest=3)
    assert versions_of([]) is None


def test_log_probs_are_all_there_or_all_unknown() -> None:
    """Pins a NaN of an engine that passes for a log-probability nobody knew."""
    group = make_group([0.0, 1.0])
    group.samples[0].rollout_logprobs = [0.0, 0.0, 0.0, math.nan, math.nan]
    again = decode(encode(group), ordinal=0, epoch=0, attempt=0)
    assert [math.isnan(value) for value in again.samples[0].rollout_logprobs] == [False] * 3 + [True] * 2
    group.samples[0].rollout_logprobs = [0.0, 0.0, 0.0, math.nan, -1.0]
    with pytest.raises(DataError, match="not finite"):
        inspect(encode(group))


def rewritten(body: bytes, change: Any) -> bytes:
    """The same bytes with another header."""
    (header_bytes,) = struct.unpack_from("<I", body, 4)
    header = json.loads(body[8 : 8 + header_bytes])
    change(header)
    new = json.dumps(header).encode()
    return b"slg1" + struct.pack("<I", len(new)) + new + body[8 + header_bytes :]


def arrays_changed(body: bytes, *, array: int, value: float) -> bytes:
    """The same bytes with another last value in the tokens (0), log-probs (1) or mask (2) of 5 tokens."""
    part = [("<i4", -45), ("<f4", -25), ("u1", -5)][array]
    values = np.frombuffer(body[part[1] :], dtype=part[0], count=5).copy()
    values[-1] = value
    return body[: part[1]] + values.tobytes() + body[len(body) + part[1] + values.nbytes :]


WHOLE = encode(make_group([1.0]))
WRONG = {
    "nothing": b"",
    "no magic": b"GET " + WHOLE[4:],
    "cut": WHOLE[:-1],
    "too long": WHOLE + b"\0",
    "header longer than all": WHOLE[:4] + struct.pack("<I", 2**32 - 1) + WHOLE[8:],
    "no JSON": b"slg1" + struct.pack("<I", 3) + b"[[[" + WHOLE[8:],
    "a deep header": b"slg1" + struct.pack("<I", 10**5) + b"[" * 10**5,
    "unknown key": rewritten(WHOLE, lambda header: header.update(ordinal=1)),
    "no samples": rewritten(WHOLE, lambda header: header.pop("samples")),
    "tokens do not add up": rewritten(WHOLE, lambda header: header["samples"][0].update(num_tokens=4)),
    "negative count": rewritten(WHOLE, lambda header: header["samples"][0].update(num_tokens=-5)),
    "huge count": rewritten(WHOLE, lambda header: header["samples"][0].update(num_tokens=2**62)),
    "span outside": rewritten(WHOLE, lambda header: header["samples"][0].update(versions=[[3, 6, 0]])),
    "span twice": rewritten(WHOLE, lambda header: header["samples"][0].update(versions=[[3, 5, 0], [4, 5, 1]])),
    "no span": rewritten(WHOLE, lambda header: header["samples"][0].update(versions=[])),
    "negative version": rewritten(WHOLE, lambda header: header["samples"][0].update(versions=[[3, 5, -1]])),
    "reward NaN": rewritten(WHOLE, lambda header: header["samples"][0]["verdict"].update(value=math.nan)),
    "reward as text": rewritten(WHOLE, lambda header: header["samples"][0].update(verdict="good")),
    "negative temperature": rewritten(WHOLE, lambda header: header["samples"][0].update(temperature=-1)),
    "negative token": arrays_changed(WHOLE, array=0, value=-7),
    "log-prob NaN": arrays_changed(WHOLE, array=1, value=math.nan),
    "log-prob infinite": arrays_changed(WHOLE, array=1, value=-math.inf),
    "log-prob above 0": arrays_changed(WHOLE, array=1, value=0.5),
    "mask of 2": arrays_changed(WHOLE, array=2, value=2),
}


@pytest.mark.parametrize("body", WRONG.values(), ids=WRONG.keys())
def test_wrong_bytes_are_refused_in_words(body: bytes) -> None:
    """Pins hostile or damaged bytes that train, or that end the process that reads them."""
    with pytest.raises(DataError, match="right would be") as refused:
        inspect(body)
    with pytest.raises(DataError):
        decode(body, ordinal=0, epoch=0, attempt=0)
    assert len(str(refused.value)) < 600, "an error does not carry the bytes with it"


@given(body=st.binary(max_size=200) | st.builds(lambda tail: b"slg1" + tail, st.binary(max_size=200)))
def test_any_bytes_are_a_group_or_a_typed_error(body: bytes) -> None:
    """Pins a parser that can be made to raise anything else."""
    try:
        inspect(body)
    except DataError:
        return
    decode(body, ordinal=0, epoch=0, attempt=0)


@given(data=st.data())
def test_any_single_change_is_a_group_or_a_typed_error(data: st.DataObject) -> None:
    """The same near a whole one: one byte changed, or some cut out."""
    at, value = data.draw(st.integers(0, len(WHOLE) - 1)), data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, 3))
    body = WHOLE[:at] + (bytes([value]) if length == 0 else b"") + WHOLE[at + max(1, length) :]
    try:
        group = decode(body, ordinal=0, epoch=0, attempt=0)
    except DataError:
        return
    for sample in group.samples:
        assert len(sample.tokens) == len(sample.loss_mask) == len(sample.rollout_logprobs)
        assert all(isinstance(span, VersionSpan) and span.end <= len(sample.tokens) for span in sample.version_spans)


def test_a_token_that_no_vocabulary_has_is_refused_where_it_is_written() -> None:
    """Pins an overflow that wraps round to another token."""
    with pytest.raises(DataError, match="32-bit"):
        encode(make_group([1.0], response_tokens=[2**31, 1]))


def test_a_log_prob_that_no_float32_holds_is_refused_where_it_is_written() -> None:
    """Pins a group that is taken in, packed, and ends every consumer that decodes it, again after each start."""
    group = make_group([1.0])
    group.samples[0].rollout_logprobs[-1] = -1e39
    with pytest.raises(DataError, match="32 bits"):
        encode(group)


@pytest.mark.parametrize("change", [{"temperature": 1e-320}, {"verdict": {"value": -1.7e308}}])
def test_numbers_that_no_step_survives_are_refused_from_elsewhere_alone(change: dict[str, Any]) -> None:
    """Pins a pushed group of which the advantages are NaN: it would end the run that trains it, at every start."""
    body = rewritten(WHOLE, lambda header: header["samples"][0].update(change))
    with pytest.raises(DataError, match="right would be"):
        inspect(body)
    decode(body, ordinal=0, epoch=0, attempt=0)


@pytest.mark.parametrize("depth", [98, 99, 10_000])
def test_what_is_written_can_be_read_however_deep_it_is_nested(depth: int) -> None:
    """Pins metadata of a user's hook that is taken in, and ends the run when its group is trained, at every start."""
    group, nested = make_group([1.0]), "value"
    for _ in range(depth):
        nested = {"inner": nested}  # type: ignore[assignment]
    group.samples[0].metadata = {"kept": nested}
    if depth == 98:
        assert decode(encode(group), ordinal=0, epoch=0, attempt=0).samples[0].metadata == {"kept": nested}
        return
    with pytest.raises(DataError, match="nested more than 99 deep"):
        encode(group)
