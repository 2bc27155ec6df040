"""Start the processes of a run: engines and training ranks, in the bundles of a cluster."""

from __future__ import annotations

from pathlib import Path

from trainer.worker import TrainWorker, WorkerSpec

from rollout.engine import SGLangEngine
from slime.cluster import Cluster
from slime.config import Profile, RunConfig
from slime.errors import EngineError, TrainerError
from slime.remote import RemoteEngine, RemoteTrainer


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
    address, port = await cluster.free_address(bundle=0)
    ranks = [
        cluster.spawn(
            TrainWorker,
            rank=rank,
            world_size=profile.trainer.num_ranks,
            address=address,
            port=port,
            spec=spec,
            bundle=rank,
            name=f"training rank {rank}",
            error=TrainerError,
            env=_env(profile),
        )
        for rank in range(profile.trainer.num_ranks)
    ]
    trainer = RemoteTrainer(ranks, step_timeout_s=profile.trainer.step_timeout_s)
    await trainer.start()
    return trainer


def _env(profile: Profile) -> dict[str, str]:
    """One thread pool of the profile's size, set before any library makes its own; no hub is asked for models."""
    return {"OMP_NUM_THREADS": str(profile.threads_per_process), "HF_HUB_OFFLINE": "1"}
