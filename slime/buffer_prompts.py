"""The prompt of an instance, from the data its run was begun with: the ledger has only its uid."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from buffer.prompts.split import load_split
from buffer.records import Instance
from slime.buffering import prompt_order
from slime.config import RunConfig
from slime.errors import DataError
from slime.types import Prompt


def prompt_of(run_dir: Path, instance: Instance) -> Prompt | None:
    """What the instance asks; None for a pushed one, and where the run's configuration or data are not at hand."""
    path = run_dir / "config.json"
    if instance.position is None or not path.is_file():
        return None
    try:
        config = RunConfig.model_validate_json(path.read_bytes())
        _, prompt = prompt_order(config, load_split(config.data, num_eval=0)).prompt_at(instance.position)
    except (ValidationError, DataError):
        return None
    return prompt if prompt.uid == instance.prompt_uid else None
