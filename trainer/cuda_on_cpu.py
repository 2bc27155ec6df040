"""What megatron.core sees as `torch.cuda` on a machine without CUDA: one device, the CPU, where everything is in order.

Only `trainer.megatron_cpu` hands this module out. The names are `torch.cuda`'s.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

FloatTensor, HalfTensor, BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor
OutOfMemoryError, CUDAGraph, amp = torch.cuda.OutOfMemoryError, torch.cuda.CUDAGraph, torch.cuda.amp
nvtx = None
device = contextlib.nullcontext
random = sys.modules[__name__]
"""``torch.cuda.random`` holds the generator functions below."""

_CPU = torch.device("cpu")
default_generators = {_CPU: torch.default_generator}


class Stream:
    """A stream or an event. On a CPU a call returns when its work is done: recording and waiting do nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Callable[..., Stream]:
        return lambda *args, **kwargs: self


Event = Stream


def is_available() -> bool:
    return False


def current_device() -> torch.device:
    return _CPU


def device_count() -> int:
    return 1


def set_device(device: Any) -> None:
    pass


def synchronize(device: Any = None) -> None:
    pass


def empty_cache() -> None:
    pass


def stream(stream: Any) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def current_stream(device: Any = None) -> Stream:
    return Stream()


default_stream = current_stream


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def _lazy_init() -> None:
    pass


def _lazy_call(callable: Callable[[], None], **kwargs: Any) -> None:
    """torch queues the call until CUDA is initialised, which here is for ever."""
    callable()
