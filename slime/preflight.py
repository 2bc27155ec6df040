"""Everything about a run that can be wrong cheaply, checked before anything heavy starts."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buffer.prompts.order import PromptOrder
from buffer.prompts.split import Split, load_split
from buffer.service.serve import listen
from rewards.pool import check_reward
from rollout.engine import reserve_port
from rollout.engine_options import check_options
from rollout.tokenizer import Tokenizer
from slime.buffering import prompt_order
from slime.config import Profile, RunConfig
from slime.errors import ConfigError, HookError, ModelError, boundary
from slime.grading import FILTERS
from slime.hooks import load_hook
from slime.protocols import AdvantageHook, FilterHook, GenerateHook, OnStepHook
from slime.types import Group
from trainer.advantage import make_advantage
from trainer.hf_config import HfConfig, read_model_config
from trainer.megatron_options import check_megatron_options

MAY_CHANGE = ("run_dir", "num_steps", "eval", "checkpoint", "profile", "hooks")
"""Keys that may differ when a run is continued; a change of any other would make it another run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the checks have read and loaded."""

    tokenizer: Tokenizer
    split: Split
    order: PromptOrder
    generate: GenerateHook | None
    filters: Mapping[str, FilterHook]
    """By the name or hook they are given as, in the order they are asked."""
    advantages: AdvantageHook
    on_step: OnStepHook | None


def check_run(config: RunConfig, *, base_dir: Path) -> Checked:
    """Read the model's description and the data, load the hooks, try the reward.

    Raises:
        SlimeError: the first thing that is wrong.
    """
    _check_continues(config)
    model = check_model(config.model.path, base_dir=base_dir)
    if config.rollout.max_response_tokens >= model.max_positions:
        raise ConfigError(
            f"rollout.max_response_tokens = {config.rollout.max_response_tokens} leaves no room for a prompt in the "
            f"model's context of {model.max_positions} tokens.\nLower it, or use a model with a longer context."
        )
    split = load_split(config.data, num_eval=config.eval.num_prompts)
    tokenizer = Tokenizer(str(config.model.path))
    for prompt in (*(prompts[0] for prompts in split.train), *split.eval[:1]):
        tokenizer.encode_prompt(prompt)
    check_reward(config.reward, base_dir=base_dir)
    if config.trainer.loss.fn:
        load_hook(
            config.trainer.loss.fn,
            base_dir=base_dir,
            what="trainer.loss.fn",
            arguments=["logprobs", "entropy", "inputs"],
        )

    def optional(spec: str | None, what: str, *arguments: str) -> Callable[..., Any] | None:
        return load_hook(spec, base_dir=base_dir, what=what, arguments=arguments) if spec else None

    checked = Checked(
        tokenizer=tokenizer,
        split=split,
        order=prompt_order(config, split),
        generate=optional(config.rollout.generate, "rollout.generate", "prompt", "sample", "client"),
        filters={name: _filter(name, base_dir=base_dir) for name in config.buffer.filters},
        advantages=_advantages(config, base_dir=base_dir),
        on_step=optional(config.hooks.on_step, "hooks.on_step", "step", "metrics"),
    )
    _check_called_plainly(checked)
    check_options(config.profile.engine.sglang)
    check_megatron_options(config.profile.trainer.megatron)
    _check_ports(config.profile)
    return checked


def _check_called_plainly(checked: Checked) -> None:
    for what, hook in (
        *(("buffer.filter", hook) for hook in checked.filters.values()),
        ("hooks.on_step", checked.on_step),
    ):
        if inspect.iscoroutinefunction(hook):
            raise HookError(f"{what} is an async function, and nothing awaits it.\nWrite it with def, or leave it out.")


def _check_ports(profile: Profile) -> None:
    """See that the ports a profile names on this machine are free."""
    if profile.buffer_port is not None:
        listen("127.0.0.1", profile.buffer_port).close()
    engine = profile.engine
    if engine.base_port is not None and profile.placement.ray_address is None:
        for index in range(engine.num_engines):
            reserve_port(engine.base_port, index=index).close()


def _filter(name: str, *, base_dir: Path) -> FilterHook:
    if name in FILTERS:
        return FILTERS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, FILTERS, n=1)
        raise ConfigError(
            f'buffer.filter = "{name}" is no built-in filter; there are {", ".join(FILTERS)}.'
            + (f" Did you mean {near[0]}?" if near else "")
            + '\nCorrect the name, or give a function of yours as "./file.py:name".'
        )
    return load_hook(name, base_dir=base_dir, what="buffer.filter", arguments=["group"])


def _advantages(config: RunConfig, *, base_dir: Path) -> AdvantageHook:
    options = config.trainer.advantage
    if options.fn is None:
        return make_advantage(options)
    hook = load_hook(options.fn, base_dir=base_dir, what="trainer.advantage.fn", arguments=["groups"])

    def advantages(groups: Sequence[Group]) -> list[list[float]]:
        with boundary(HookError, f"trainer.advantage.fn {options.fn}"):
            values: list[list[float]] = hook(groups)
            return values

    return advantages


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
    """Write the resolved configuration into the run directory, whose lock is held; whole or not at all.

    Raises:
        ConfigError: another start with another configuration came first.
    """
    _check_continues(config)
    unfinished = config.run_dir / "config.json.tmp"
    unfinished.write_text(config.model_dump_json(indent=1))
    unfinished.replace(config.run_dir / "config.json")


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
