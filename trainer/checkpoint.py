"""Save and load the state of training in Megatron's sharded format (``torch_dist``).

Every rank writes its part, and another number of ranks may read them. Making the directory a checkpoint that is either
whole or not there is `trainer.checkpoint_dir`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from slime.errors import CheckpointError
from trainer.optimizer import separate_step_counts

SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


class InProcessSave(torch_dist.TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's format, written by torch's own writer.

    Megatron's forks this process, threads and all, and waits for the children without a deadline; it also leaves a
    manager process behind where this one is killed.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's part; all ranks call it."""
        renamed, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        state_dict_saver.save(
            torch_dist.mcore_to_pyt_state_dict(renamed, False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_state(
    directory: Path, *, model: GPTModel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> None:
    """Write weights, optimizer, schedule and random state into the existing, empty `directory`. All ranks call it.

    Raises:
        CheckpointError: it could not be written.
    """
    state = _state(model, optimizer, scheduler, loading=False)
    try:
        dist_checkpointing.save(state, str(directory), InProcessSave("torch_dist", 1), content_metadata=SHARDING)
    except (OSError, RuntimeError, CheckpointException) as cause:
        raise CheckpointError(
            f"saving to {directory} failed: {_reason(cause)}. Free space on that disk, or move the run with run_dir"
        ) from cause


def load_state(
    directory: Path, *, model: GPTModel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> None:
    """Continue exactly from what `save_state` wrote. All ranks call it.

    Raises:
        CheckpointError: it cannot be read, or belongs to a model of another shape.
    """
    try:
        state = dist_checkpointing.load(_state(model, optimizer, scheduler, loading=True), str(directory))
    except (Exception, CheckpointException) as cause:  # validation and reading raise too many kinds to list
        raise CheckpointError(
            f"checkpoint {directory} does not load into this model: {_reason(cause)}. Continue with the model and "
            "trainer settings it was written with, or start a new run in another run_dir"
        ) from cause
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    separate_step_counts(optimizer)
    scheduler.load_state_dict(state["scheduler"])
    _set_random_state(state["random"])


def _reason(cause: BaseException) -> str:
    """One line; torch wraps what failed on each rank in an exception that prints their tracebacks."""
    first = next(iter(cause.failures.values()))[0] if isinstance(cause, CheckpointException) else cause
    return f"{type(first).__name__}: {first}"


def _state(
    model: GPTModel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, *, loading: bool
) -> dict[str, Any]:
    metadata = {**SHARDING, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = {"model": model.sharded_state_dict(metadata=metadata)}
    sharded["optimizer"] = optimizer.sharded_state_dict(sharded, is_loading=loading, metadata=metadata)
    return sharded if loading else sharded | {"scheduler": scheduler.state_dict(), "random": _random_state()}


def _random_state() -> dict[str, Any]:
    """Data-parallel ranks draw the same numbers, so one rank's state is everyone's."""
    state = {"torch": torch.get_rng_state(), "megatron": tensor_parallel.get_cuda_rng_tracker().get_states()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
