"""`slime buffer show`: which instances a name means, and what is told of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from buffer.books.lives import read_lives
from buffer.ledger import Ledger
from slime.errors import DataError, LedgerError
from tests.buffer.example_run import make_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def found(run_dir: Path, name: str) -> list[int]:
    return [life.instance.ordinal for life in read_lives(run_dir, name)]


@pytest.mark.parametrize(
    ("name", "ordinals"),
    [("a2", [2]), ("2", [2]), ("a2:2", [2]), ("ff0", [10, 11]), ("ff", [10, 11]), ("77", [12]), ("x:1", [13])],
)
def test_a_prompt_is_found_by_uid_beginning_and_ordinal(run_dir: Path, name: str, ordinals: list[int]) -> None:
    """Pins the life of another instance shown for the one that was asked for; a whole uid goes before everything."""
    with Ledger(run_dir) as ledger:
        for uid in ("ff0", "ff0", "77", "x:1"):
            ledger.issue(uid, epoch=0, position=ledger.next_position)
    assert found(run_dir, name) == ordinals


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("b", "several uids begin with 'b': 'b6', 'b7', 'b8', 'b9'. Give more"),
        ("", "several uids begin with '': 'a0', 'a1', 'a2', 'a3', 'a4' and more. Give more"),
        ("aa2", "no instance of 'aa2' was issued. Did you mean 'a2'?.* or an ordinal up to 9"),
        ("a2:3", "no instance of 'a2:3' was issued. Did you mean 'a2'"),
        ("99999999999999999999", "no instance of '99999999999999999999'"),
        ("٣", "no instance of '٣' was issued. `slime buffer export` lists all"),
        ("'; DROP TABLE instances --", "no instance of"),
        ("\udcff%", "no instance of"),
    ],
)
def test_a_name_that_means_none_or_several_is_refused_with_what_is_near(run_dir: Path, name: str, said: str) -> None:
    """Pins an empty answer for a misspelt uid, and the wrong one of two prompts."""
    with pytest.raises(LedgerError, match=said):
        read_lives(run_dir, name)


def test_a_run_that_has_issued_nothing_says_so(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    with pytest.raises(LedgerError, match="nothing is issued yet"):
        read_lives(tmp_path, "0")


def test_the_whole_life_of_an_instance_is_told(run_dir: Path) -> None:
    """Pins events that are left out or in another order: the story would be another one."""
    (life,) = read_lives(run_dir, "7")
    assert [(event.attempt, event.event, event.detail) for event in life.events] == [
        (0, "issued", ""),
        (0, "running", ""),
        (1, "requeued", "engine died"),
        (1, "running", ""),
        (0, "stale", "graded"),
    ]
    (life,) = read_lives(run_dir, "0")
    assert [event.step for event in life.events] == [None, None, None, 1, 1]
    (graded,) = life.graded
    assert (graded.num_passed, graded.num_samples, graded.reward_mean, graded.dropped) == (1, 2, 0.5, "")


@pytest.mark.parametrize(
    ("name", "num_samples"), [("2", 2), ("5", 2), ("6", 2), ("8", 2), ("3", 0), ("7", 0), ("9", 0)]
)
def test_samples_are_found_where_they_still_are(run_dir: Path, name: str, num_samples: int) -> None:
    """Of committed groups in rollouts/, of packed, ready and partial ones in the ledger, of others nowhere."""
    (life,) = read_lives(run_dir, name)
    assert [record["reward"] for record in life.samples] == [0.0, 1.0][:num_samples]
    assert all(record["ordinal"] == life.instance.ordinal for record in life.samples)


def test_samples_of_an_attempt_that_was_not_committed_are_not_shown(run_dir: Path) -> None:
    """Pins the answers of a step that was taken again, shown as those that were trained."""
    file = run_dir / "rollouts" / "step_000002.jsonl"
    file.write_text(file.read_text().replace('"attempt":0', '"attempt":7'))
    (life,) = read_lives(run_dir, "2")
    assert life.samples == ()


@pytest.mark.parametrize("line", ["{torn", "[1]", "[" * 100_000])
def test_a_damaged_file_of_samples_is_named(run_dir: Path, line: str) -> None:
    file = run_dir / "rollouts" / "step_000002.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"step_000002.jsonl, line 3: got (no JSON|JSON that is no object)"):
        read_lives(run_dir, "2")


def test_a_file_of_samples_that_was_removed_is_no_error(run_dir: Path) -> None:
    """The run directory's page allows it at any time."""
    (run_dir / "rollouts" / "step_000002.jsonl").unlink()
    (life,) = read_lives(run_dir, "2")
    assert life.samples == ()
