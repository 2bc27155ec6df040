"""docs/configuration.md, generated from the configuration: ``python -m slime.config_docs > docs/configuration.md``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from slime.config import Profile, RunConfig, SftRunConfig

HEAD = """\
# Configuration

Generated from `slime/config.py` by `python -m slime.config_docs`; a test keeps it so.

A **run file** says what is learned. A **profile** says where it runs: `--profile cpu`, `1gpu`, `8gpu` or a TOML file of
your own; by default the shipped one that fits the machine. `--set KEY=VALUE` overrides one key of either (a profile's
keys begin with `profile.`). Unknown keys are errors. Paths in a file are relative to it, except `run_dir`, which is
relative to where the command is given.
"""


def render() -> str:
    """The whole page."""
    parts = [HEAD, "## The run file of `slime train`\n", *_tables(RunConfig, "")]
    parts += ["## The run file of `slime sft`\n", *_tables(SftRunConfig, "", only=("seed", "model", "sft"))]
    parts += ["## A profile\n", *_tables(Profile, "")]
    return "\n".join(parts)


def _tables(model: type[BaseModel], prefix: str, *, only: tuple[str, ...] = ()) -> Iterator[str]:
    fields = {name: field for name, field in model.model_fields.items() if not only or name in only}
    rows = [_row(name, field) for name, field in fields.items() if not _is_table(field)]
    if rows:
        heading = [f"### `[{prefix}]`\n"] if prefix else []
        yield "\n".join([*heading, "| key | type | default | |", "|---|---|---|---|", *rows, ""])
    for name, field in fields.items():
        if _is_table(field) and name != "profile":
            yield from _tables(field.annotation, f"{prefix}.{name}".strip("."))  # type: ignore[arg-type]
        for element in get_args(field.annotation):
            if isinstance(element, type) and issubclass(element, BaseModel):
                yield from _tables(element, f"[{prefix}.{name}]")


def _is_table(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.default is PydanticUndefined else f"`{_toml(field.default)}`"
    about = (field.description or "").replace("``", "`").replace("|", "\\|").replace("\n", " ")
    return f"| `{name}` | {_type(field.annotation)} | {default} | {about} |"


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    options = [option for option in get_args(annotation) if option is not type(None)]
    if all(isinstance(option, str) for option in options) and options:
        return " or ".join(f'`"{option}"`' for option in options)
    if any(isinstance(option, type) and issubclass(option, BaseModel) for option in options):
        return "path or tables"
    origin = get_origin(annotation)
    if origin in (tuple, list, dict):
        return str(origin.__name__)
    if options:
        return " or ".join(_type(option) for option in options)
    return "path" if annotation.__name__ == "Path" else str(annotation.__name__)


if __name__ == "__main__":
    print(render(), end="")
