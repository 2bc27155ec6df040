"""Everything about a run that can be wrong cheaply, checked before anything heavy starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buffer.order import PromptOrder
from buffer.split import Split, load_split
from rewards.pool import check_reward
from rollout.engine import choose_port
from rollout.engine_options import check_options
from slime.config import RunConfig
from slime.errors import ConfigError, ModelError
from slime.hooks import load_hook
from trainer.hf_config import HfConfig, read_model_config
from trainer.megatron_options import check_megatron_options

MAY_CHANGE = ("run_dir", "num_steps", "eval", "checkpoint", "profile", "hooks")
"""Keys that may differ when a run is continued; a change of any other would make it another run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the checks have read and loaded."""

    model: HfConfig
    split: Split
    order: PromptOrder
    generate: Callable[..., Any] | None
    keep: Callable[..., str] | None
    on_step: Callable[..., Any] | None


def check_run(config: RunConfig, *, base_dir: Path) -> Checked:
    """Read the model's description and the data, load the hooks, try the reward.

    Raises:
        SlimeError: the first thing that is wrong.
    """
    _check_continues(config)
    model = check_model(config.model.path, base_dir=base_dir)
    split = load_split(config.data)
    check_reward(config.reward, base_dir=base_dir)
    if config.trainer.loss.fn:
        load_hook(
            config.trainer.loss.fn,
            base_dir=base_dir,
            what="trainer.loss.fn",
            arguments=["logprobs", "entropy", "inputs"],
        )
    filter_hook = config.buffer.filter if config.buffer.filter not in ("all", "informative") else None

    def optional(spec: str | None, what: str, *arguments: str) -> Callable[..., Any] | None:
        return load_hook(spec, base_dir=base_dir, what=what, arguments=arguments) if spec else None

    checked = Checked(
        model=model,
        split=split,
        order=PromptOrder(split.train, seed=config.seed, shuffle=config.data.shuffle),
        generate=optional(config.rollout.generate, "rollout.generate", "prompt", "sample", "client"),
        keep=optional(filter_hook, "buffer.filter", "group"),
        on_step=optional(config.hooks.on_step, "hooks.on_step", "step", "metrics"),
    )
    engine = config.profile.engine
    check_options(engine.sglang)
    check_megatron_options(config.profile.trainer.megatron)
    if engine.base_port is not None and config.profile.placement.ray_address is None:
        for index in range(engine.num_engines):
            choose_port(engine.base_port, index=index)
    return checked


def check_model(path: Path, *, base_dir: Path) -> HfConfig:
    """Read a model directory's description.

    Raises:
        ModelError: it cannot be trained; names the script that makes it, where one lies beside the run file.
    """
    try:
        return read_model_config(path)
    except ModelError as error:
        script = base_dir / "prepare.py"
        if path.exists() or not script.is_file():
            raise
        raise ModelError(f"{error}\n{script} may make it: run `python {script}` first.") from None


def save_config(config: RunConfig) -> None:
    """Write the resolved configuration into the run directory."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.json").write_text(config.model_dump_json(indent=1))


def _check_continues(config: RunConfig) -> None:
    path = config.run_dir / "config.json"
    if not path.is_file():
        return
    before, now = _flat(json.loads(path.read_text())), _flat(json.loads(config.model_dump_json()))
    changes = [
        f"  {key}: {json.dumps(before.get(key))} -> {json.dumps(now.get(key))}"
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
    ]
    if changes:
        raise ConfigError(
            f"{config.run_dir} holds a run of another configuration:\n" + "\n".join(changes) + "\n"
            "Restore these keys to continue it, or choose another run_dir for a new run."
        )


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """``{"a": {"b": 1}}`` → ``{"a.b": 1}``, without what may change."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if not isinstance(node, dict):
            flat[prefix] = node
            return
        for key, value in node.items():
            walk(f"{prefix}.{key}".strip("."), value)

    walk("", {key: value for key, value in tree.items() if key not in MAY_CHANGE})
    return flat
