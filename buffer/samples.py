"""Samples as they were trained: ``rollouts/step_000012.jsonl`` in the run directory, one JSON object a sample.

For people and their tools: nothing in a run reads them back, so the files may be moved or deleted at any time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from slime.errors import DataError
from slime.types import Abstain, Group, Sample, Score, Verdict

_UNESCAPED_CONTROL = re.compile(rb"\x7f|\xc2([\x80-\x9f])")
"""Control characters that JSON may leave as they are and a terminal may obey: DEL and U+0080 to U+009F, in UTF-8."""


def write_samples(run_dir: Path, groups: Sequence[Group], *, step: int) -> Path:
    """Write every sample of a step. The file appears whole or not at all, and replaces an earlier try of the same
    step."""
    path = _path(run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        for group in groups:
            for sample in group.samples:
                file.write(encode_line(sample_record(group, sample, step=step)) + b"\n")
    os.replace(unfinished, path)
    return path


def sample_record(group: Group, sample: Sample, *, step: int) -> dict[str, Any]:
    """What is written of one sample. The keys stay as they are: tools outside read them."""
    prompt = group.prompt
    return {
        "step": step,
        "ordinal": group.ordinal,
        "epoch": group.epoch,
        "attempt": group.attempt,
        "prompt_uid": prompt.uid,
        "index": sample.index,
        "rollout_id": sample.rollout_id,
        "prompt": [dict(message) for message in prompt.messages] if prompt.messages else prompt.text,
        "label": prompt.label,
        "tags": list(prompt.tags),
        "response": sample.response,
        "status": sample.status.value,
        "reward": sample.verdict.value if isinstance(sample.verdict, Score) else None,
        "verdict": _verdict(sample.verdict),
        "temperature": sample.temperature,
        "versions": [asdict(span) for span in sample.version_spans],
        "tokens": sample.tokens,
        "loss_mask": sample.loss_mask,
        "logprobs": sample.rollout_logprobs,
        "metadata": sample.metadata,
    }


def iter_samples(run_dir: Path, *, step: int) -> Iterator[dict[str, Any]]:
    """Read back what `write_samples` wrote at a step.

    Raises:
        DataError: nothing was written at that step, and the message names the steps there are; or a line is damaged.
    """
    path = _path(run_dir, step)
    if not path.is_file():
        steps = written_steps(run_dir)
        there = f"steps {steps[0]} to {steps[-1]} ({len(steps)} in all)" if steps else "no steps yet"
        raise DataError(
            f"{path}: no samples of step {step}. There are {there}. Name one of them, or another run directory."
        )
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield _parse(line, where=f"{path}, line {number}")


def _parse(line: bytes, *, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        record, got = None, f"no JSON ({error})"
    else:
        got = "JSON that is no object"
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: got {got}, and no sample. Restore the file from a copy, or move it away: no run needs it."
        )
    return record


def written_steps(run_dir: Path) -> list[int]:
    """The steps whose samples are there, in order."""
    return sorted(int(path.stem.removeprefix("step_")) for path in (run_dir / "rollouts").glob("step_*.jsonl"))


def _path(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"step_{step:06d}.jsonl"


def _verdict(verdict: Verdict | None) -> dict[str, Any] | None:
    if verdict is None:
        return None
    name = "score" if isinstance(verdict, Score) else "abstain" if isinstance(verdict, Abstain) else "failed"
    return {"is": name, **asdict(verdict)}


def encode_line(record: Any) -> bytes:
    """A value as one line of JSON, without its line break, that no terminal obeys."""
    try:
        line = orjson.dumps(record, default=repr, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:
        # Half a surrogate pair or an integer of more than 64 bits: Python's encoder takes both, ten times slower, and
        # what cannot be UTF-8 becomes the JSON escape that Python also uses as its error handler's notation.
        line = json.dumps(record, default=repr, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return _UNESCAPED_CONTROL.sub(lambda found: b"\\u00%02x" % found[0][-1], line)
