"""The buffer that a run file describes, for whoever opens it: a run, a service, or a command that looks into one."""

from __future__ import annotations

from buffer.intake import ModelLimits
from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.policy import Policy
from buffer.prompts.order import PromptOrder
from buffer.prompts.split import Split
from slime.config import RunConfig
from trainer.hf_config import read_model_config


def prompt_order(config: RunConfig, split: Split) -> PromptOrder:
    """The order in which a run visits its training prompts."""
    weights = [source.weight for source in config.data.train]
    return PromptOrder(*split.train, seed=config.seed, shuffle=config.data.shuffle, weights=weights)


def open_buffer(config: RunConfig, ledger: Ledger, order: PromptOrder, *, recover: bool) -> LocalBuffer:
    """The buffer of a run.

    Args:
        recover: see `LocalBuffer`.

    Raises:
        LedgerError: the ledger was begun with other prompts, or under another bound.
        ModelError: the model directory is no such thing.
    """
    model = read_model_config(config.model.path)
    policy = Policy(
        groups_per_step=config.rollout.prompts_per_step,
        num_steps=config.num_steps,
        max_staleness=config.buffer.max_staleness,
        oversample=config.buffer.oversample,
        wait_for_stragglers=config.buffer.stragglers == "wait",
    )
    return LocalBuffer(
        ledger,
        order,
        policy,
        pass_reward=config.eval.pass_reward,
        limits=ModelLimits(vocab_size=model.vocab_size, context_tokens=model.max_positions),
        stall_timeout_s=config.profile.engine.request_timeout_s + 60 * config.reward.timeout_s,
        recover=recover,
    )
