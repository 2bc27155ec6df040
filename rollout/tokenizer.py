"""Prompts to token ids and sampled ids to text, by the model directory's own tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slime.errors import ModelError
from slime.types import Message, Prompt


class Tokenizer:
    """The tokenizer of a Hugging Face directory, with the two facts about its model that generation needs.

    Raises:
        ModelError: the directory has no tokenizer that loads, or no config.json.
    """

    def __init__(self, model_path: str) -> None:
        import transformers  # takes seconds, so not at import

        self._path = Path(model_path)
        self._config = _read_json(self._path / "config.json")
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model_path)
        except (OSError, ValueError) as cause:
            raise ModelError(
                f"{model_path} has no tokenizer that loads ({cause}). Copy tokenizer.json and tokenizer_config.json "
                "into it, or point model.path at a complete directory"
            ) from cause

    @property
    def max_length(self) -> int:
        """Tokens of the model's context, prompt and response together.

        Raises:
            ModelError: config.json does not say.
        """
        length = self._config.get("max_position_embeddings")
        if not isinstance(length, int):
            raise ModelError(
                f"{self._path}/config.json has no max_position_embeddings: add it, or use a model that has it"
            )
        return length

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's own first, then config.json's and generation_config.json's."""
        ids: dict[int, None] = {}
        generation_path = self._path / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.exists() else {}
        for eos in (self._tokenizer.eos_token_id, self._config.get("eos_token_id"), generation.get("eos_token_id")):
            ids.update(dict.fromkeys([eos] if isinstance(eos, int) else eos or []))
        return tuple(ids)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids the policy continues: messages through the chat template, with its opening of the answer; or text.

        Raises:
            ModelError: the prompt has messages and the tokenizer no chat template.
        """
        if not prompt.messages:
            return self.encode(prompt.text, add_special_tokens=True)
        return self.encode_messages(prompt.messages, open_answer=True)

    def encode_messages(self, messages: Sequence[Message], *, open_answer: bool) -> list[int]:
        """Token ids of a conversation; with `open_answer` also those that open the policy's next answer.

        Raises:
            ModelError: the tokenizer has no chat template.
        """
        if self._tokenizer.chat_template is None:
            raise ModelError(
                f"{self._path} has no chat template, and got a prompt of messages. Use an instruction-tuned model, or "
                'give prompts as "text"'
            )
        ids: list[int] = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=open_answer, return_dict=False
        )
        return ids

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, without special tokens."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as cause:
        raise ModelError(
            f"{path} cannot be read ({cause}). Point model.path at a Hugging Face directory, or restore the file"
        ) from cause
    return content
