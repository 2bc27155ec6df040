"""User functions are found and checked before a run starts, and mistakes are explained in the user's words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slime.errors import HookError
from slime.hooks import hook_source_hash, load_hook, where_raised

GOOD = """
from dataclasses import dataclass

@dataclass
class Part:
    value: float

def keep(group): return "kept " + group
def score_answer(response, label="?"): return f"{response}/{label}"
def whole(s): return s
def anything(**values): return sorted(values)
def mixed(thing, label=None): return thing, label
def greedy(a, b, c): return a
def keyword(*, foreign): return foreign
def nothing(): return 1
limit = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hooks.py").write_text(GOOD)
    (tmp_path / "broken.py").write_text("import os\nvalue = int('seven')\n")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "imports.py").write_text("import sibling\ndef f(group): ...\n")
    (tmp_path / "sibling.py").write_text("x = 1\n")
    (tmp_path / "notes.txt").write_text("def f(group): ...\n")
    return tmp_path


def load(spec: str, folder: Path, *arguments: str) -> object:
    return load_hook(spec, base_dir=folder, what="buffer.filter", arguments=arguments or ("group",))


def test_a_function_in_a_file_is_found_relative_to_the_run_file(folder: Path) -> None:
    """Pins: a hook that is looked up in the working directory and so finds another file, or none."""
    hook = load_hook("./hooks.py:keep", base_dir=folder, what="buffer.filter", arguments=["group"])
    assert hook("g") == "kept g"


def test_a_function_in_a_package_is_found_by_its_module(folder: Path) -> None:
    """Pins: installed hooks mistaken for files."""
    assert load("posixpath:basename", folder) is __import__("posixpath").basename


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("./hooks.py", ['"./hooks.py:name"', '"package.module:name"']),
        ("keep", ["does not name a function", '"./file.py:name"']),
        ("./hooks.py:", ["does not name a function"]),
        ("./hook.py:keep", ["no file", "hook.py", "holds hooks.py"]),
        ("./missing/hooks.py:keep", ["no file", "missing/hooks.py"]),
        ("./notes.txt:f", ["notes.txt is not Python"]),
        ("./broken.py:f", ["ValueError", "line 2 of broken.py", "int('seven')"]),
        ("./syntax.py:f", ["SyntaxError", "line 1 of syntax.py", "def f(:"]),
        ("./leaves.py:f", ["SystemExit: 3", "line 1 of leaves.py"]),
        ("./imports.py:f", ["No module named 'sibling'", "sibling.py lies beside it"]),
        ("./hooks.py:kepe", ["no function 'kepe'", "nearest name there is 'keep'"]),
        ("./hooks.py:xyzzy", ["no function 'xyzzy'", "'keep', 'score_answer'"]),
        ("./hooks.py:limit", ["'limit'", "of type int", "cannot be called"]),
        ("./hooks.py:greedy", ["(a, b, c)", "does not give 'b', 'c'", "called as (group)"]),
        ("./hooks.py:nothing", ["signature ()", "too many positional arguments"]),
        ("no_such_package.rewards:f", ["no module 'no_such_package'"]),
        ("posixpath:basenam", ["nearest name there is 'basename'"]),
    ],
)
def test_a_hook_that_cannot_be_used_is_explained(spec: str, says: list[str], folder: Path) -> None:
    """Pins: errors that surface as a bare AttributeError after the engines have started."""
    with pytest.raises(HookError) as caught:
        load(spec, folder)
    message = str(caught.value)
    assert message.startswith(f'buffer.filter = "{spec}"')
    assert all(part in message for part in says), message
    assert "\n" in message, "the second line says what to do"


def test_a_hooks_file_shadows_nothing_and_is_not_on_the_path(folder: Path) -> None:
    """Pins: a user's `rewards.py` or `json.py` beside the run file replacing a package for everybody."""
    (folder / "json.py").write_text("def keep(group): return 'mine'\n")
    program = (
        "import sys; from pathlib import Path; from slime.hooks import load_hook\n"
        f"hook = load_hook('./json.py:keep', base_dir=Path({str(folder)!r}), what='w', arguments=['group'])\n"
        "import json; assert json.loads('1') == 1 and hook('g') == 'mine'\n"
        f"assert {str(folder)!r} not in sys.path and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_two_hooks_of_one_file_share_its_module(folder: Path) -> None:
    """Pins: state that one hook keeps for another being lost because the file was executed twice."""
    first, second = load("./hooks.py:keep", folder), load("./hooks.py:whole", folder)
    assert first.__globals__ is second.__globals__  # type: ignore[attr-defined]


def test_an_edited_file_is_loaded_anew_and_has_another_hash(folder: Path) -> None:
    """Pins: a stale function after an edit, and a run that cannot tell that its code changed."""
    before = hook_source_hash("./hooks.py:keep", base_dir=folder)
    load("./hooks.py:keep", folder)
    (folder / "hooks.py").write_text("def keep(group): return 'edited'\n")
    hook = load("./hooks.py:keep", folder)
    assert hook("g") == "edited"  # type: ignore[operator]
    assert hook_source_hash("./hooks.py:keep", base_dir=folder) != before
    assert len(hook_source_hash("statistics:mean", base_dir=folder)) == 64


VALUES = {"sample": "S", "response": "R", "label": "L"}


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("score_answer", "R/L"),
        ("whole", "S"),
        ("anything", ["label", "response", "sample"]),
        ("mixed", ("S", "L")),
    ],
)
def test_a_function_gets_the_arguments_it_names(name: str, result: object, folder: Path) -> None:
    """Pins: values handed to the wrong parameter, e.g. the label as the response."""
    hook = load_hook(f"./hooks.py:{name}", base_dir=folder, what="reward.fn", arguments=list(VALUES), by_name=True)
    assert hook(**VALUES) == result


@pytest.mark.parametrize(
    ("name", "says"),
    [("greedy", "does not give 'a', 'b', 'c'"), ("keyword", "does not give 'foreign'"), ("nothing", "takes nothing")],
)
def test_a_function_that_names_what_the_hook_does_not_give_is_refused(name: str, says: str, folder: Path) -> None:
    """Pins: a wrong signature that shows only when the first sample is graded."""
    with pytest.raises(HookError, match=says) as caught:
        load_hook(f"./hooks.py:{name}", base_dir=folder, what="reward.fn", arguments=list(VALUES), by_name=True)
    assert "Name any of (sample, response, label)" in str(caught.value)


def test_an_exceptions_report_names_the_users_own_line() -> None:
    """Pins: reports that end in a library's line, and exceptions whose message cannot be printed."""

    class UnprintableError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def fail() -> None:
        int("x", base=99)

    with pytest.raises(ValueError, match="base") as caught:
        fail()
    report = where_raised(caught.value, file=__file__)
    assert report.startswith("ValueError: int() base")
    assert "test_hooks.py, in fail" in report
    assert 'int("x", base=99)' in report
    assert where_raised(UnprintableError(), file="") == "UnprintableError: <its message cannot be printed>"
