"""Small real things for tests: prompts, groups, tiny Hugging Face model directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slime.types import Group, Prompt, Sample, Score, TrainBatch
from trainer.advantage import group_advantages
from trainer.batch import build_batch

WORDS = ["<pad>", "<s>", "<e>", *map(str, range(-20, 61)), "+", "-", "=", ";", "think", "answer"]


def make_prompt(uid: str = "p0", *, text: str = "1 + 2 =", label: Any = "3") -> Prompt:
    return Prompt(uid=uid, text=text, label=label)


def make_sample(
    *,
    prompt_uid: str = "p0",
    index: int = 0,
    prompt_tokens: Sequence[int] = (5, 6, 7),
    response_tokens: Sequence[int] = (8, 9),
    logprobs: Sequence[float] | None = None,
    version: int = 0,
    reward: float | None = 1.0,
    temperature: float = 1.0,
) -> Sample:
    sample = Sample(
        prompt_uid=prompt_uid, index=index, rollout_id=f"{prompt_uid}/{index}", temperature=temperature, response="r"
    )
    sample.append(prompt_tokens)
    sample.append(
        response_tokens, logprobs=logprobs if logprobs is not None else [-1.0] * len(response_tokens), version=version
    )
    if reward is not None:
        sample.verdict = Score(value=reward)
    return sample


def make_group(rewards: Sequence[float] = (0.0, 1.0), *, uid: str = "p0", ordinal: int = 0, **sample: Any) -> Group:
    samples = [make_sample(prompt_uid=uid, index=i, reward=r, **sample) for i, r in enumerate(rewards)]
    return Group(prompt=make_prompt(uid), ordinal=ordinal, epoch=0, attempt=0, samples=samples)


def make_batch(groups: Sequence[Group], **options: Any) -> TrainBatch:
    """One update on one rank, in small micro-batches; `options` of `trainer.batch.build_batch` change that."""
    defaults = {
        "advantages": group_advantages,
        "aggregation": "sequence",
        "updates_per_step": 1,
        "num_ranks": 1,
        "tokens_per_microbatch": 64,
        "version": 0,
        "constant_tokens": 100,
    }
    return build_batch(groups, **{**defaults, **options})


def make_model(
    directory: Path, family: str = "qwen3", *, seed: int = 0, tie: bool = True, dtype: str = "bfloat16", **config: Any
) -> Path:
    """A tiny random Hugging Face directory (weights, config, whole-number tokenizer with a chat template)."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<e>", unk_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}"
    fast.save_pretrained(directory)
    shape = dict(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    if family == "qwen3":
        shape["head_dim"] = 32
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**{**shape, **config}))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 0.08)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory
