"""The pool of reward workers: every sample gets a verdict, whatever the reward function does.

    grade ──jobs──▶ queue (bounded) ──▶ lane 0..N-1, one worker process each ──verdicts──▶ the jobs' futures
                                          │ a call hangs or its worker dies: kill the worker and its children,
                                          └ settle or retry that job, start a fresh worker, go on with the rest

`grade` waits for its jobs' futures or for the lanes to fail, whichever comes first. A lane waits for a job, then for
each call's answer (deadline: `timeout_s`), and for a worker to start or to end (deadlines in rewards.process). A lane
that cannot get a worker ends all lanes, and every `grade` raises its error.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rewards.inputs import encode_input, reward_input
from rewards.meter import CallMeter
from rewards.output import OutputLog
from rewards.process import Answer, WorkerDied, WorkerProcess, WorkerSpec
from slime.config import RewardConfig
from slime.errors import RewardError
from slime.types import Failed, Metrics, Prompt, Sample, Status, Verdict

MAX_BATCH = 16
"""Calls sent to a worker at once."""
MAX_QUEUED = 4096
"""Jobs waiting in the pool; beyond it `grade` waits."""
START_TIMEOUT_S = 60.0
MEMORY_LIMIT_BYTES = 8 << 30
"""One call that allocates more gets a MemoryError."""
MAX_GROWTH_BYTES = 1 << 30
"""A worker that has grown by more since it started is replaced."""


@dataclasses.dataclass(slots=True, kw_only=True)
class _Job:
    request: bytes
    verdict: asyncio.Future[Verdict]
    is_retry: bool = False


class RewardPool:
    """Runs the configured reward function in `config.num_workers` processes.

    Args:
        config: the function, its timeout and the number of workers.
        base_dir: folder of the run file, which the function's path is relative to.
        log_path: file that gets what the functions print; None drops it.
        memory_limit_bytes: see MEMORY_LIMIT_BYTES.
        max_growth_bytes: see MAX_GROWTH_BYTES.
        start_timeout_s: deadline for a worker to import the function's file.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        base_dir: Path,
        log_path: Path | None = None,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        max_growth_bytes: int = MAX_GROWTH_BYTES,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._config = config
        self._spec = WorkerSpec(
            fn=config.fn,
            base_dir=base_dir,
            start_timeout_s=start_timeout_s,
            memory_limit_bytes=memory_limit_bytes,
        )
        self._log_path = log_path
        self._max_growth_bytes = max_growth_bytes
        self._queue: asyncio.Queue[_Job] = asyncio.Queue(MAX_QUEUED)
        self._source = ""
        self._log = OutputLog()
        self._lanes: asyncio.Task[None] | None = None
        self._workers: set[WorkerProcess] = set()
        self._meter = CallMeter()

    async def start(self) -> None:
        """Start the first worker; the others follow in the background.

        Raises:
            HookError: the function is missing, has the wrong signature, or its file raises.
            RewardError: the file hangs, or ends the process, while it is imported.
        """
        self._log.open(self._log_path)
        try:
            first = await self._start_worker()
        except BaseException:
            self._log.close()
            raise
        self._lanes = asyncio.create_task(self._run_lanes(first), name="reward lanes")

    async def close(self) -> None:
        """End all workers and everything they started."""
        if self._lanes is not None:
            self._lanes.cancel()
            await asyncio.wait([self._lanes])
        await asyncio.gather(*(worker.close() for worker in self._workers))
        self._log.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def grade(self, samples: Sequence[Sample], prompt: Prompt) -> list[Verdict]:
        """One verdict for each sample, in order. Samples that were not generated to an end get a Failed.

        Raises:
            RewardError: workers cannot be started any more, or the pool is not running.
        """
        if self._lanes is None:
            raise RewardError(
                "the reward pool is not running: use `async with RewardPool(...)`, or await start() first"
            )
        work = asyncio.create_task(self._grade_all(samples, prompt))
        either: list[asyncio.Future[Any]] = [work, self._lanes]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise _failure(self._lanes)
            return work.result()
        finally:
            work.cancel()

    def metrics(self) -> Metrics:
        """Counts and latencies of the calls since the last time: ``reward/failures``, ``reward/latency_p99_s``, ..."""
        return self._meter.read()

    async def _grade_all(self, samples: Sequence[Sample], prompt: Prompt) -> list[Verdict]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._grade_one(sample, prompt)) for sample in samples]
        return [task.result() for task in tasks]

    async def _grade_one(self, sample: Sample, prompt: Prompt) -> Verdict:
        if sample.status in (Status.FAILED, Status.ABORTED):
            return Failed(kind="not_generated", detail=f"the sample is {sample.status}: there is no answer to judge")
        try:
            request = encode_input(reward_input(sample, prompt))
        except (TypeError, ValueError) as problem:
            return Failed(kind="bad_value", detail=f"the prompt's label or metadata: {problem}")
        job = _Job(request=request, verdict=asyncio.get_running_loop().create_future())
        await self._queue.put(job)
        return await job.verdict

    async def _run_lanes(self, first: WorkerProcess) -> None:
        async with asyncio.TaskGroup() as lanes:
            for index in range(self._config.num_workers):
                lanes.create_task(self._lane(first if index == 0 else None), name=f"reward lane {index}")

    async def _lane(self, worker: WorkerProcess | None) -> None:
        jobs: list[_Job] = []
        while True:
            if worker is None:
                worker = await self._start_worker()
            jobs = [job for job in jobs or await self._next_jobs() if not job.verdict.done()]
            jobs, is_usable = await self._serve(worker, jobs)
            if not is_usable:
                await worker.close()
                self._workers.discard(worker)
                worker = None

    async def _next_jobs(self) -> list[_Job]:
        jobs = [await self._queue.get()]
        share = min(MAX_BATCH - 1, self._queue.qsize() // self._config.num_workers)
        return jobs + [self._queue.get_nowait() for _ in range(share)]

    async def _serve(self, worker: WorkerProcess, jobs: list[_Job]) -> tuple[list[_Job], bool]:
        """Run `jobs` on `worker`. Returns the jobs still to do, and whether the worker can go on."""
        worker.send([job.request for job in jobs])
        again: list[_Job] = []
        rss_bytes = 0
        for position, job in enumerate(jobs):
            answer = await self._answer(worker)
            if isinstance(answer.verdict, Failed) and answer.verdict.retryable and not job.is_retry:
                again.append(dataclasses.replace(job, is_retry=True))
            else:
                self._settle(job, answer)
            if answer.worker_is_lost:
                return [*jobs[position + 1 :], *again], False
            rss_bytes = answer.rss_bytes
        return again, rss_bytes - worker.rss_bytes_at_start <= self._max_growth_bytes

    async def _answer(self, worker: WorkerProcess) -> Answer:
        try:
            return await worker.answer(timeout_s=self._config.timeout_s)
        except TimeoutError:
            limit_s = self._config.timeout_s
            detail = f"killed after reward.timeout_s = {limit_s:g} s; make the function faster, or raise the limit"
            return Answer(verdict=Failed(kind="timeout", detail=detail), seconds=limit_s, worker_is_lost=True)
        except WorkerDied as death:
            verdict = Failed(kind="worker_died", detail=str(death), retryable=True)
            return Answer(verdict=verdict, seconds=0.0, worker_is_lost=True)

    def _settle(self, job: _Job, answer: Answer) -> None:
        self._meter.record(answer.verdict, seconds=answer.seconds)
        if not job.verdict.done():
            job.verdict.set_result(answer.verdict)

    async def _start_worker(self) -> WorkerProcess:
        worker = await WorkerProcess.start(self._spec, on_output=self._log.write)
        self._workers.add(worker)
        if self._source not in ("", worker.source):
            raise RewardError(
                f'reward.fn = "{self._config.fn}": the file was changed during the run, so this worker would judge by '
                f"other rules than the others.\nUndo the change and start the same command again to continue; or start "
                f"again with it, knowing that rewards before and after differ."
            )
        self._source = worker.source
        return worker


def _failure(lanes: asyncio.Task[None]) -> BaseException:
    """Why the lanes ended, as one error."""
    if lanes.cancelled():
        return RewardError("the reward pool was closed while samples were being graded")
    error = lanes.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error or RewardError("the reward pool has no workers left")


def check_reward(config: RewardConfig, base_dir: Path, *, start_timeout_s: float = START_TIMEOUT_S) -> None:
    """Load the reward function in a worker of its own and end it again: before anything heavy starts.

    Not to be called from a running event loop; ``async with RewardPool(...)`` makes the same check there.

    Raises:
        HookError: the function is missing, has the wrong signature, or its file raises.
        RewardError: the file hangs, or ends the process, while it is imported.
    """

    async def start_and_close() -> None:
        one = config.model_copy(update={"num_workers": 1})
        async with RewardPool(one, base_dir=base_dir, start_timeout_s=start_timeout_s):
            pass

    asyncio.run(start_and_close())
