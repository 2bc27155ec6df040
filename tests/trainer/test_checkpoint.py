"""Checkpoint directories: complete or not there, and torn ones are found."""

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from slime.errors import CheckpointError
from trainer.checkpoint_dir import MANIFEST, list_checkpoints, new_checkpoint, prune_checkpoints, verify_checkpoint


def write(final: Path, *, files: dict[str, bytes] | None = None) -> Path:
    with new_checkpoint(final) as directory:
        for name, data in (files or {"model.bin": bytes(range(256)) * 40, "sub/state.json": b"{}"}).items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(data)
    return final


def test_a_checkpoint_appears_whole_and_verifies(tmp_path: Path) -> None:
    """Pins a directory that can be seen half written."""
    final = tmp_path / "step-1"
    with new_checkpoint(final) as directory:
        (directory / "model.bin").write_bytes(b"weights")
        assert not final.exists()
    verify_checkpoint(final)
    assert (final / "model.bin").read_bytes() == b"weights"
    assert list(tmp_path.iterdir()) == [final]


def test_every_kind_of_damage_is_found_and_named(tmp_path: Path) -> None:
    """Pins a damaged checkpoint that is loaded without a word: cut at any length, any byte flipped, a file lost."""
    final = write(tmp_path / "step-1")
    path = final / "model.bin"
    whole = path.read_bytes()
    chance = random.Random(0)
    damaged = [whole[:length] for length in (0, 1, 4096, len(whole) - 1)] + [whole + b"\0"]
    damaged += [
        whole[:at] + bytes([whole[at] ^ (1 << chance.randrange(8))]) + whole[at + 1 :]
        for at in chance.sample(range(len(whole)), 20)
    ]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.bin has"):
            verify_checkpoint(final)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.bin is missing"):
        verify_checkpoint(final)
    path.write_bytes(whole)
    verify_checkpoint(final)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 9}', '{"format": 1}', None], ids=str)
def test_a_damaged_manifest_is_found(tmp_path: Path, damage: str | None) -> None:
    """Pins a manifest that is trusted because it is there, and one that ends in a KeyError."""
    final = write(tmp_path / "step-1")
    if damage is None:
        (final / MANIFEST).unlink()
    else:
        (final / MANIFEST).write_text(damage)
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify_checkpoint(final)


def test_a_full_disk_leaves_nothing_and_names_two_ways_out(tmp_path: Path) -> None:
    """Pins a half checkpoint that a later start takes for a whole one."""
    with (
        pytest.raises(CheckpointError, match=r"no room .* Free space .* or keep fewer"),
        new_checkpoint(tmp_path / "s"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [ValueError("bug"), KeyboardInterrupt()], ids=repr)
def test_other_failures_pass_through_and_leave_nothing(tmp_path: Path, failure: BaseException) -> None:
    """Pins bugs and Ctrl-C dressed up as disk errors."""

    def fail(directory: Path) -> None:
        (directory / "model.bin").write_bytes(b"half")
        raise failure

    with pytest.raises(type(failure)), new_checkpoint(tmp_path / "s") as directory:
        fail(directory)
    assert list(tmp_path.iterdir()) == []


def test_a_process_killed_while_writing_leaves_no_checkpoint(tmp_path: Path) -> None:
    """Pins a checkpoint that exists before its last byte: the process is killed at each sync in turn."""
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import trainer.checkpoint_dir as c\n"
        "countdown = int(sys.argv[2])\n"
        "sync = c._sync\n"
        "def dying(path):\n"
        "    global countdown\n"
        "    countdown -= 1\n"
        "    if countdown < 0: os.kill(os.getpid(), 9)\n"
        "    sync(path)\n"
        "c._sync = dying\n"
        "with c.new_checkpoint(Path(sys.argv[1])) as d: (d / 'a').write_bytes(b'x' * 9000)\n"
    )
    for countdown in range(4):
        final = tmp_path / f"{countdown}" / "step-1"
        ended = subprocess.run([sys.executable, "-c", program, str(final), str(countdown)], timeout=60, check=False)
        assert ended.returncode == -9
        if countdown < 3:
            assert not final.exists()
            write(final)
        verify_checkpoint(final)


def test_writing_over_a_checkpoint_is_refused(tmp_path: Path) -> None:
    """Pins a good checkpoint replaced by one that then fails."""
    write(tmp_path / "step-1")
    with pytest.raises(CheckpointError, match="exists already"):
        write(tmp_path / "step-1", files={"other": b""})
    verify_checkpoint(tmp_path / "step-1")


def test_pruning_keeps_the_newest_and_sweeps_up_unfinished_ones(tmp_path: Path) -> None:
    """Pins the newest checkpoint removed in favour of an old one, and .tmp directories that fill the disk."""
    for step in (1, 2, 10):
        write(tmp_path / f"step-{step:06d}")
    (tmp_path / "step-000011.tmp").mkdir()
    assert prune_checkpoints(tmp_path, keep=2) == [tmp_path / "step-000001"]
    assert list_checkpoints(tmp_path) == [tmp_path / "step-000002", tmp_path / "step-000010"]
    assert sorted(tmp_path.iterdir()) == list_checkpoints(tmp_path)
