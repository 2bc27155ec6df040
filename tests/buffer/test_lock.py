"""Two runs never share a directory, and a dead one never blocks it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from buffer.lock import RunLock
from slime.errors import LedgerError

HOLD = """
import sys, time
from pathlib import Path
from buffer.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(run_dir: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_and_told_who_holds_the_directory(tmp_path: Path) -> None:
    """Pins: two runs writing one ledger, each requeueing what the other is at."""
    process = hold(tmp_path)
    try:
        with pytest.raises(
            LedgerError,
            match=rf"another run holds this directory: process {process.pid} on .* since 20\d\d-.*or choose another",
        ):
            RunLock(tmp_path)
    finally:
        process.communicate("")
    with RunLock(tmp_path):
        pass


def test_a_killed_run_leaves_nothing_locked(tmp_path: Path) -> None:
    """Pins: a pid file that has to be removed by hand after `kill -9`."""
    process = hold(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with RunLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / "run.lock").read_text()


def test_one_process_cannot_hold_a_directory_twice(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(LedgerError, match=f"process {os.getpid()}"):
        RunLock(tmp_path)


def test_the_lock_does_not_pass_to_programs_a_run_starts(tmp_path: Path) -> None:
    """Pins: an engine that outlives a killed driver and keeps the directory locked."""
    with RunLock(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        with RunLock(tmp_path):
            pass
    finally:
        child.communicate(b"")


def test_the_refusal_crosses_processes(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(LedgerError) as refused:
        RunLock(tmp_path)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
