"""Real training ranks in child processes, and what tests ask of them."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from slime.types import MicroBatch
from trainer.worker import TrainWorker, WorkerSpec

ANSWER_TIMEOUT_S = 120.0


class Ranks:
    """Child processes, each with at most one worker; imports are paid once for all tests that share them."""

    def __init__(self, num_processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._world_size = 0

    def start(self, spec: WorkerSpec, *, world_size: int = 1) -> None:
        """Make fresh workers in the first `world_size` processes."""
        if self._world_size:
            self.call(TrainWorker.close)
        self._world_size = world_size
        workers = [{"rank": rank, "world_size": world_size, "spec": spec} for rank in range(world_size)]
        self._exchange([(TrainWorker, (), options) for options in workers])
        (port,) = self._exchange([(TrainWorker.listen, ("127.0.0.1",), {})])
        self.call(TrainWorker.start, "127.0.0.1", port)

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(worker, *args)`` on every rank."""
        return self._exchange([(function, args, {})] * self._world_size)

    def each(self, function: Callable[..., Any], work: Sequence[Any]) -> list[Any]:
        """``function(worker, work[rank])`` on every rank."""
        return self._exchange([(function, (item,), {}) for item in work])

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()
            process.join()

    def _exchange(self, requests: Sequence[Any]) -> list[Any]:
        for pipe, request in zip(self._pipes, requests, strict=False):
            pipe.send(request)
        answers = [self._receive(pipe) for pipe in self._pipes[: len(requests)]]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    @staticmethod
    def _receive(pipe: Connection) -> Any:
        if not pipe.poll(ANSWER_TIMEOUT_S):
            raise TimeoutError("a training rank did not answer")
        return pipe.recv()


def _serve(pipe: Connection) -> None:
    worker: TrainWorker | None = None
    while True:
        try:
            function, args, options = pipe.recv()
        except EOFError:
            return
        try:
            if function is TrainWorker:
                worker, answer = TrainWorker(**options), None
            else:
                answer = function(worker, *args)
        except BaseException as failure:
            answer = failure
        pipe.send(answer)


def weights(worker: TrainWorker) -> dict[str, np.ndarray]:
    """All weights by their Hugging Face names, as the bits of their dtype."""
    import torch

    from trainer.hf_io import named_hf_tensors

    bits = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
    return {name: t.contiguous().view(bits[t.dtype]).numpy().copy() for name, t in named_hf_tensors(worker._step.model)}


def optimizer_state(worker: TrainWorker) -> list[np.ndarray]:
    """Masters, moments and step counts of this rank's shards."""
    (part,) = worker._step.optimizer.chained_optimizers
    masters = [p for group in part.optimizer.param_groups for p in group["params"]]
    tensors = [t for p in masters for t in (p.detach(), *(v for _, v in sorted(part.optimizer.state[p].items())))]
    return [t.float().numpy().copy() for t in tensors]


def gradients(worker: TrainWorker, micro_batches: list[MicroBatch]) -> tuple[float, dict[str, np.ndarray]]:
    """Policy loss, and its gradient by Hugging Face names. One rank only: with more, each holds a part of the sum."""
    from trainer.hf_io import named_hf_tensors

    step = worker._step
    reports = step._backward(micro_batches, loss=worker._loss, compare_with_rollout=True)
    kept = {p: p.data for p in step.model.parameters()}
    try:
        for p in kept:
            p.data = p.main_grad
        named = {name: tensor.numpy().copy() for name, tensor in named_hf_tensors(step.model)}
    finally:
        for p, data in kept.items():
            p.data = data
    return float(sum(report["loss/total"] for report in reports)), named


def with_old_logprobs(micro_batches: Sequence[MicroBatch], *, offset: float) -> list[MicroBatch]:
    """Old log-probs that are the rollout's plus an offset: ratios on both sides of the clip."""
    return [
        replace(mb, old_logprobs=mb.rollout_logprobs + np.float32(offset) * (mb.weights > 0)) for mb in micro_batches
    ]


def save_to_a_full_disk(worker: TrainWorker, directory: str) -> None:
    """Save where no file may grow beyond a few kilobytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        worker.save(directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
