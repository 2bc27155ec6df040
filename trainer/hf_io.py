"""Hugging Face weights in and out of a Megatron model, both by the table in `trainer.families`.

A tensor is trained in the run's precision and leaves in it: bf16 in, bf16 out, bit-equal. From a checkpoint in fp32 or
fp16, training in bf16 exports bf16, because those are the weights that were trained and that the engines ran; the
exported config.json says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slime.errors import ModelError
from trainer import families
from trainer.families import Layout
from trainer.hf_config import HfConfig

SHARD_BYTES = 5 * 10**9


def load_weights(model: torch.nn.Module, config: HfConfig) -> None:
    """Copy the weights in ``config.path`` into `model`, one parameter at a time.

    Raises:
        ModelError: a tied head that differs from the embedding.
    """
    targets = dict(model.named_parameters())
    with contextlib.ExitStack() as stack, torch.no_grad():
        files: dict[Path, Any] = {}

        def read(name: str) -> Tensor:
            file = config.tensors[name].file
            if file not in files:
                files[file] = stack.enter_context(safe_open(file, framework="pt"))
            tensor: Tensor = files[file].get_tensor(name)
            return tensor

        for parameter in config.parameters():
            target = targets.pop(_name_in(model, parameter.megatron))
            target.copy_(_join(parameter.layout, [read(name) for name in parameter.hf], config))
        if config.tied and families.HEAD in config.tensors:
            _check_tied_head(read(families.HEAD), read(families.EMBEDDING), config)
    if targets:
        raise ModelError(f"{config.path} gives no weights for {', '.join(targets)} of the Megatron model.")


def named_hf_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model of `trainer.model.build_model`, under their Hugging Face names and in their shapes.

    The tensors are detached, on the model's device, and may be views of its parameters. `model` may be wrapped
    (DistributedDataParallel). A tied head appears only if the directory the model came from holds it too.
    """
    while not isinstance(getattr(model, "hf_config", None), HfConfig):
        model = model.get_submodule("module")
    config = cast(HfConfig, model.hf_config)
    sources = dict(model.named_parameters())
    for parameter in config.parameters():
        tensor = sources[_name_in(model, parameter.megatron)].detach()
        yield from zip(parameter.hf, _split(parameter.layout, tensor, config), strict=True)
    if config.tied and families.HEAD in config.tensors:
        yield families.HEAD, sources[_name_in(model, "embedding.word_embeddings.weight")].detach()


def _name_in(model: torch.nn.Module, name: str) -> str:
    """`name` as the model has it: TransformerEngine keeps two norms inside the projections that follow them."""
    if not getattr(model, "norms_are_fused", False):
        return name
    for local, fused in families.FUSED_NORMS.items():
        if name.startswith("decoder.layers.") and name.endswith("." + local):
            return name.removesuffix(local) + fused
    return name


def _join(layout: Layout, tensors: list[Tensor], config: HfConfig) -> Tensor:
    """Hugging Face tensors → the Megatron parameter."""
    match layout:
        case Layout.COPY:
            return tensors[0]
        case Layout.GATE_UP:
            return torch.cat(tensors)
        case Layout.QKV:
            return torch.cat([x.view(config.num_kv_heads, -1, *x.shape[1:]) for x in tensors], dim=1).flatten(0, 1)


def _split(layout: Layout, tensor: Tensor, config: HfConfig) -> list[Tensor]:
    """The Megatron parameter → Hugging Face tensors; the inverse of `_join`."""
    match layout:
        case Layout.COPY:
            return [tensor]
        case Layout.GATE_UP:
            return list(tensor.chunk(2))
        case Layout.QKV:
            groups = tensor.view(config.num_kv_heads, -1, *tensor.shape[1:])
            queries = config.num_heads // config.num_kv_heads * config.head_dim
            parts = torch.split(groups, [queries, config.head_dim, config.head_dim], dim=1)
            return [x.flatten(0, 1) for x in parts]


def _check_tied_head(head: Tensor, embedding: Tensor, config: HfConfig) -> None:
    if not torch.equal(head, embedding):
        raise ModelError(
            f"{config.path}: tie_word_embeddings is true, but {families.HEAD} differs from {families.EMBEDDING}. "
            f"Set tie_word_embeddings to false to train both, or remove {families.HEAD} from the weights."
        )


def write_hf_directory(
    path: Path, tensors: Iterable[tuple[str, Tensor]], *, source: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a Hugging Face directory with `tensors`, and with config, tokenizer and the like copied from `source`.

    The directory appears whole or not at all: it is written beside `path` and renamed. Weights go into files of at
    most `shard_bytes`, or one tensor each.

    Raises:
        ModelError: `path` exists, or the disk refuses.
    """
    path = Path(path)
    if path.exists():
        raise ModelError(f"{path} exists already. Remove it, or export to another directory.")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        dtype = _write_shards(partial, tensors, shard_bytes=shard_bytes)
        _copy_companions(Path(source), partial, dtype=dtype)
        _sync([*partial.iterdir(), partial])
        partial.rename(path)
        _sync([path.parent])
    except (OSError, SafetensorError) as cause:
        raise ModelError(f"{path} could not be written: {cause}. Free some space, or export elsewhere.") from cause
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int) -> torch.dtype:
    """Write the weights, with an index if they take several files; returns their dtype."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    num_bytes = total_bytes = 0
    dtype = torch.float32

    def flush() -> None:
        nonlocal num_bytes
        save_file(pending, directory / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()
        num_bytes = 0

    for name, tensor in tensors:
        if pending and num_bytes + tensor.nbytes > shard_bytes:
            flush()
        # A copy, because safetensors refuses tensors that share memory and a tied head does.
        pending[name] = tensor.to("cpu", copy=True).contiguous()
        num_bytes, total_bytes, dtype = num_bytes + tensor.nbytes, total_bytes + tensor.nbytes, tensor.dtype
    flush()
    _name_shards(directory, shards, total_bytes=total_bytes)
    return dtype


def _name_shards(directory: Path, shards: list[list[str]], *, total_bytes: int) -> None:
    """Give the shards their final names, which say how many there are."""
    if len(shards) == 1:
        (directory / "shard-0.safetensors").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{i}.safetensors").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _copy_companions(source: Path, directory: Path, *, dtype: torch.dtype) -> None:
    """Copy every file that is not weights; config.json gets the dtype of the weights written."""
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".gguf")):
            shutil.copyfile(file, directory / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    name = str(dtype).removeprefix("torch.")
    if config.get(key) != name:
        (directory / "config.json").write_text(json.dumps(config | {key: name}, indent=2) + "\n", encoding="utf-8")


def _sync(paths: Iterable[Path]) -> None:
    """Wait until files and directories are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
