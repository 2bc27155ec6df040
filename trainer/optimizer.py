"""Megatron's data-parallel wrapper, distributed AdamW and learning-rate schedule, for a loss that is a plain sum.

Two places in Megatron scale gradients by default. With `calculate_per_token_loss` DistributedDataParallel does not
divide by the number of ranks, and the schedule does not divide by micro-batches or tokens; `sum_model_grads` keeps the
end of the backward pass from dividing by the number of tokens. What is left is the sum over ranks and micro-batches.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from slime.config import OptimizerConfig


def sum_model_grads(model: list[Any], num_tokens: Any = None, **options: Any) -> None:
    """Megatron's `finalize_model_grads` without its division by `num_tokens`."""
    finalize_model_grads(model, None, **options)


def wrap_data_parallel(model: GPTModel) -> DistributedDataParallel:
    """Give `model` contiguous parameter and fp32 gradient buffers, summed over the data-parallel ranks."""
    model.config.calculate_per_token_loss = True
    model.config.finalize_model_grads_func = sum_model_grads
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(config=model.config, ddp_config=ddp_config, module=model)
    model.config.no_sync_func = wrapped.no_sync
    return wrapped


def make_optimizer(model: DistributedDataParallel, *, config: OptimizerConfig) -> MegatronOptimizer:
    """AdamW over fp32 masters, sharded over the data-parallel ranks. The masters are copied from the weights here.

    The constant loss scale of 1 switches on Megatron's check for gradients that are not finite: `step` then leaves
    weights and moments alone and says so.
    """
    dtype = model.config.params_dtype
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.lr * config.min_lr_ratio,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            loss_scale=1.0,
        ),
        [model],
    )
    if not HAVE_APEX_OR_TE:
        for part in optimizer.chained_optimizers:
            _complete_torch_adamw(part)
    return optimizer


def make_scheduler(
    optimizer: MegatronOptimizer, *, config: OptimizerConfig, num_updates: int, warmup_updates: int
) -> OptimizerParamScheduler:
    """Warm-up from 0, then decay to ``lr * min_lr_ratio`` at update `num_updates`.

    Step it before each update, so that the first has a learning rate above 0 and the last has the final one.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr * config.min_lr_ratio,
        lr_warmup_steps=warmup_updates,
        lr_decay_steps=max(num_updates, warmup_updates + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=num_updates,
        wd_incr_style="constant",
        # Only the position comes from a checkpoint: a run that is continued with more steps decays over all of them.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def separate_step_counts(optimizer: MegatronOptimizer) -> None:
    """Call after loading: Megatron gives all parameters one `step` tensor, which torch's AdamW counts up for each."""
    if HAVE_APEX_OR_TE:
        return
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def move_optimizer(optimizer: MegatronOptimizer, device: torch.device) -> None:
    """Move moments and masters; in fp32 the masters are views of the model's own buffer and stay with it."""
    for part in optimizer.chained_optimizers:
        masters = [p for group in part.optimizer.param_groups for p in group["params"]] if part.config.bf16 else []
        for master in masters:
            master.data = master.data.to(device)
        for state in part.optimizer.state.values():
            state |= {name: state[name].to(device) for name in ("exp_avg", "exp_avg_sq")}


def _complete_torch_adamw(optimizer: DistributedOptimizer) -> None:
    """What megatron-core 0.16.1 leaves out where torch's AdamW stands in for TransformerEngine's or Apex's."""
    # Saving and loading read the state of an optimizer that may not have taken a step yet.
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    # Loading asks for `step` among a parameter's tensors, where saving has not put it.
    set_states = optimizer._set_main_param_and_optimizer_states

    def set_states_and_step(model_parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[model_parameter]
        main_parameter = optimizer.optimizer.param_groups[group]["params"][order]
        set_states(model_parameter, {"step": optimizer.optimizer.state[main_parameter]["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = set_states_and_step
