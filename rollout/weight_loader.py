"""Loads staged weights inside an engine (SGLang's ``--custom-weight-loader``), all of them or none believed.

SGLang's models skip names they do not know and never notice a parameter that nobody wrote. So the load is audited at
the level of torch's operators: every staged tensor must have been read, and every element of every parameter written.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slime.errors import EngineError, boundary
from slime.weights import Manifest, StagedTensor, read_manifest


def load_staged(model: Any, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Load the one manifest whose path is the only name in `named_tensors`; its tensor is an empty placeholder.

    Checksums are verified before the model is touched. A failure after that leaves it half loaded: the caller must not
    let it generate.

    Raises:
        EngineError: bytes differ from their checksum, or the staged tensors are not exactly the model's parameters.
    """
    ((path, _),) = named_tensors
    with boundary(EngineError, f"loading staged weights {path}"):
        manifest = read_manifest(Path(path))
        staged = map_tensors(manifest)
        with LoadAudit(model, manifest=manifest, staged=staged) as audit:
            model.load_weights(iter(staged.items()))
        audit.require_complete()


def map_tensors(manifest: Manifest) -> dict[str, torch.Tensor]:
    """Map ``weights.bin`` and return its tensors as views of one storage, each verified against its checksum.

    Raises:
        EngineError: the file is shorter than its manifest says, or bytes differ from their checksum.
    """
    if manifest.file.stat().st_size != manifest.num_bytes:
        raise EngineError(
            f"{manifest.file} has {manifest.file.stat().st_size} bytes, its manifest says {manifest.num_bytes}: "
            "staging was cut short. Stage the weights again, or give the staging directory more space"
        )
    mapped = torch.from_file(str(manifest.file), shared=False, size=manifest.num_bytes, dtype=torch.uint8)
    tensors = {tensor.name: _view(mapped, tensor) for tensor in manifest.tensors}
    if len(tensors) != len(manifest.tensors):
        raise EngineError(f"{manifest.file}: a tensor name is staged twice; stage every tensor once")
    return tensors


def _view(mapped: torch.Tensor, tensor: StagedTensor) -> torch.Tensor:
    raw = mapped[tensor.offset : tensor.offset + tensor.num_bytes]
    checksum = xxhash.xxh3_64_hexdigest(raw.numpy().data)
    if checksum != tensor.checksum:
        raise EngineError(
            f"{tensor.name} at byte {tensor.offset} of its staging file has checksum {checksum}, staged as "
            f"{tensor.checksum}: bytes changed after staging. Stage the weights again, or restart the engine from disk"
        )
    return raw.view(getattr(torch, tensor.dtype)).view(tensor.shape)


class LoadAudit(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    """Watches torch's operators: which staged tensors they read, and how much of each parameter they write."""

    def __init__(self, model: Any, *, manifest: Manifest, staged: dict[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = dict(model.named_parameters())
        self._tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
        ordered = sorted(manifest.tensors, key=lambda tensor: tensor.offset)
        self._names = [tensor.name for tensor in ordered]
        self._storage = next(iter(staged.values())).untyped_storage().data_ptr() if staged else 0
        self._starts = [self._storage + tensor.offset for tensor in ordered]
        self._read: set[str] = set()
        self._written: dict[int, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() == self._storage:
                self._read.add(self._names[bisect.bisect_right(self._starts, tensor.data_ptr()) - 1])
        if func._schema.is_mutable and isinstance(args[0], torch.Tensor):
            self._written[args[0].untyped_storage().data_ptr()] += args[0].numel()
        return func(*args, **kwargs)

    def require_complete(self) -> None:
        """Refuse a load that skipped something.

        A tied ``lm_head.weight`` may be staged and skipped: the embedding holds the same values.

        Raises:
            EngineError: names what was not used and what was not written.
        """
        unread = set(self._names) - self._read - ({"lm_head.weight"} if self._tied else set())
        unwritten = [
            name
            for name, parameter in self._parameters.items()
            if self._written[parameter.untyped_storage().data_ptr()] < parameter.numel()
        ]
        if unread or unwritten:
            raise EngineError(
                f"staged weights do not match the engine's model: staged but not used {_some(unread)}; "
                f"not or only partly staged {_some(unwritten)}. Stage every tensor under its Hugging Face name, or "
                "start the engine with the model that is trained"
            )


def _some(names: Sequence[str] | set[str]) -> str:
    shown = sorted(names)
    return f"{len(shown)}: {', '.join(shown[:5])}{', ...' if len(shown) > 5 else ''}" if shown else "none"
