"""Whatever a reward function does, it costs its own sample, becomes no number, and leaves no process behind."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.pool import RewardPool, check_reward
from slime.config import RewardConfig
from slime.errors import HookError, RewardError
from slime.types import Abstain, Failed, Prompt, Sample, Score, Status, Verdict

HERE = Path(__file__).parent
MARK = "SLIME_TEST_MARK"


def marked_processes(mark: str) -> list[str]:
    """Command lines of the living processes that were started, at any remove, by the test with this mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Fails a test that leaves a process behind, children of children included."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield mark
    assert marked_processes(mark) == []


def config(fn: str = "./naughty.py:score", *, timeout_s: float = 20.0, num_workers: int = 2) -> RewardConfig:
    return RewardConfig(fn=fn, timeout_s=timeout_s, num_workers=num_workers)


def sample(response: str = "seven", *, status: Status = Status.COMPLETED) -> Sample:
    return Sample(prompt_uid="p", index=0, rollout_id="p/0", response=response, status=status)


async def grade_by_label(pool: RewardPool, *labels: str, response: str = "seven") -> list[Verdict]:
    """One sample for each label, graded together."""
    groups = [pool.grade([sample(response)], Prompt(uid=label, label=label)) for label in labels]
    return [verdicts[0] for verdicts in await asyncio.gather(*groups)]


OUTCOMES = {
    "raises": ("raised", "ValueError: invalid literal"),
    "returns_none": ("bad_value", "None of type NoneType"),
    "returns_nan": ("bad_value", "nan"),
    "returns_text": ("bad_value", "'1.0' of type str"),
    "exits": ("raised", "SystemExit: 3"),
    "allocates": ("raised", "MemoryError"),
    "dies": ("worker_died", "exited with status 7"),
    "crashes": ("worker_died", "SIGSEGV"),
    "unheard_of": ("raised", "KeyError"),
}


async def test_each_failure_costs_its_own_sample_and_names_its_cause() -> None:
    """Pins: failures that become reward 0, and a failure that takes its neighbours with it."""
    labels = [label for bad in OUTCOMES for label in (bad, "good")]
    async with RewardPool(config(), base_dir=HERE) as pool:
        verdicts = dict(enumerate(await grade_by_label(pool, *labels)))
        metrics = pool.metrics()
    for position, label in enumerate(labels):
        verdict = verdicts[position]
        if label == "good":
            assert isinstance(verdict, Score)
            assert verdict.value == 0.5
        else:
            kind, detail = OUTCOMES[label]
            assert isinstance(verdict, Failed), label
            assert verdict.kind == kind
            assert detail in verdict.detail
    assert metrics["reward/calls"] == len(labels)
    assert metrics["reward/failures"] == len(OUTCOMES)
    assert metrics["reward/workers_died"] == 2


async def test_a_failed_call_shows_the_users_line_and_last_words() -> None:
    """Pins: a report without the line to mend."""
    async with RewardPool(config(), base_dir=HERE) as pool:
        raised, died, crashed = await grade_by_label(pool, "raises", "dies", "crashes")
    assert isinstance(raised, Failed)
    assert "of naughty.py, in raises: `return int(sample.response)`" in raised.detail
    assert isinstance(died, Failed)
    assert "last words" in died.detail
    assert isinstance(crashed, Failed)
    assert "in crashes" in crashed.detail


HANGS = ["loops", "backtracks", "multiplies", "blocks_signals", "waits"]


async def test_a_call_that_hangs_is_killed_even_in_c_code() -> None:
    """Pins: a time-out that works by signal or thread, which C code and blocked signals ignore."""
    async with RewardPool(config(timeout_s=1.0), base_dir=HERE) as pool:
        verdicts = await grade_by_label(pool, *[label for hang in HANGS for label in (hang, "good")])
        metrics = pool.metrics()
    for bad, good in zip(verdicts[::2], verdicts[1::2], strict=True):
        assert isinstance(bad, Failed)
        assert bad.kind == "timeout"
        assert "reward.timeout_s = 1 s" in bad.detail
        assert isinstance(good, Score)
    assert metrics["reward/timeouts"] == len(HANGS)
    assert metrics["reward/latency_p99_s"] == 1.0


async def test_values_sync_async_and_abstentions_arrive() -> None:
    """Pins: an async function whose coroutine is taken for the reward, and a bool that is refused."""
    async with RewardPool(config(), base_dir=HERE) as pool:
        good, later, none = await grade_by_label(pool, "good", "answers_later", "abstains")
    assert isinstance(good, Score)
    assert good.parts["pid"] > 0
    assert later == Score(value=1.0)
    assert none == Abstain(reason="no rule applies")


async def test_verdicts_come_in_the_order_of_the_samples(tmp_path: Path) -> None:
    """Pins: answers matched to the wrong sample, across batches, workers and concurrent callers."""
    (tmp_path / "r.py").write_text("def score(response, label): return int(response) + 1000 * label\n")
    async with RewardPool(config("./r.py:score"), base_dir=tmp_path) as pool:
        groups = [pool.grade([sample(str(i)) for i in range(50)], Prompt(uid="", label=label)) for label in range(5)]
        verdicts = await asyncio.gather(*groups)
    assert verdicts == [[Score(value=i + 1000 * label) for i in range(50)] for label in range(5)]


async def test_children_that_a_call_leaves_end_with_the_pool(mark: str) -> None:
    """Pins: orphans that pile up, those that left the worker's process group included."""
    async with RewardPool(config(num_workers=1), base_dir=HERE) as pool:
        assert await grade_by_label(pool, "leaves_children", "good") != []
        assert len(marked_processes(mark)) == 4, "guard, worker and two children"


async def test_a_forked_copy_of_the_worker_does_not_answer() -> None:
    """Pins: a function that forks and returns in both processes shifting every later verdict by one."""
    async with RewardPool(config(num_workers=1), base_dir=HERE) as pool:
        first = await grade_by_label(pool, "answers_twice", "answers_twice", "abstains", "answers_twice")
    assert first == [Score(value=1.0), Score(value=1.0), Abstain(reason="no rule applies"), Score(value=1.0)]


async def test_a_worker_that_grows_is_replaced() -> None:
    """Pins: a leak in a reward function that takes the machine down hours later."""
    async with RewardPool(config(num_workers=1), base_dir=HERE, max_growth_bytes=100 << 20) as pool:
        verdicts = [(await grade_by_label(pool, "leaks"))[0] for _ in range(8)]
    pids = [verdict.parts["pid"] for verdict in verdicts if isinstance(verdict, Score)]
    assert len(pids) == 8
    assert len(set(pids)) == 2


async def test_output_goes_to_the_log_and_is_bounded(tmp_path: Path) -> None:
    """Pins: a print of 100 MB that blocks the worker, fills the disk or garbles the verdicts."""
    log = tmp_path / "logs" / "rewards.log"
    async with RewardPool(config(), base_dir=HERE, log_path=log) as pool:
        verdicts = await grade_by_label(pool, "prints", "good")
    assert verdicts[0] == Score(value=1.0)
    assert 16_000_000 < log.stat().st_size < 17_000_000
    assert log.read_bytes().endswith(b"what follows is dropped]\n")


@pytest.mark.parametrize("label", ["dies_once", "fails_once"])
async def test_a_failure_that_may_pass_is_tried_once_more(label: str, tmp_path: Path) -> None:
    """Pins: a sample lost to an accident, e.g. a worker that the kernel killed for memory."""
    async with RewardPool(config(), base_dir=HERE) as pool:
        verdicts = await grade_by_label(pool, label, response=str(tmp_path / "tried"))
        assert pool.metrics()["reward/failures"] == 0
    assert verdicts == [Score(value=1.0)]


async def test_what_was_not_generated_is_not_judged() -> None:
    """Pins: a sample that an engine lost being graded as an empty, wrong answer."""
    samples = [sample(status=status) for status in (Status.FAILED, Status.ABORTED, Status.TRUNCATED)]
    async with RewardPool(config(), base_dir=HERE) as pool:
        failed, aborted, truncated = await pool.grade(samples, Prompt(uid="p", label="good"))
        (unsendable,) = await pool.grade([sample()], Prompt(uid="p", label=object()))
    assert isinstance(failed, Failed)
    assert failed.kind == "not_generated"
    assert isinstance(aborted, Failed)
    assert isinstance(truncated, Score)
    assert isinstance(unsendable, Failed)
    assert "a object cannot be sent to a reward worker" in unsendable.detail


async def test_workers_load_no_more_than_they_need() -> None:
    """Pins: torch in every reward worker: seconds and hundreds of megabytes each."""
    async with RewardPool(config(), base_dir=HERE) as pool:
        assert await grade_by_label(pool, "has_torch") == [Score(value=0.0)]


async def test_an_event_loop_that_was_held_up_fails_no_call(tmp_path: Path) -> None:
    """Pins: good calls counted as time-outs because the driver, not the reward, was busy."""
    (tmp_path / "r.py").write_text("import time\ndef score(sample):\n    time.sleep(0.2)\n    return 1.0\n")
    async with RewardPool(config("./r.py:score", timeout_s=1.0), base_dir=tmp_path) as pool:
        grading = asyncio.create_task(pool.grade([sample()], Prompt(uid="p")))
        await asyncio.sleep(0.1)
        time.sleep(2.5)  # noqa: ASYNC251  the fault itself
        assert await grading == [Score(value=1.0)]


async def test_a_reward_that_changes_during_the_run_ends_it(tmp_path: Path) -> None:
    """Pins: two workers judging by different rules, after an edit for the next experiment."""
    file = tmp_path / "r.py"
    file.write_text("import os\ndef score(sample): os._exit(1)\n")
    async with RewardPool(config("./r.py:score"), base_dir=tmp_path) as pool:
        file.write_text("def score(sample): return 1.0\n")
        with pytest.raises(RewardError, match="changed during the run"):
            await pool.grade([sample()], Prompt(uid="p"))
        with pytest.raises(RewardError, match="changed during the run"):
            await pool.grade([sample()], Prompt(uid="p"))


async def test_grading_outside_the_pools_life_is_refused() -> None:
    """Pins: a grade that waits for ever for workers that are not there."""
    pool = RewardPool(config(), base_dir=HERE)
    with pytest.raises(RewardError, match="not running"):
        await pool.grade([sample()], Prompt(uid="p", label="good"))
    async with pool:
        grading = asyncio.create_task(grade_by_label(pool, "blocks_signals"))
        await asyncio.sleep(0.1)
    with pytest.raises(RewardError, match="was closed"):
        await grading


def test_workers_end_when_the_driver_is_killed(mark: str, tmp_path: Path) -> None:
    """Pins: workers stuck in C code, and their children, that outlive a driver after kill -9."""
    (tmp_path / "r.py").write_text(
        "import os, re, time\n"
        "def score(sample):\n"
        "    if os.fork() == 0:\n        os.setsid()\n        time.sleep(1000)\n"
        f"    open({str(tmp_path / 'busy')!r} + str(os.getpid()), 'w').close()\n"
        "    return re.match(r'(a+)+$', 'a' * 60 + 'b')\n"
    )
    program = (
        "import asyncio; from pathlib import Path\n"
        "from rewards.pool import RewardPool; from slime.config import RewardConfig\n"
        "from slime.types import Prompt, Sample\n"
        "async def main():\n"
        f"    config = RewardConfig(fn='./r.py:score', timeout_s=1000)\n"
        f"    async with RewardPool(config, base_dir=Path({str(tmp_path)!r})) as pool:\n"
        "        sample = Sample(prompt_uid='p', index=0, rollout_id='')\n"
        "        await pool.grade([sample, sample], Prompt(uid='p'))\n"
        "asyncio.run(main())\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", program], cwd=HERE.parents[1])
    try:
        wait_for(lambda: len(list(tmp_path.glob("busy*"))) == 2, "both workers are busy")
        assert len(marked_processes(mark)) == 7, "driver, 2 x (guard, worker, child)"
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait(timeout=10)
    wait_for(lambda: marked_processes(mark) == [], "all processes are gone")


def wait_for(condition, what: str, *, deadline_s: float = 30.0) -> None:  # type: ignore[no-untyped-def]
    """Files and foreign processes cannot be waited for, only looked at."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("text", "fn", "error", "says"),
    [
        ("", "./r.py:score", HookError, "no function 'score'"),
        ("def score(a, b): ...", "./r.py:score", HookError, "does not give 'a', 'b'"),
        ("x = 1 / 0", "./r.py:score", HookError, "ZeroDivisionError: division by zero (line 1 of r.py"),
        ("import time; time.sleep(1000)", "./r.py:score", RewardError, "not loaded within 1 s"),
        ("import os; print('bye'); os._exit(4)", "./r.py:score", RewardError, "exited with status 4"),
        ("", "./missing.py:score", HookError, "no file"),
        ("", "exat", HookError, '"exact" and "math"'),
        ("", "r.py", HookError, '"r.py:name"'),
    ],
)
def test_a_reward_that_cannot_be_used_is_explained_before_the_run(
    text: str, fn: str, error: type[Exception], says: str, tmp_path: Path
) -> None:
    """Pins: mistakes in a reward file that show after the engines have been started."""
    (tmp_path / "r.py").write_text(text)
    deadline_s = 1.0 if "sleep" in text else 60.0
    with pytest.raises(error) as caught:
        check_reward(config(fn), tmp_path, start_timeout_s=deadline_s)
    assert says in str(caught.value)
    assert "\n" in str(caught.value), "the second line says what to do"


@pytest.mark.parametrize("fn", ["exact", "math", "./naughty.py:score", "rewards.exact:score"])
def test_a_usable_reward_passes_the_check(fn: str) -> None:
    """Pins: a check that refuses what would have run."""
    check_reward(config(fn), HERE)


async def test_the_built_in_rewards_run_in_workers() -> None:
    """Pins: a built-in that works when imported but not under its name in a run file."""
    for fn in ("exact", "math"):
        async with RewardPool(config(fn), base_dir=HERE) as pool:
            samples = [sample("so \\boxed{12}"), sample("so \\boxed{13}")]
            right, wrong = await pool.grade(samples, Prompt(uid="p", label="12"))
        assert (right, wrong) == (Score(value=1.0), Score(value=0.0))
