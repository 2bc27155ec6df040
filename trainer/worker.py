"""The process of one training rank.

Importing this module is cheap: torch and Megatron are first imported where a worker is made.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slime.config import LossConfig, OptimizerConfig
from slime.hooks import load_hook
from slime.types import Float32, Metrics, MicroBatch

if TYPE_CHECKING:
    from trainer.loss import LossFunction


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What every rank of a run is told."""

    model_path: Path
    optimizer: OptimizerConfig
    num_updates: int
    """Optimizer updates of the whole run; the learning-rate schedule ends there."""
    updates_per_step: int = 1
    loss: LossConfig | str = field(default_factory=LossConfig)
    """The policy loss, or a hook relative to `base_dir`."""
    base_dir: Path = Path()
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: bool = False
    megatron: Mapping[str, Any] = field(default_factory=dict)
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int = 1
    seed: int = 0
    distributed_timeout_s: float = 600.0


class TrainWorker:
    """One rank. `listen` is for rank 0; every method but `stage_weights` and `export` must be called on all ranks at
    once, `start` first."""

    def __init__(self, *, rank: int, world_size: int, spec: WorkerSpec) -> None:
        self._rank = rank
        self._world_size = world_size
        self._spec = spec
        self._listener: socket.socket | None = None

    def listen(self, address: str) -> int:
        """Open the port that all ranks meet at, and return it: a free one that was only looked up may be gone."""
        self._listener = socket.create_server((address, 0))
        port: int = self._listener.getsockname()[1]
        return port

    def start(self, address: str, port: int) -> None:
        """Meet the other ranks and load the model. Not in the constructor, whose errors Ray would report as a death.

        Raises:
            TrainerError: the ranks did not find each other.
            ModelError: the model directory is not one that slime can train.
            HookError: the loss hook cannot be called.
        """
        import torch

        from trainer.model import build_model, initialize_distributed, local_device
        from trainer.step import TrainStep

        spec = self._spec
        torch.set_num_threads(spec.num_threads)
        device = local_device(spec.device)
        initialize_distributed(
            rank=self._rank,
            world_size=self._world_size,
            address=address,
            port=port,
            listener=self._listener,
            timeout_s=spec.distributed_timeout_s,
            seed=spec.seed,
            device=device,
        )
        model = build_model(
            spec.model_path,
            precision=spec.precision,
            recompute=spec.recompute,
            megatron_options=spec.megatron,
            device=device,
        )
        self._step = TrainStep(
            model,
            config=spec.optimizer,
            num_updates=spec.num_updates,
            updates_per_step=spec.updates_per_step,
            device=device,
        )
        self._loss = _load_loss(spec)

    def train_step(self, updates: Sequence[Sequence[MicroBatch]]) -> Metrics:
        """One RL step on this rank's micro-batches: ``updates[update][i]``. The metrics are the same on every rank."""
        metrics = self._step.train(updates, loss=self._loss, compare_with_rollout=True)
        return _named(metrics, "loss/policy")

    def sft_step(self, updates: Sequence[Sequence[MicroBatch]]) -> Metrics:
        """One step of supervised fine-tuning."""
        from trainer.loss import sft_loss

        metrics = self._step.train(updates, loss=sft_loss, compare_with_rollout=False)
        return _named(metrics, "loss/sft")

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Float32]:
        """Log-prob of every target under the current weights, [T] for each micro-batch."""
        return self._step.logprobs(micro_batches)

    def stage_weights(self, directory: str) -> str:
        """Write all weights where engines can map them. Rank 0 writes and returns the manifest's path, others ""."""
        from trainer.hf_io import named_hf_tensors
        from trainer.staging import stage

        return str(stage(named_hf_tensors(self._step.model), directory=Path(directory))) if self._rank == 0 else ""

    def export(self, directory: str) -> None:
        """Write a Hugging Face directory of the current weights (rank 0)."""
        from trainer.hf_io import named_hf_tensors, write_hf_directory

        if self._rank == 0:
            tensors = named_hf_tensors(self._step.model)
            write_hf_directory(Path(directory), tensors, source=self._spec.model_path)

    def save(self, directory: str) -> None:
        """Write weights, optimizer, schedule and random state into the existing, empty `directory`."""
        from trainer.checkpoint import save_state

        save_state(
            Path(directory), model=self._step.model, optimizer=self._step.optimizer, scheduler=self._step.scheduler
        )

    def load(self, directory: str) -> None:
        """Continue exactly from what `save` wrote."""
        from trainer.checkpoint import load_state

        load_state(
            Path(directory), model=self._step.model, optimizer=self._step.optimizer, scheduler=self._step.scheduler
        )

    def offload(self) -> None:
        """Give the device's memory to others: weights and optimizer to the host, gradients away. Nothing on a CPU."""
        if self._spec.device == "cuda":
            self._step.offload()

    def onload(self) -> None:
        """Take back what `offload` gave."""
        if self._spec.device == "cuda":
            self._step.onload()

    def close(self) -> None:
        """Leave the other ranks."""
        from megatron.core import parallel_state
        from torch import distributed

        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


def _load_loss(spec: WorkerSpec) -> LossFunction:
    from trainer.loss import make_loss

    if isinstance(spec.loss, LossConfig):
        return make_loss(spec.loss)
    arguments = ("logprobs", "entropy", "inputs")
    hook: LossFunction = load_hook(spec.loss, base_dir=spec.base_dir, what="trainer.loss.fn", arguments=arguments)
    return hook


def _named(metrics: Metrics, loss: str) -> Metrics:
    """Call the total by the loss it is of."""
    return {loss if name == "loss/total" else name: value for name, value in metrics.items()}
