"""Read a run file and a profile, apply --set, and report every mistake with its file, key, and two ways out."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from slime.config import Profile, RunConfig, SftRunConfig
from slime.errors import ConfigError

Config = TypeVar("Config", RunConfig, SftRunConfig)
Keys = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One place a key can be written in."""

    name: str
    text: str
    values: dict[str, Any]
    prefix: Keys = ()
    """Where its tables hang in the configuration: a profile's are under ``profile``."""


def load_config(
    path: Path, config: type[Config], *, profile: str | None = None, assignments: Sequence[str] = ()
) -> Config:
    """The configuration of one run.

    Args:
        path: the run file.
        config: RunConfig or SftRunConfig.
        profile: a shipped profile's name, a TOML file, or None for the one that fits this machine.
        assignments: ``a.b=value`` lines that override both files.

    Raises:
        ConfigError: naming file, line and key, what was got, and two ways out.
    """
    task = _read(path)
    if "profile" in task.values:
        raise ConfigError(
            f"{task.name}: [profile] does not belong in a run file, which says what is learned and not where.\n"
            f"Put it into a file of its own and run with --profile FILE, or choose a shipped one: {_shipped()}"
        )
    where = _profile_source(profile)
    overrides: list[Source] = [_assignment(line) for line in assignments]
    merged: dict[str, Any] = {"profile": where.values}
    for source in (task, *overrides):
        merged = _merge(merged, source.values)
    try:
        return config.model_validate(merged, context={"base_dir": path.parent.resolve()})
    except ValidationError as error:
        sources = [*reversed(overrides), where, task]
        raise ConfigError("\n".join(_explain(config, item, sources) for item in error.errors())) from None


def load_profile(profile: str | None) -> Profile:
    """A profile alone, as `load_config` reads it."""
    source = _profile_source(profile)
    try:
        return Profile.model_validate(source.values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(Profile, item, [source]) for item in error.errors())) from None


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with slime."""
    return sorted(file.name.removesuffix(".toml") for file in files("slime.profiles").iterdir() if file.name[0] != "_")


def machine_profile() -> str:
    """The shipped profile that fits this machine, by its NVIDIA devices and by what is installed.

    `make setup` installs packages for CPUs; an engine on a GPU needs SGLang's kernels besides.
    """
    num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) if find_spec("sgl_kernel") else 0
    return "cpu" if num_gpus == 0 else "1gpu" if num_gpus < 8 else "8gpu"


def _shipped() -> str:
    return ", ".join(shipped_profiles())


def _profile_source(profile: str | None) -> Source:
    name = profile or machine_profile()
    if name in shipped_profiles():
        text = files("slime.profiles").joinpath(f"{name}.toml").read_text()
        return Source(name=f"profile {name}", text=text, values=tomllib.loads(text), prefix=("profile",))
    if not Path(name).is_file():
        raise ConfigError(
            f"--profile {name}: neither a file nor a shipped profile.\n"
            f"Name one of {_shipped()}, or the path of a TOML file of your own."
        )
    read = _read(Path(name))
    return Source(name=read.name, text=read.text, values=read.values, prefix=("profile",))


def _read(path: Path) -> Source:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        near = [str(file) for file in sorted([*folder.glob("*.toml"), *folder.glob("*/run.toml")])[:5]]
        hint = f"Files near it: {', '.join(near)}" if near else f"{folder.resolve()} holds no TOML file"
        raise ConfigError(f"{path}: there is no such file.\n{hint}; or start from examples/reasoning/run.toml.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8.\nSave the file as UTF-8, or remove that character."
        ) from None
    try:
        return Source(name=str(path), text=text, values=tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path}: not valid TOML: {error}.\nStrings need quotes and a table looks like [rollout]; "
            "compare with examples/reasoning/run.toml."
        ) from None


def _assignment(line: str) -> Source:
    key, equals, value = line.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key.strip()):
        raise ConfigError(
            f"--set {line}: expected KEY=VALUE.\n"
            "For example --set num_steps=5, or --set 'rollout.temperature=0.8' for a key inside a table."
        )
    try:
        values = tomllib.loads(line)
    except tomllib.TOMLDecodeError:  # a bare word from a shell is meant as a string
        values = _nest(tuple(key.strip().split(".")), value.strip())
    return Source(name=f"--set {line}", text="", values=values)


def _nest(keys: Sequence[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nest(keys[1:], value) if keys[1:] else value}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _explain(config: type[BaseModel], error: Any, sources: Sequence[Source]) -> str:
    keys: Keys = error["loc"]
    dotted = ".".join(map(str, keys))
    where = _where(keys, sources)
    if error["type"] == "extra_forbidden":
        known = _fields(config, keys[:-1])
        near = difflib.get_close_matches(str(keys[-1]), known, n=1, cutoff=0.5)
        advice = f"Did you mean {near[0]}? Otherwise remove it" if near else "Remove it"
        return f"{where}: unknown key {dotted} (value {error['input']!r}).\n{advice}; known here: {', '.join(known)}."
    if error["type"] == "missing":
        return (
            f"{sources[-1].name}: {dotted} is missing.\n"
            f"Add it to the file, or give it once with --set {dotted}=VALUE; docs/configuration.md says what it means."
        )
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}.\nChange one of the two in the file, or with --set."
    return (
        f"{where}: {dotted} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}.\n"
        f"Change it in the file, or override it with --set {dotted}=VALUE."
    )


def _fields(config: type[BaseModel], keys: Keys) -> list[str]:
    model: Any = config
    for key in keys:
        if isinstance(key, int):  # an element of a list, whose table was found with the list
            continue
        annotation = model.model_fields[key].annotation
        options = [annotation, *get_args(annotation)]
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(model.model_fields)


def _where(keys: Keys, sources: Sequence[Source]) -> str:
    """The source that wrote the key, with its line where there is one."""
    for source in sources:
        own = keys[len(source.prefix) :] if keys[: len(source.prefix)] == source.prefix else ()
        node: Any = source.values
        for key in own:
            inside = isinstance(node, dict) or (isinstance(node, list) and isinstance(key, int) and key < len(node))
            node = (node.get(key) if isinstance(node, dict) else node[key]) if inside else None
        if own and node is not None:
            line = _line(source.text, own)
            return f"{source.name}:{line}" if line else source.name
    return sources[-1].name


def _line(text: str, keys: Keys) -> int | None:
    table = ""
    tables = Counter[str]()
    wanted = ".".join(map(str, keys))
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*(\[\[?)([^\[\]]+)\]", line):
            table = header[2].strip()
            if header[1] == "[[":
                table = f"{table}.{tables[table]}"
                tables[table.rpartition(".")[0]] += 1
            if table == wanted:
                return number
        elif (key := re.match(r"\s*([\w.-]+)\s*=", line)) and f"{table}.{key[1]}".strip(".") == wanted:
            return number
    return None
