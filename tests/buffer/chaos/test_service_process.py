"""`serve_run` as people start it: a process over a run file, ended by a signal and started again."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from buffer.ledger import Ledger
from buffer.payload import decode
from buffer.service import bodies
from buffer.service.client import HttpBuffer
from buffer.service.serve import read_or_make_token
from slime.errors import ConfigError, DataError
from slime.serving import Renderer
from slime.types import Message
from tests.builders import WORDS, make_model

SERVE = """
import sys
from pathlib import Path
from slime.config import RunConfig
from slime.errors import SlimeError
from slime.serving import serve_run
config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
try:
    serve_run(config, base_dir=Path("."))
except SlimeError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run_file(tmp_path: Path, model: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"text": "{i} + 1 =", "label": "x"}}\n' for i in range(5)))
    config = {
        "run_dir": str(tmp_path / "run-1"),
        "num_steps": 9,
        "model": {"path": str(model)},
        "data": {"train": str(tmp_path / "prompts.jsonl")},
        "reward": {"fn": "exact"},
        "rollout": {"prompts_per_step": 4},
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(config))
    return path


def start(run_file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SERVE, str(run_file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def running(run_file: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = start(run_file)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert " at http://127.0.0.1:" in first, process.communicate()[1]
        yield process, first.split(" at ")[1].strip().removesuffix("/runs/run-1")
    finally:
        process.kill()
        process.communicate()


def client(url: str, run_file: Path) -> HttpBuffer:
    token = (run_file.parent / "run-1" / "buffer.token").read_text().strip()
    return HttpBuffer(url, run="run-1", token=token)


async def test_a_service_ends_on_a_signal_and_goes_on_with_its_token_its_leases_and_its_consumer(
    run_file: Path,
) -> None:
    """Pins: clients that must be told a new token, and rollouts that are thrown away by a restart."""
    with running(run_file) as (process, url):
        token_file = run_file.parent / "run-1" / "buffer.token"
        assert token_file.stat().st_mode & 0o777 == 0o600
        async with client(url, run_file) as buffer:
            await buffer.published(0)
            lease = await buffer.admit(request="a")
        second = start(run_file)
        _, error = second.communicate(timeout=50)
        assert second.returncode == 1
        assert "LedgerError" in error
        assert f"process {process.pid}" in error
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    with running(run_file) as (_, url):
        async with client(url, run_file) as buffer:
            assert await buffer.admit(request="a") == lease
            ordinal = await buffer.push(conversation(role="assistant"))
            with pytest.raises(DataError, match="no token that the policy sampled"):
                await buffer.push(conversation(role="user"))
    with Ledger(run_file.parent / "run-1") as ledger:
        audit = ledger.audit()
        assert audit.holds, str(audit)
        assert audit.in_flight == {"running": 1, "graded": 1}
        body = ledger.payload(ordinal)
    assert body is not None
    (sample,) = decode(body, ordinal=ordinal, epoch=0, attempt=0).samples
    tokens = [WORDS.index(word) for word in ["<s>", "1", "+", "2", "=", "<s>", "3"]]
    assert (sample.tokens, sample.loss_mask) == (tokens, [0, 0, 0, 0, 0, 1, 1])
    assert all(map(math.isnan, sample.rollout_logprobs[5:]))


def conversation(*, role: str) -> bodies.PushBody:
    return bodies.PushBody.model_validate(
        {
            "request": f"by-{role}",
            "prompt": {"messages": [{"role": "user", "content": "1 + 2 ="}], "label": "3"},
            "samples": [{"messages": [{"role": role, "content": "3"}], "version": 0, "reward": 1.0}],
        }
    )


class Template:
    """A tokenizer whose template opens answers with 1, ends them with 2 and a line break, 3; 9 is the user's turn."""

    eos_token_ids = (2,)

    def __init__(self, *, forgets: bool = False) -> None:
        self._forgets = forgets

    def encode_messages(self, messages: Sequence[Message], *, open_answer: bool) -> list[int]:
        tokens: list[int] = []
        for i, message in enumerate(messages):
            is_last = i == len(messages) - 1
            said = [int(word) for word in message["content"].split() if is_last or not self._forgets or word != "50"]
            tokens += [1, *said, 2, 3] if message["role"] == "assistant" else [9, *said]
        return tokens + [1] * open_answer


def test_only_what_the_policy_sampled_is_trained_of_a_conversation() -> None:
    """Pins: a loss on the template's own tokens, and on turns whose tokens the template changed afterwards."""
    user = {"role": "user", "content": "7"}
    answers = [{"role": "assistant", "content": "50 60"}, user, {"role": "assistant", "content": "70"}]
    render = Renderer("unused")
    render.__dict__["_tokenizer"] = Template()
    segments = [(list(tokens), sampled) for tokens, sampled in render([user], answers) if tokens]
    assert segments == [
        ([9, 7, 1], False),
        ([50, 60, 2], True),
        ([3], False),
        ([9, 7], False),
        ([1], False),
        ([70, 2], True),
        ([3], False),
    ]
    render.__dict__["_tokenizer"] = Template(forgets=True)
    with pytest.raises(DataError, match="renders earlier messages anew"):
        list(render([user], answers))
    with pytest.raises(DataError, match="chat template"):
        list(render([{"role": "user"}], answers))


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = read_or_make_token(path)
    assert read_or_make_token(path) == token
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read"):
        read_or_make_token(path)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(ConfigError, match="16 characters"):
        read_or_make_token(path)
