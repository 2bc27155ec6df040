"""Start the processes of a run: engines and training ranks, in the bundles of a cluster."""

from __future__ import annotations

from pathlib import Path

from rollout.engine import SGLangEngine
from slime.cluster import Cluster
from slime.config import OptimizerConfig, Profile, RunConfig, TrainerConfig
from slime.errors import EngineError, TrainerError
from slime.remote import RemoteEngine, RemoteTrainer
from trainer.worker import TrainWorker, WorkerSpec


def spawn_engines(cluster: Cluster, config: RunConfig, *, log_dir: Path, token: str) -> list[RemoteEngine]:
    """One actor an engine, in bundles 0, 1, ...; `start` starts its server."""
    profile = config.profile
    engines = []
    for index in range(profile.engine.num_engines):
        actor = cluster.spawn(
            SGLangEngine,
            str(config.model.path),
            config=profile.engine,
            device=profile.device,
            threads=profile.threads_per_process,
            log_path=str(log_dir / f"engine_{index}.log"),
            token=token,
            index=index,
            bundle=index,
            name=f"engine {index}",
            error=EngineError,
            env=_env(profile),
        )
        engines.append(RemoteEngine(actor, start_timeout_s=profile.engine.start_timeout_s))
    return engines


async def spawn_trainer(cluster: Cluster, spec: WorkerSpec, *, profile: Profile) -> RemoteTrainer:
    """One actor a rank, in bundles 0, 1, ...; returns when every rank holds the model."""
    ranks = [
        cluster.spawn(
            TrainWorker,
            rank=rank,
            world_size=profile.trainer.num_ranks,
            spec=spec,
            bundle=rank,
            name=f"training rank {rank}",
            error=TrainerError,
            env=_env(profile),
        )
        for rank in range(profile.trainer.num_ranks)
    ]
    trainer = RemoteTrainer(ranks, step_timeout_s=profile.trainer.step_timeout_s)
    await trainer.start(await cluster.address_of(bundle=0))
    return trainer


def worker_spec(
    model_path: Path,
    *,
    profile: Profile,
    optimizer: OptimizerConfig,
    num_steps: int,
    seed: int,
    trainer: TrainerConfig | None = None,
    base_dir: Path = Path(),
) -> WorkerSpec:
    """What training ranks are told; without a `trainer` they fine-tune."""
    trainer = trainer or TrainerConfig()
    return WorkerSpec(
        model_path=model_path,
        optimizer=optimizer,
        num_updates=num_steps * trainer.updates_per_step,
        updates_per_step=trainer.updates_per_step,
        loss=trainer.loss.fn or trainer.loss,
        base_dir=base_dir,
        precision=profile.trainer.precision,
        recompute=profile.trainer.recompute,
        megatron=profile.trainer.megatron,
        device=profile.device,
        num_threads=profile.threads_per_process,
        seed=seed,
        distributed_timeout_s=profile.trainer.distributed_timeout_s,
    )


def _env(profile: Profile) -> dict[str, str]:
    """One thread pool of the profile's size, set before any library makes its own; no hub is asked for models.

    A profile for CPUs hides the devices of a machine that has some: libraries ask what there is, not what is wanted.
    """
    environment = {"OMP_NUM_THREADS": str(profile.threads_per_process), "HF_HUB_OFFLINE": "1"}
    return environment | ({"CUDA_VISIBLE_DEVICES": ""} if profile.device == "cpu" else {})
