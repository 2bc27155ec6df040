"""SGLang's plugin entry point (group ``sglang.srt.plugins``): what slime changes inside engine processes.

SGLang calls `register` early in each of its processes. Everything goes through its HookRegistry:

* A weight load that slime's loader refuses answers "failed" with the reason; SGLang would let the scheduler die.
* The run's token stays out of the log, to which SGLang writes all its arguments.
* Where ``SLIME_SEEDED_SAMPLING=1`` (the launcher sets it on CPUs in deterministic mode), a request's `sampling_seed`
  is honoured. SGLang itself does so only under ``--enable-deterministic-inference``, which no CPU backend supports.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slime.errors import EngineError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SEEDED_SAMPLING = "SLIME_SEEDED_SAMPLING"
LOAD = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_tensor"
LOGGED_ARGUMENTS = "sglang.srt.entrypoints.engine._server_args_for_logging"
BATCH_INFO = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch"
SAMPLE = "sglang.srt.layers.sampler.multinomial_with_seed"


def register() -> None:
    """Register every hook this process needs; SGLang applies them."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in hooks().items():
        HookRegistry.register(target, hook, HookType.AROUND)


def hooks() -> dict[str, Callable[..., Any]]:
    """Target in SGLang → the function put around it."""
    always: dict[str, Callable[..., Any]] = {LOAD: answer_refused_loads, LOGGED_ARGUMENTS: hide_keys}
    seeded: dict[str, Callable[..., Any]] = {BATCH_INFO: keep_seeds, SAMPLE: sample_with_seed}
    return {**always, **(seeded if os.environ.get(SEEDED_SAMPLING) == "1" else {})}


def answer_refused_loads(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """Report a refused load to the caller of the update.

    Only tensor-parallel rank 0 answers the caller, so a refusal on another rank may not stay there: it ends the engine.
    """
    try:
        result: tuple[bool, str] = original(updater, *args, **kwargs)
    except EngineError as error:
        if updater.tp_rank != 0:
            raise
        logger.error("%s", error)
        return False, str(error)
    return result


def hide_keys(original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments SGLang logs, without its keys."""
    return {**original(*args, **kwargs), "api_key": "(hidden)", "admin_api_key": "(hidden)"}


def keep_seeds(original: Callable[..., Any], cls: Any, batch: Any, vocab_size: int) -> Any:
    """Carry the requests' seeds into the sampler. A batch has either a seed for every request or none."""
    import torch

    info = original(cls, batch, vocab_size)
    seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    if all(seed is not None for seed in seeds):
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=batch.device)
    return info


def sample_with_seed(
    _original: Callable[..., Any], logprobs_BV: torch.Tensor, seed_B: torch.Tensor, positions_B: torch.Tensor
) -> torch.Tensor:
    """Gumbel-max, ``argmax(logprob + gumbel(seed, position, token))``: an exact sample no other request influences.

    SGLang's own version draws the same way from a Triton hash, which needs a GPU. The 32-bit mixer is lowbias32
    (https://nullprogram.com/blog/2018/07/31/), run in int64 because torch lacks unsigned shifts.

    Returns:
        Token ids, shape [B, 1].
    """
    import torch

    def mix(h: torch.Tensor) -> torch.Tensor:
        h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return h ^ (h >> 16)

    tokens_V = torch.arange(logprobs_BV.shape[1], dtype=torch.int64, device=logprobs_BV.device)
    rows_B = mix(mix(seed_B.to(torch.int64) & 0xFFFFFFFF) ^ positions_B.view(-1).to(torch.int64))
    hashed_BV = mix(rows_B[:, None] ^ mix(tokens_V + 0x9E3779B9 & 0xFFFFFFFF)[None])
    uniform_BV = (hashed_BV.to(torch.float64) + 0.5) / 2.0**32
    return (logprobs_BV.to(torch.float64) - (-uniform_BV.log()).log()).argmax(-1, keepdim=True)
