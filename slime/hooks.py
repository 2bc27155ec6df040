"""User functions: found by ``"./file.py:name"`` or ``"package.module:name"``, and checked before a run starts.

A file is loaded by its path under a private module name and never through ``sys.path``. So a ``rewards.py`` beside a
run file shadows nothing, and for the same reason a hook's file cannot import the files beside it: code that is shared
belongs into an installed package, whose functions are named ``"package.module:name"``.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from slime.errors import HookError

Hook = Callable[..., Any]
MAX_DETAIL = 1000
"""Characters of a foreign exception's message that are repeated in ours."""


def load_hook(spec: str, *, base_dir: Path, what: str, arguments: Sequence[str], by_name: bool = False) -> Hook:
    """Find a user's function and make sure that it can be called as its hook will call it.

    Args:
        spec: ``"./file.py:name"``, relative to `base_dir`, or ``"package.module:name"``.
        base_dir: folder of the run file.
        what: the key it was given under, for messages: ``"reward.fn"``.
        arguments: what the hook passes, in order and by position.
        by_name: instead, the function names those of `arguments` that it wants, and a single parameter of another name
            gets the first. The returned hook then takes all `arguments` as keywords.

    Raises:
        HookError: the spec is malformed, the file or function is missing, its import raised, it cannot be called, or
            not with these arguments.
    """
    where = f'{what} = "{spec}"'
    place, name = _split(spec, where)
    module = _load_file(_existing(place, base_dir, where), where) if _is_file(place) else _import(place, where)
    function = _find(module, name, where)
    if by_name:
        return _taking_by_name(function, arguments, where)
    _check_positions(function, arguments, where)
    return function


def hook_file(spec: str, *, base_dir: Path) -> Path:
    """The source file that a hook's spec names.

    Raises:
        HookError: there is none.
    """
    where = f'hook "{spec}"'
    place, _ = _split(spec, where)
    path = _existing(place, base_dir, where) if _is_file(place) else Path(_source_file(place))
    if not path.is_file():
        raise HookError(f"{where}: module {place!r} has no source file.\nInstall its source, or name a file of yours.")
    return path


def hook_source_hash(spec: str, *, base_dir: Path) -> str:
    """SHA-256 of `hook_file`: tells whether a run still uses the code that it began with."""
    return hashlib.sha256(hook_file(spec, base_dir=base_dir).read_bytes()).hexdigest()


def where_raised(error: BaseException, *, file: str) -> str:
    """One line about an exception of a user's code: its type, its message, and the line of `file` that led to it."""
    text = f"{type(error).__name__}: {_message(error)}".rstrip(": ")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text} (line {error.lineno} of {Path(error.filename).name}: `{(error.text or '').strip()}`)"
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename == file] or frames
    if not inside:
        return text
    frame = inside[-1]
    return f"{text} (line {frame.lineno} of {Path(frame.filename).name}, in {frame.name}: `{frame.line}`)"


def _message(error: BaseException) -> str:
    try:
        return str(error)[:MAX_DETAIL]
    except Exception:
        return "<its message cannot be printed>"


def _split(spec: str, where: str) -> tuple[str, str]:
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        example = f"{spec}:name" if spec.endswith(".py") else "./file.py:name"
        raise HookError(
            f'{where} does not name a function.\nWrite "{example}" for a function in a file of yours (the path is '
            f'relative to the run file), or "package.module:name" for one in an installed package.'
        )
    return place, name


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place


def _existing(place: str, base_dir: Path, where: str) -> Path:
    path = (base_dir / place).resolve()
    if path.is_file():
        return path
    beside = sorted(file.name for file in path.parent.glob("*.py"))
    near = difflib.get_close_matches(path.name, beside, n=1) or beside[:1]
    hint = f" The folder holds {near[0]}." if near else ""
    raise HookError(
        f"{where}: there is no file {path}.{hint}\nPaths are relative to the run file's folder, {base_dir.resolve()}: "
        f'correct the path, or name a function of an installed package as "package.module:name".'
    )


def _load_file(path: Path, where: str) -> ModuleType:
    # The name carries path and content: two hooks of one file share its module, and an edited file is loaded anew.
    source = path.read_bytes()
    name = f"_slime_hook_{hashlib.sha256(bytes(path) + source).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    if path.suffix != ".py":
        raise HookError(f"{where}: {path.name} is not Python source.\nName a file that ends in .py, or a module.")
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, loader, origin=str(path)))
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up there while it is being executed
    try:
        # Not loader.exec_module: its bytecode cache can be older than a file that was edited within the same second.
        exec(loader.source_to_code(source, str(path)), vars(module))
    except (Exception, SystemExit) as cause:
        del sys.modules[name]
        raise _import_error(cause, str(path), where) from cause
    return module


def _import(place: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as cause:
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if missing and f"{place}.".startswith(f"{missing}."):
            raise HookError(
                f"{where}: there is no module {missing!r} in this environment.\n"
                f'Install the package that has it, or write "./file.py:name" for a function in a file of yours.'
            ) from cause
        raise _import_error(cause, _source_file(place), where) from cause


def _source_file(place: str) -> str:
    """Path of a module's source; "" where there is none."""
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):  # its parent package cannot be imported
        return ""
    return spec.origin or "" if spec else ""


def _import_error(cause: BaseException, file: str, where: str) -> HookError:
    advice = "Mend the file, or name a function in another one."
    missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
    if missing and (Path(file).parent / f"{missing}.py").is_file():
        advice = (
            f"{missing}.py lies beside it, but a hook cannot import the files beside it: put the code into the same "
            f'file, or both into an installed package and write "package.module:name".'
        )
    return HookError(f"{where} could not be loaded: {where_raised(cause, file=file)}.\n{advice}")


def _find(module: ModuleType, name: str, where: str) -> Hook:
    file = module.__file__ or module.__name__
    value = getattr(module, name, None)
    if callable(value):
        return value  # type: ignore[no-any-return]
    problem = (
        f"{name!r} in {file} is of type {type(value).__name__} and cannot be called"
        if hasattr(module, name)
        else f"there is no function {name!r} in {file}"
    )
    own = [key for key, item in vars(module).items() if callable(item) and _defined_in(item, module)]
    near = difflib.get_close_matches(name, own, n=1)
    raise HookError(
        f"{where}: {problem}; {f'the nearest name there is {near[0]!r}' if near else f'it defines {_listed(own)}'}.\n"
        f"Correct the name after the colon, or define `def {name}(...)` in that file."
    )


def _defined_in(item: Any, module: ModuleType) -> bool:
    return getattr(item, "__module__", None) == module.__name__


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "no function"


def _signature(function: Hook, where: str) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError) as cause:
        raise HookError(
            f"{where}: Python cannot tell which parameters it takes.\n"
            f"Call it from a function of your own and name that, or name another one."
        ) from cause


def _required(signature: inspect.Signature) -> list[inspect.Parameter]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in signature.parameters.values() if p.default is p.empty and p.kind not in variadic]


def _check_positions(function: Hook, arguments: Sequence[str], where: str) -> None:
    signature = _signature(function, where)
    try:
        signature.bind(*arguments)
    except TypeError as cause:
        extra = [p.name for p in _required(signature)[len(arguments) :]]
        problem = f"the hook does not give {_listed(extra)}" if extra else str(cause)
        raise HookError(
            f"{where} has the signature {signature}: {problem}.\n"
            f"It is called as ({', '.join(arguments)}): take just these, or give every further parameter a default."
        ) from cause


def _taking_by_name(function: Hook, arguments: Sequence[str], where: str) -> Hook:
    signature = _signature(function, where)
    required, parameters = _required(signature), signature.parameters.values()
    foreign = [p for p in required if p.name not in arguments or p.kind is p.POSITIONAL_ONLY]
    named = [p.name for p in parameters if p.name in arguments and p.kind is not p.POSITIONAL_ONLY]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        named = list(arguments)
    takes_the_first = len(required) == 1 and len(foreign) == 1 and foreign[0].kind is not foreign[0].KEYWORD_ONLY
    if not takes_the_first and (foreign or not named):
        problem = f"the hook does not give {_listed(p.name for p in foreign)}" if foreign else "it takes nothing"
        raise HookError(
            f"{where} has the signature {signature}: {problem}.\n"
            f"Name any of ({', '.join(arguments)}) and give every further parameter a default, "
            f"or take a single one, which gets the {arguments[0]}."
        )
    first = arguments[:1] if takes_the_first else ()

    def hook(**values: Any) -> Any:
        return function(*(values[name] for name in first), **{name: values[name] for name in named})

    return hook
