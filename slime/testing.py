"""Hand-written fakes of every seam, for testing hooks and loops without an engine or a model.

Each passes the same contract suite as the real part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from slime.errors import CheckpointError, EngineError
from slime.types import Group, Lease, Metrics, Sample, TrainBatch
from slime.weights import read_manifest, write_manifest


class FakeEngine:
    """A RolloutEngine without a server; `calls` tells what was asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.version = 0
        self.paused = False
        self._update_is_open = False

    async def start(self) -> str:
        self.calls.append("start")
        return "http://127.0.0.1:0"

    async def pause(self) -> None:
        self.calls.append("pause")
        self.paused = True

    async def resume(self) -> None:
        if self._update_is_open:
            raise EngineError("the fake engine holds part of a weight update; load good weights first, or close it")
        self.calls.append("resume")
        self.paused = False

    async def offload(self) -> None:
        self.calls.append("offload")

    async def onload(self, *, what: str) -> None:
        if what not in ("weights", "kv_cache"):
            raise ValueError(f"onload what={what!r}: expected weights or kv_cache")
        self.calls.append(f"onload {what}")

    async def load_weights(self, manifest: str, *, version: int) -> None:
        if not self.paused:
            raise EngineError("load_weights needs a paused engine; call pause first")
        self._update_is_open = True
        if not Path(manifest).is_file():
            raise EngineError(f"{manifest}: there is no such manifest; stage the weights first, or check the path")
        read_manifest(Path(manifest))
        self._update_is_open = False
        self.version = version

    async def close(self) -> None:
        self.calls.append("close")


class FakeTrainer:
    """A Trainer without a model: its weights are the number of steps it took and a digest of all it was trained on."""

    def __init__(self) -> None:
        self.version = 0
        self.weights = ""
        self.batches: list[TrainBatch] = []

    async def train_step(self, batch: TrainBatch) -> Metrics:
        self.version += 1
        self.weights = _digest(self.weights, batch)
        self.batches.append(batch)
        return {"loss/policy": 0.0} | batch.metrics

    async def stage_weights(self, directory: str) -> str:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "weights.bin").write_bytes(b"")
        return str(write_manifest(Path(directory), [], 0))

    async def offload(self) -> None: ...

    async def onload(self) -> None: ...

    async def save(self, directory: str) -> None:
        state = {"version": self.version, "weights": self.weights}
        (Path(directory) / "state.json").write_text(json.dumps(state))

    async def load(self, directory: str, *, version: int) -> None:
        saved = json.loads((Path(directory) / "state.json").read_text())
        if saved["version"] != version:
            raise CheckpointError(f"{directory} holds step {saved['version']}, not {version}")
        self.version, self.weights = version, saved["weights"]

    async def export(self, directory: str) -> None:
        Path(directory).mkdir()

    async def close(self) -> None: ...


def _digest(before: str, batch: TrainBatch) -> str:
    digest = hashlib.blake2b(before.encode(), digest_size=16)
    for ranks in batch.updates:
        for microbatch in (microbatch for rank in ranks for microbatch in rank):
            for array in (microbatch.tokens, microbatch.weights, microbatch.advantages, microbatch.rollout_logprobs):
                digest.update(array.tobytes())
    return digest.hexdigest()


class FakePlacement:
    """A Placement that only remembers whose turn it was."""

    def __init__(self) -> None:
        self.turns: list[str] = []

    @asynccontextmanager
    async def training(self) -> AsyncIterator[None]:
        self.turns.append("training")
        yield

    @asynccontextmanager
    async def publishing(self) -> AsyncIterator[None]:
        self.turns.append("publishing")
        yield


class FakePublisher:
    """A Publisher that remembers the versions."""

    def __init__(self) -> None:
        self.versions: list[int] = []

    async def publish(self, version: int) -> Metrics:
        self.versions.append(version)
        return {"publish/bytes": 0.0}


class FakeRollout:
    """Answers every prompt with `num_samples` samples of two tokens, at the version `version()` tells."""

    def __init__(self, *, num_samples: int, version: Callable[[], int]) -> None:
        self._num_samples = num_samples
        self._version = version

    async def generate(self, lease: Lease) -> Group:
        samples = []
        for index in range(self._num_samples):
            sample = Sample(
                prompt_uid=lease.prompt.uid, index=index, rollout_id=f"{lease.ordinal}/{index}", response=str(index)
            )
            sample.append([1, 2, 3])
            sample.append([4, 5], logprobs=[-0.5, -0.5], version=self._version())
            samples.append(sample)
        return Group(
            prompt=lease.prompt, ordinal=lease.ordinal, epoch=lease.epoch, attempt=lease.attempt, samples=samples
        )
