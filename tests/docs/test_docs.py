"""What the documentation shows is what the program takes.

A block of TOML is a run file, or a part of one if it has no `run_dir`; the fence of a profile is ``toml profile``.
Python that is a reward or a hook says so in its fence too: ``python reward:NAME``, ``python hook:KEY:NAME``. Command
lines stand after ``$`` in ``console`` blocks.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from rewards.inputs import ARGUMENTS, reward_input
from rewards.pool import check_reward
from rewards.verdict import to_verdict
from rollout.client import Completion
from slime.buffer_cli import buffer_group
from slime.cli import main
from slime.config import Profile, RewardConfig, RunConfig, SftRunConfig
from slime.config_docs import render
from slime.config_file import load_config, shipped_profiles
from slime.hooks import load_hook
from slime.types import Failed, Prompt, Sample, VersionSpan
from tests.builders import make_group, make_prompt, make_sample
from trainer.batch import build_batch
from trainer.loss import LossInputs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
BASE = '[model]\npath = "model"\n[data]\ntrain = "data.jsonl"\n[reward]\nfn = "exact"\n'
METRIC = re.compile(r"\"((?:batch|eval|loss|mismatch|publish|reward|rollout|staleness|survivorship|time)/[\w@]+)\"")
INTERNAL_METRICS = {"loss/total"}
"""Renamed before it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    kind: str
    """What follows the fence: ``toml profile``."""
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(kind: str) -> list[Block]:
    return [block for page in PAGES for block in _blocks(page) if block.kind.partition(" ")[0] == kind]


def _blocks(page: Path) -> Iterator[Block]:
    kind, start, lines = "", 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif start:
            yield Block(page=page, line=start, kind=kind, text="\n".join(lines) + "\n")
            start = 0
        else:
            kind, start, lines = line.removeprefix("```"), number, []
    assert not start, f"{page}: the block of line {start} does not end"


def commands() -> list[tuple[str, str]]:
    """(place, command line) of every command shown, comments cut off."""
    found = []
    for block in blocks("console"):
        lines = [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]
        found += [(str(block), line) for line in lines]
    for kind in ("sh", "bash", ""):
        found += [(str(b), line) for b in blocks(kind) for line in b.text.splitlines() if line.startswith("slime ")]
    return found


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_every_toml_block_is_accepted(block: Block) -> None:
    """Pins a key that was renamed and lives on in the documentation: a reader's first run would fail."""
    values = tomllib.loads(block.text)
    if block.kind == "toml profile":
        Profile.model_validate(values)
    elif "sft" in values:
        SftRunConfig.model_validate(values)
    elif "run_dir" in values:
        RunConfig.model_validate(values)
    else:
        base = tomllib.loads('run_dir = "runs/x"\n' + BASE)
        RunConfig.model_validate({**base, **{key: {**base.get(key, {}), **table} for key, table in values.items()}})


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_every_python_block_compiles(block: Block) -> None:
    """Pins an example that was never Python."""
    compile(block.text, str(block), "exec")


def marked(kind: str) -> list[Block]:
    return [block for block in blocks("python") if f" {kind}:" in block.kind]


@pytest.mark.parametrize("block", marked("reward"), ids=str)
def test_every_reward_shown_passes_the_check_and_judges(block: Block, tmp_path: Path) -> None:
    """Pins an example with a signature that the check refuses, or one that fails on its first answer."""
    name = block.kind.rpartition(":")[2]
    (tmp_path / "reward.py").write_text(block.text)
    spec = f"./reward.py:{name}"
    check_reward(RewardConfig(fn=spec), base_dir=tmp_path)
    hook = load_hook(spec, base_dir=tmp_path, what="reward.fn", arguments=ARGUMENTS, by_name=True)
    sample = make_sample(reward=None)
    sample.response = "it is 3"
    value = hook(**reward_input(sample, make_prompt(label="3")).values())
    verdict = to_verdict(asyncio.run(value) if asyncio.iscoroutine(value) else value)
    assert not isinstance(verdict, Failed), verdict


class FakeTokenizer:
    """A token a word."""

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        return self.encode(prompt.text)

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))


class FakeTurns:
    """What a generate hook calls, without an engine: each turn samples two tokens and ends."""

    tokenizer = FakeTokenizer()
    max_response_tokens = 8

    async def generate(self, sample: Sample, *, max_new_tokens: int | None = None) -> Completion:
        sample.append([1, 2], logprobs=[-0.5, -0.25], version=0)
        return Completion(
            tokens=[1, 2],
            logprobs=[-0.5, -0.25],
            version_spans=[VersionSpan(start=0, end=2, version=0)],
            finish_reason="stop",
            cached_tokens=0,
        )


def run_generate(hook: Callable[..., Any]) -> None:
    sample = Sample(prompt_uid="p", index=0, rollout_id="p/0")
    asyncio.run(hook(make_prompt(), sample, FakeTurns()))
    assert sample.num_response_tokens == 4, "two turns"
    assert len(sample.tokens) == len(sample.loss_mask) == len(sample.rollout_logprobs)


def run_filter(hook: Callable[..., Any]) -> None:
    assert hook(make_group([0.0, 1.0])) == ""
    assert [hook(make_group([1.0, 1.0])), hook(make_group([0.0, 0.0]))] == ["too_easy", "too_hard"]


def run_advantage(hook: Callable[..., Any]) -> None:
    groups = [make_group([0.0, 1.0]), make_group([1.0, 1.0, 0.0], uid="p1", ordinal=1)]
    build_batch(
        groups,
        advantages=hook,
        aggregation="sequence",
        updates_per_step=1,
        num_ranks=1,
        tokens_per_microbatch=64,
        version=0,
    )
    assert all(abs(sum(row)) < 1e-9 for row in hook(groups))


def run_loss(hook: Callable[..., Any]) -> None:
    logprobs = torch.full([3], -1.0, requires_grad=True)
    row = torch.tensor([1.0, -1.0, 0.0])
    inputs = LossInputs(
        weights=row.abs(),
        advantages=row,
        rollout_logprobs=logprobs.detach(),
        old_logprobs=logprobs.detach(),
        cu_seqlens=torch.tensor([0, 3]),
    )
    loss, measured = hook(logprobs, torch.ones(3), inputs)
    assert loss.shape == logprobs.shape
    assert all(values.shape == logprobs.shape for values in measured.values())
    (gradient,) = torch.autograd.grad((inputs.weights * loss).sum(), logprobs)
    assert gradient.tolist() == [-1.0, 1.0, 0.0]


def run_on_step(hook: Callable[..., Any]) -> None:
    hook(3, {"loss/entropy": 0.0})


HOOKS: dict[str, tuple[Sequence[str], Callable[[Callable[..., Any]], None]]] = {
    "rollout.generate": (("prompt", "sample", "client"), run_generate),
    "buffer.filter": (("group",), run_filter),
    "trainer.advantage.fn": (("groups",), run_advantage),
    "trainer.loss.fn": (("logprobs", "entropy", "inputs"), run_loss),
    "hooks.on_step": (("step", "metrics"), run_on_step),
}


@pytest.mark.parametrize("block", marked("hook"), ids=str)
def test_every_hook_shown_loads_and_runs(block: Block, tmp_path: Path) -> None:
    """Pins an example whose signature is refused, or that misreads what it is given."""
    _, key, name = block.kind.split(" ")[1].split(":")
    arguments, run = HOOKS[key]
    (tmp_path / "hooks.py").write_text(block.text)
    run(load_hook(f"./hooks.py:{name}", base_dir=tmp_path, what=key, arguments=arguments))


def test_every_hook_has_an_example() -> None:
    """Pins the test above passing because it found nothing."""
    assert {block.kind.split(":")[1] for block in marked("hook")} == set(HOOKS)
    assert len(marked("reward")) >= 3


@pytest.mark.parametrize(("place", "line"), commands(), ids=lambda value: value)
def test_every_command_line_shown_is_one_that_slime_takes(place: str, line: str, tmp_path: Path) -> None:
    """Pins an option that is gone, a command that never was, and an overridden key that does not exist."""
    program, *words = shlex.split(line, comments=True)
    if program == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text(), place
    if program != "slime":
        return
    name, command, arguments = main.resolve_command(click.Context(main), words)
    while isinstance(command, click.Group):
        name, command, arguments = command.resolve_command(click.Context(command), arguments)
    assert command is not None
    options = command.make_context(name, list(arguments), parent=click.Context(main)).params
    if "assignments" in options:
        profile = options["profile"] if options["profile"] in shipped_profiles() else "cpu"
        file = tmp_path / "run.toml"
        if name == "sft":
            file.write_text('model.path = "m"\nsft = { data = "d", num_steps = 1, output = "o" }\n')
            load_config(file, SftRunConfig, profile=profile, assignments=options["assignments"])
        else:
            file.write_text('run_dir = "runs/x"\n' + BASE)
            load_config(file, RunConfig, profile=profile, assignments=options["assignments"])


def test_the_commands_were_found() -> None:
    """Pins the test above passing because it found nothing."""
    shown = {shlex.split(line)[1] for _, line in commands() if line.startswith("slime ")}
    assert shown == set(main.commands)
    assert {shlex.split(line)[2] for _, line in commands() if line.startswith("slime buffer ")} == set(
        buffer_group.commands
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_inside_the_project_resolves(page: Path) -> None:
    """Pins links to pages, headings and tests that were renamed."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page}: {target}"
        if heading:
            assert heading in _headings(file), f"{page}: {target}"


def _headings(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_and_test_that_a_page_names_exists(page: Path) -> None:
    """Pins a reference to a test that does not hold what the page says, because it is not there."""
    text = page.read_text(encoding="utf-8")
    for path, name in re.findall(
        r"`((?:slime|rollout|trainer|buffer|rewards|tests)/[\w/]+(?:/|\.\w+))(?:::(\w+))?`", text
    ):
        file = ROOT / path
        assert file.exists(), f"{page}: {path}"
        assert f"def {name}(" in file.read_text() if name else True, f"{page}: {path}::{name}"


def test_every_metric_that_the_code_names_is_documented() -> None:
    """Pins a number on the screen that no page explains."""
    sources = [file for package in ("slime", "rollout", "trainer", "rewards") for file in (ROOT / package).glob("*.py")]
    named = {name for file in sources for name in METRIC.findall(file.read_text())} - INTERNAL_METRICS
    page = (DOCS / "run_directory.md").read_text()
    assert named
    assert sorted(name for name in named if f"`{name}`" not in page) == []


def test_the_configuration_page_is_what_the_configuration_says() -> None:
    """Pins a key that was added, renamed or explained anew without the page."""
    assert (DOCS / "configuration.md").read_text() == render()


def test_every_page_is_reached_from_another() -> None:
    """Pins a page that nobody finds."""
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+\.md[^)\s]*)\)", page.read_text(encoding="utf-8"))
    }
    indexes = {DOCS / "README.md", DOCS / "design" / "README.md"}
    assert sorted(page for page in DOCS.rglob("*.md") if page not in linked | indexes) == []
