"""What engine tests share: a tiny model's engine, staged weights, and transformers' log-probs to compare with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
import xxhash
from safetensors.torch import load_file

from rollout.engine import SGLangEngine
from slime.config import EngineConfig
from slime.weights import ALIGNMENT_BYTES, StagedTensor, write_manifest

TOKEN = "token-of-the-tests"


def make_engine(model: Path, directory: Path, *, index: int = 0, **config: object) -> SGLangEngine:
    return SGLangEngine(
        str(model),
        config=EngineConfig.model_validate({"start_timeout_s": 270, "request_timeout_s": 120, **config}),
        device="cpu",
        threads=1,
        log_path=str(directory / f"engine-{index}.log"),
        token=TOKEN,
        index=index,
    )


def stage(tensors: dict[str, torch.Tensor], directory: Path) -> str:
    """Write `tensors` as a trainer would. Returns the manifest's path."""
    directory.mkdir()
    staged, blob = [], bytearray()
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        blob += b"\0" * (-len(blob) % ALIGNMENT_BYTES)
        staged.append(
            StagedTensor(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                offset=len(blob),
                num_bytes=len(raw),
                checksum=xxhash.xxh3_64_hexdigest(raw),
            )
        )
        blob += raw
    (directory / "weights.bin").write_bytes(blob)
    return str(write_manifest(directory, staged, len(blob)))


def wait_for_line(log: Path, text: str, *, timeout_s: float = 60) -> None:
    """Return when an engine has logged `text`."""
    deadline = time.monotonic() + timeout_s
    while text not in log.read_text(errors="replace"):
        assert time.monotonic() < deadline, f"no {text!r} within {timeout_s:g} s in:\n{log.read_text(errors='replace')}"
        time.sleep(0.05)


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


@torch.no_grad()
def reference_logprobs(
    model: Path, prompt: Sequence[int], response: Sequence[int], *, temperature: float = 1.0
) -> list[float]:
    """Log-probs of `response` after `prompt` by transformers, in float32 with the directory's BF16 weights."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    logits = network(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()


def worst(a: Sequence[float], b: Sequence[float]) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
