"""One training step on one rank: micro-batches in, updated weights and metrics out.

    per update:  micro-batches ─ forward ─ log-probs ─ loss ─ backward ─▶ summed gradients ─▶ clip ─▶ AdamW
                                                          (Megatron's schedule, over all ranks)

T positions of a packed row, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from slime.config import OptimizerConfig
from slime.errors import HookError, boundary
from slime.types import Float32, Metrics, MicroBatch
from trainer.logprobs import token_logprobs
from trainer.loss import LossFunction, LossInputs, TokenLoss
from trainer.measure import TOTAL, mismatch, over_trained_tokens, reduce_over_ranks
from trainer.model import PolicyModel, make_row
from trainer.optimizer import make_optimizer, make_scheduler, move_optimizer, wrap_data_parallel

Updates = Sequence[Sequence[MicroBatch]]


class TrainStep:
    """A model with its optimizer and learning-rate schedule.

    Args:
        model: with its weights loaded: the fp32 masters are copied from them here.
        num_updates: of the whole run; the schedule ends there.
    """

    def __init__(
        self,
        model: PolicyModel,
        *,
        config: OptimizerConfig,
        num_updates: int,
        updates_per_step: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.wrapped = wrap_data_parallel(model)
        self.optimizer = make_optimizer(self.wrapped, config=config)
        self.scheduler = make_scheduler(
            self.optimizer,
            config=config,
            num_updates=num_updates,
            warmup_updates=config.warmup_steps * updates_per_step,
        )
        self._device = device

    def train(self, updates: Updates, *, loss: LossFunction, compare_with_rollout: bool) -> Metrics:
        """Take one optimizer step for each update.

        With more than one, log-probs of the weights before the first are computed beforehand: the ratio's denominator.
        An update whose gradient is not finite is left out: weights and optimizer stay as they are, bit for bit.

        Returns:
            The same on every rank. Means over the trained tokens of the updates that were taken.
        """
        if len(updates) > 1:
            updates = [self._with_old_logprobs(micro_batches) for micro_batches in updates]
        sums: list[Mapping[str, Tensor]] = []
        grad_norms: list[float] = []
        for micro_batches in updates:
            measured = self._backward(micro_batches, loss=loss, compare_with_rollout=compare_with_rollout)
            grad_norm = self._update()
            if grad_norm is not None:
                grad_norms.append(grad_norm)
                sums.extend(measured)
        metrics = {"loss/skipped_updates": float(len(updates) - len(grad_norms)), "loss/lr": self._lr()}
        if not grad_norms:
            return metrics
        reduced = reduce_over_ranks(sums, group=parallel_state.get_data_parallel_group())
        reduced[TOTAL] /= len(grad_norms)
        return metrics | reduced | {"loss/grad_norm": sum(grad_norms) / len(grad_norms)}

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Float32]:
        """Log-prob of every target under the current weights, [T] for each micro-batch."""
        return [array.numpy() for array in self._run(micro_batches, self._forward_logprobs, forward_only=True)]

    def offload(self) -> None:
        """CUDA: weights and optimizer to the host, gradients away. Not yet run by us."""
        for buffer in self.wrapped.buffers:
            buffer.offload_to_cpu()
        move_optimizer(self.optimizer, torch.device("cpu"))
        torch.cuda.empty_cache()

    def onload(self) -> None:
        """Undo `offload`."""
        for buffer in self.wrapped.buffers:
            buffer.reload_from_cpu()
        move_optimizer(self.optimizer, self._device)

    def _with_old_logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        old = self.logprobs(micro_batches)
        return [replace(mb, old_logprobs=logprobs_T) for mb, logprobs_T in zip(micro_batches, old, strict=True)]

    def _backward(
        self, micro_batches: Sequence[MicroBatch], *, loss: LossFunction, compare_with_rollout: bool
    ) -> list[Mapping[str, Tensor]]:
        """Leave the gradient of ``sum(weights * loss)``, over all micro-batches and ranks, in the gradient buffers."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        forward = partial(self._forward_loss, loss=loss, compare_with_rollout=compare_with_rollout)
        return self._run(micro_batches, forward, forward_only=False)

    def _update(self) -> float | None:
        """Clip and step. Returns the gradient's norm before clipping, or None if it was not finite."""
        self.scheduler.step(1)
        taken, grad_norm, _ = self.optimizer.step()
        return float(grad_norm) if taken else None

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _run(
        self, micro_batches: Sequence[MicroBatch], forward: Callable[..., Any], *, forward_only: bool
    ) -> list[Any]:
        """Drive `forward` over the micro-batches by Megatron's schedule; returns what it reports for each."""
        reports: list[Any] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(micro_batches),
            model=self.wrapped,
            num_microbatches=len(micro_batches),
            seq_length=0,  # rows differ in length; only pipelines read it
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return reports

    def _forward_logprobs(self, rows: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[..., Tensor]]:
        logprobs_T, _ = self._forward(next(rows), model)
        return logprobs_T, lambda output, non_loss_data: output.cpu()

    def _forward_loss(
        self, rows: Iterator[MicroBatch], model: Any, *, loss: LossFunction, compare_with_rollout: bool
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        micro_batch = next(rows)
        logprobs_T, entropy_T = self._forward(micro_batch, model)
        inputs = self._inputs(micro_batch, current_T=logprobs_T.detach())

        def reduce(output_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss_T, measured = _token_loss(loss, output_T, entropy_T, inputs)
            if compare_with_rollout:
                reported_T = self._tensor(micro_batch.rollout_logprobs)
                measured = {**measured, **mismatch(inputs.old_logprobs, reported_T)}
            total = (inputs.weights * loss_T).sum()
            num_tokens = torch.zeros(
                (), dtype=torch.int, device=total.device
            )  # summed, then ignored: `sum_model_grads`
            return total, num_tokens, over_trained_tokens(measured, weights_T=inputs.weights, loss=total)

        return logprobs_T, reduce

    def _forward(self, micro_batch: MicroBatch, model: Any) -> tuple[Tensor, Tensor]:
        """Log-probs of the targets and entropies, fp32 [T]."""
        logits_1TV = model(
            self._tensor(micro_batch.tokens)[None],
            self._tensor(micro_batch.positions)[None],
            None,
            packed_seq_params=make_row(micro_batch.cu_seqlens, micro_batch.positions, device=self._device),
        )
        return token_logprobs(logits_1TV[0], self._tensor(micro_batch.targets), self._tensor(micro_batch.temperatures))

    def _inputs(self, micro_batch: MicroBatch, *, current_T: Tensor) -> LossInputs:
        old_T = current_T if micro_batch.old_logprobs is None else self._tensor(micro_batch.old_logprobs)
        rollout_T = self._tensor(micro_batch.rollout_logprobs)
        return LossInputs(
            weights=self._tensor(micro_batch.weights),
            advantages=self._tensor(micro_batch.advantages),
            rollout_logprobs=torch.where(rollout_T.isnan(), old_T, rollout_T),
            old_logprobs=old_T,
            cu_seqlens=self._tensor(micro_batch.cu_seqlens),
        )

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        # Copied: arrays out of Ray's object store are read-only, and torch's tensors cannot be.
        return torch.from_numpy(np.array(array)).to(self._device, non_blocking=True)


def _token_loss(loss: LossFunction, logprobs_T: Tensor, entropy_T: Tensor, inputs: LossInputs) -> TokenLoss:
    """Call the loss, which may be a user's, and see that it answers with one loss a position."""
    with boundary(HookError, "trainer.loss.fn"):
        loss_T, measured = loss(logprobs_T, entropy_T, inputs)
    if loss_T.shape != logprobs_T.shape:
        raise HookError(
            f"trainer.loss.fn returned a loss of shape {list(loss_T.shape)}, expected {list(logprobs_T.shape)}: return "
            "one loss a position (the weighted sum is taken for you), or remove the key to use the built-in loss"
        )
    return loss_T, measured
