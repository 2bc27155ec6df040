"""`slime buffer` and `slime audit` on ledgers of every kind: sound, live, archived, damaged, and none at all."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from buffer.difficulty import Difficulty
from buffer.ledger import Ledger
from buffer.prompts.dataset import prompt_uid
from buffer.samples import encode_line
from buffer.schema import State
from slime.buffer_cli import STATES
from slime.cli import main
from slime.config import DataConfig, ModelConfig, RewardConfig, RunConfig, SourceConfig
from tests.buffer.example_run import make_run
from tests.test_cli import imported_by

NOBODY = 65534
READERS = (["audit", "RUN"], ["buffer", "stats", "RUN"], ["buffer", "show", "RUN", "2"], ["buffer", "export", "RUN"])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are written into the working directory by default."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def slime(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def read(command: list[str], run_dir: Path) -> Result:
    return slime(*[str(run_dir) if word == "RUN" else word for word in command])


def contents(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}


@pytest.mark.parametrize("command", ["stats", "show", "export", "serve"])
def test_every_command_explains_itself(command: str) -> None:
    """A command without help is one that nobody finds."""
    result = slime("buffer", command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 6


def test_the_states_that_can_be_asked_for_are_those_of_a_ledger() -> None:
    """They are written out, because help must not wait for what the ledger imports."""
    assert tuple(State) == STATES


def test_the_stats_are_a_table_for_people(run_dir: Path) -> None:
    lines = [" ".join(line.split()) for line in slime("buffer", "stats", run_dir).output.splitlines()]
    for line in (
        "issued 10 from the run's prompts 9, pushed 1",
        "waiting 1 to be issued again, 1 of them with partial samples",
        "ready 1 graded, and in no step yet",
        "committed 3 staleness 0: 2, 1: 1; the bound is 1",
        r"dropped 2 \x1b[2J\x9b31m\u202elost 0\nissued 9 1, prompt_too_long 1",
        "requeued 2 aborted 1, engine died 1",
        "late 1 results of older attempts, or sent twice: discarded",
        "commits 2 the last is of step 2",
    ):
        assert line in lines
    assert any(line.startswith("running 2 1 of them are graded now; longest: instance") for line in lines)
    assert not any(line.startswith("reverted") for line in lines)


def test_the_stats_pool_the_prompts(run_dir: Path) -> None:
    with Difficulty(run_dir / "difficulty.sqlite") as difficulty:
        difficulty.absorb(run_dir)
    output = " ".join(slime("buffer", "stats", run_dir).output.split())
    assert "prompts 6 judged, by pass@1 0: 1, up to 0.25: 0, up to 0.5: 5, up to 0.75: 0" in output
    pools = json.loads(slime("buffer", "stats", run_dir, "--pass-k", "3", "--json").output)["pools"]
    assert (pools["k"], pools["num_unknown"]) == (3, 6)


def test_the_stats_are_an_object_for_programs(run_dir: Path) -> None:
    result = slime("buffer", "stats", run_dir, "--json")
    assert result.output.isascii()
    assert json.loads(result.output)["states"]["committed"] == 3


def test_a_life_is_told_line_by_line(run_dir: Path) -> None:
    """Pins a story without its end, and an answer that is taken for markup or drives the terminal."""
    lines = slime("buffer", "show", run_dir, "a2").output.splitlines()
    assert lines.pop(0) == "asked: 1 + 2 ="
    assert lines[:2] == [
        "instance 2  prompt a2  place 2 in the order, epoch 0",
        "committed, attempt 0, step 2, versions 0 to 0",
    ]
    assert [line.split("  ")[2:] for line in lines[2:7]] == [
        ["attempt 0", "issued"],
        ["attempt 0", "running"],
        ["attempt 0", "graded"],
        ["attempt 0", "packed", "step 2"],
        ["attempt 0", "committed", "step 2"],
    ]
    assert lines[7:] == [
        "attempt 0 was graded: 1 of 2 passed, reward mean 0.500, 2.0 tokens",
        "  0  reward 0  completed  2 tokens  r",
        r"  1  reward 1  completed  2 tokens  it is \x1b[2J\x9b31m\u202elost 0\nissued 9",
        "",
    ]


def test_a_dropped_instance_says_why(run_dir: Path) -> None:
    output = slime("buffer", "show", run_dir, "3").output
    assert r"dropped, attempt 0, reason: \x1b[2J\x9b31m\u202elost 0\nissued 9, versions 0 to 0" in output
    assert r"0 of 2 passed, reward mean 0.000, 2.0 tokens, refused: \x1b[2J" in output
    assert "its samples are not at hand" in output


def test_a_prompt_without_samples_is_read_from_the_data_of_the_run(tmp_path: Path) -> None:
    """Pins the one prompt that fails again and again told by a hash alone; and another one, after the data changed."""
    data, run_dir = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text('{"text": "1 + 2 =\\u001b[2J", "label": "3"}\n')
    config = RunConfig(
        run_dir=run_dir,
        model=ModelConfig(path=tmp_path),
        data=DataConfig(train=(SourceConfig(path=data),)),
        reward=RewardConfig(fn="exact"),
    )
    uid = prompt_uid(text="1 + 2 =\x1b[2J", label="3")
    with Ledger(run_dir) as ledger:
        ledger.issue(uid, epoch=0, position=0)
    assert "asked" not in slime("buffer", "show", run_dir, "0").output
    (run_dir / "config.json").write_text(config.model_dump_json())
    assert slime("buffer", "show", run_dir, "0").output.startswith(r"asked: 1 + 2 =\x1b[2J")
    data.write_text('{"text": "4 + 2 =", "label": "6"}\n')
    assert "asked" not in slime("buffer", "show", run_dir, "0").output
    data.unlink()
    assert "asked" not in slime("buffer", "show", run_dir, "0").output


def test_an_export_says_what_it_wrote_and_what_is_missing(run_dir: Path) -> None:
    (run_dir / "rollouts" / "step_000002.jsonl").unlink()
    result = slime("buffer", "export", run_dir, "--what", "samples", "--state", "committed", "--format", "parquet")
    assert result.stdout == "run_samples.parquet: 4 samples\n"
    assert result.stderr == f"1 committed groups are not in {run_dir / 'rollouts'} any more\n"
    again = slime("buffer", "export", run_dir, "--what", "samples", "--format", "parquet")
    assert (again.exit_code, "--force" in again.output) == (1, True)
    assert slime("buffer", "export", run_dir, "--what", "samples", "--format", "parquet", "--force").exit_code == 0


def test_the_audit_has_three_lines_that_a_reason_cannot_forge(run_dir: Path) -> None:
    """Pins a drop reason that clears the screen or adds a line to the audit."""
    result = slime("audit", run_dir)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "issued 10 = committed 3 + dropped 2 + in flight 5 (issued 1, running 1, generated 1, graded 1, packed 1)",
        "lost 0 duplicated 0 unaccounted 0",
        r"dropped: \x1b[2J\x9b31m\u202elost 0\nissued 9 1, prompt_too_long 1; requeued 2, late results discarded 1",
    ]


def test_an_audit_that_does_not_hold_ends_with_1(run_dir: Path) -> None:
    """Pins a script that goes on after the books did not add up."""
    with closing(sqlite3.connect(run_dir / "ledger.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE instances SET state = 'dropped' WHERE ordinal = 0")
    result = slime("audit", run_dir)
    assert result.exit_code == 1
    assert "lost 0 duplicated 0 unaccounted 1\n" in result.output


@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_looking_at_a_run_that_is_over_changes_nothing(command: list[str], run_dir: Path) -> None:
    """Pins files of SQLite's that are left beside an archived ledger, and a ledger that looking has touched."""
    before = contents(run_dir)
    assert read(command, run_dir).exit_code == 0
    assert contents(run_dir) == before


@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_looking_at_a_killed_run_does_not_fold_its_log_into_the_ledger(command: list[str], run_dir: Path) -> None:
    """Pins evidence that is gone after the first look. The log may only be folded by the run that goes on."""
    killed = run_dir.parent / "killed"
    with Ledger(run_dir) as ledger:
        ledger.issue("new", epoch=0, position=ledger.next_position)
        shutil.copytree(run_dir, killed)
    before = contents(killed)
    assert read(command, killed).exit_code == 0
    after = contents(killed)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in ("ledger.sqlite", "ledger.sqlite-wal"))
    assert "11 instances" in read(["buffer", "export", "RUN", "--force"], killed).output


@contextmanager
def not_to_be_written() -> Iterator[Path]:
    """A directory in which this process may read and not write, whoever runs it."""
    with tempfile.TemporaryDirectory() as top:
        directory = Path(top, "archive")
        directory.mkdir()
        yield directory
        directory.chmod(0o755)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write anywhere; nobody else may."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)


@pytest.mark.parametrize("command", READERS, ids=" ".join)
@pytest.mark.parametrize("killed", [False, True], ids=["archived", "killed"])
def test_a_directory_that_may_not_be_written_can_be_read(
    command: list[str], killed: bool, run_dir: Path, tmp_path: Path
) -> None:
    """Pins an archive on a read-only disk that cannot be audited: SQLite's own read-only mode wants to write there."""
    assert read(command, run_dir).exit_code == 0  # imports what it needs while it may read everything
    with not_to_be_written() as archive:
        with Ledger(run_dir) as ledger:
            ledger.issue("new", epoch=0, position=ledger.next_position)
            if killed:
                shutil.copytree(run_dir, archive, dirs_exist_ok=True)
        if not killed:
            shutil.copytree(run_dir, archive, dirs_exist_ok=True)
        archive.parent.chmod(0o755)
        archive.chmod(0o555)
        if command[1] == "export":
            output = Path(archive.parent, "out")
            output.touch(mode=0o666)
            output.chmod(0o666)
            archive.parent.chmod(0o777)
            command = [*command, "--output", str(output), "--force"]
        with unprivileged():
            assert not os.access(archive, os.W_OK, effective_ids=True)
            result = read(command, archive)
        assert result.exit_code == 0, result.output


def overwrite(path: Path) -> None:
    path.write_bytes(b"not a database " * 1000)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: 3 * 4096] + b"\xff" * path.stat().st_size)


def make_foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (a)")


def make_older(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 1")


@pytest.mark.parametrize("command", READERS, ids=" ".join)
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            Path.unlink,
            "LedgerError: {path}: no such ledger (No such file or directory). Name a run directory, or start",
        ),
        (overwrite, "StorageError: {path}: SQLite says: file is not a database. Name a directory whose"),
        (make_foreign, "LedgerError: {path}: got a SQLite file that is no ledger. Move it away, or choose"),
        (make_older, "LedgerError: {path}: got a ledger of version 1; this slime reads version"),
        (tear, "StorageError: {path}: SQLite says: database disk image is malformed. Restore it from a copy, or try"),
    ],
    ids=["missing", "no database", "foreign", "older", "torn"],
)
def test_a_file_that_is_no_sound_ledger_is_refused_with_a_remedy(
    command: list[str], harm: Callable[[Path], None], said: str, run_dir: Path
) -> None:
    """Pins a traceback of SQLite's, and empty statistics of a file that is something else."""
    harm(run_dir / "ledger.sqlite")
    result = read(command, run_dir)
    assert result.exit_code == 1
    assert result.stderr.startswith(said.format(path=run_dir / "ledger.sqlite")), result.stderr
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_a_ledger_that_is_locked_is_refused_with_a_remedy(
    command: list[str], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins a command that waits for ever for a tool that someone has left open."""
    monkeypatch.setattr("buffer.books.reading.LOCK_TIMEOUT_S", 0.01)
    with closing(sqlite3.connect(run_dir / "ledger.sqlite", isolation_level=None)) as db:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("INSERT INTO meta VALUES ('k', 'v')")
        result = read(command, run_dir)
    assert result.exit_code == 1
    assert "StorageError" in result.stderr
    assert "database is locked. End the process that has locked it, or read a copy" in result.stderr


def test_a_run_that_begins_while_an_archive_is_read_is_noticed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pins rows of two moments in one export: an archive is read without a lock."""

    def meanwhile(row: object) -> bytes:
        with Ledger(run_dir) as ledger:
            ledger.issue("new", epoch=0, position=ledger.next_position)
        return encode_line(row)

    monkeypatch.setattr("buffer.books.export.encode_line", meanwhile)
    result = slime("buffer", "export", run_dir)
    assert result.exit_code == 1
    assert "a run was started on it while it was read. Give the same command again" in result.stderr
    assert list(Path.cwd().iterdir()) == []


def test_help_imports_nothing_heavy() -> None:
    """`slime buffer --help` answers at once because of this; a time would only measure the machine."""
    for command in ("stats", "show", "export", "serve"):
        code = f"from slime.cli import main\ntry: main(['buffer', '{command}', '--help'])\nexcept SystemExit: pass"
        assert imported_by(code) == []
