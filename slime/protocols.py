"""The seams of a run. tests/contracts runs one suite over every implementation of a seam, the fake included."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from slime.types import Group, Lease, Metrics, Prompt, Sample, TrainBatch


class RolloutEngine(Protocol):
    """One inference engine: a server that generates and whose weights can be replaced."""

    async def start(self) -> str:
        """Start and wait until healthy. Returns the base URL that generation requests go to.

        Raises:
            EngineError: it did not become healthy before its deadline; the message ends with the engine's last lines.
        """
        ...

    async def pause(self) -> None:
        """Stop stepping; requests in flight keep their tokens and wait."""
        ...

    async def resume(self) -> None:
        """Continue after `pause`."""
        ...

    async def offload(self) -> None:
        """Give device memory back (weights and KV cache). Nothing to give on a CPU."""
        ...

    async def onload(self, *, what: str) -> None:
        """Take device memory back: ``"weights"`` before a publish, ``"kv_cache"`` before generation."""
        ...

    async def load_weights(self, manifest: str, *, version: int) -> None:
        """Load every tensor the staged `manifest` names, verify checksums, and answer as `version` from then on.

        The engine is paused by the caller.

        Raises:
            EngineError: something did not load; the engine must then not be resumed.
        """
        ...

    async def close(self) -> None:
        """End the server and everything it started."""
        ...


class Trainer(Protocol):
    """The model under training, over all its ranks."""

    @property
    def version(self) -> int:
        """Number of training steps taken: the version of the weights."""
        ...

    async def train_step(self, batch: TrainBatch) -> Metrics: ...

    async def stage_weights(self, directory: str) -> str:
        """Write all weights, under their Hugging Face names, where engines can map them. Returns the manifest."""
        ...

    async def offload(self) -> None: ...

    async def onload(self) -> None: ...

    async def save(self, directory: str) -> None:
        """Write weights, optimizer, scheduler and RNG state into the new, empty `directory`."""
        ...

    async def load(self, directory: str, *, version: int) -> None:
        """Continue from a saved state; `version` is the number of steps it had taken."""
        ...

    async def export(self, directory: str) -> None:
        """Write a Hugging Face directory of the current weights."""
        ...

    async def close(self) -> None: ...


class Publisher(Protocol):
    """Moves the trainer's weights into the engines."""

    async def publish(self, version: int) -> Metrics:
        """All engines answer as `version` afterwards, or the call raises."""
        ...


class Placement(Protocol):
    """Who holds the devices when."""

    def training(self) -> AbstractAsyncContextManager[None]: ...

    def publishing(self) -> AbstractAsyncContextManager[None]: ...


class Buffer(Protocol):
    """Joins rollouts and training: decides what may be generated and what is trained, and records every fate."""

    async def admit(self) -> Lease:
        """Wait until the staleness bound allows one more group, and lease the next prompt instance."""
        ...

    async def generated(self, lease: Lease) -> bool:
        """All samples are there and go to be graded. False when that is old news, which is recorded as such."""
        ...

    async def put(self, lease: Lease, group: Group, *, keep: bool, reason: str = "") -> None:
        """Hand in a graded group, to be trained if `keep`, else dropped on record for `reason`."""
        ...

    async def drop(self, lease: Lease, *, reason: str) -> bool:
        """The instance yields nothing: record why. Its place is given to another prompt. False as in `generated`."""
        ...

    async def requeue(self, lease: Lease, *, reason: str, partial: Group | None = None) -> None:
        """This attempt failed for no fault of the prompt: issue the instance again, beginning with `partial`."""
        ...

    async def take(self, num_groups: int, *, step: int) -> list[Group]:
        """Wait for `num_groups` groups and pack them into `step`, in order of issue."""
        ...

    async def published(self, version: int) -> None:
        """Engines now answer as `version`: admission may go on."""
        ...

    async def commit(self, step: int, *, checkpoint: str, state: dict[str, Any]) -> None:
        """One atomic, durable transaction: everything packed up to `step` is committed and `checkpoint` is current."""
        ...


# Hooks: functions of the user's, given as "./file.py:name" or "package.module:name".


class GenerateHook(Protocol):
    """Fill one sample of a prompt. The default is one turn."""

    async def __call__(self, prompt: Prompt, sample: Sample, client: Any) -> None: ...


class FilterHook(Protocol):
    """Return "" to keep a graded group, or the reason to drop it."""

    def __call__(self, group: Group) -> str: ...


class AdvantageHook(Protocol):
    """One advantage for each sample of each group, from their verdicts."""

    def __call__(self, groups: Sequence[Group]) -> list[list[float]]: ...


class OnStepHook(Protocol):
    """Called after every training step."""

    def __call__(self, step: int, metrics: Metrics) -> None: ...
