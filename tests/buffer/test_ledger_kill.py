"""``kill -9`` of the process that writes the ledger, dozens of times over one run directory."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from buffer.books.audit import audit_run
from buffer.ledger import Ledger

NUM_KILLS = 40
GROUPS_PER_STEP = 4

WRITER = """
import json, os, random, sys
from collections import deque
from pathlib import Path
from buffer.ledger import Ledger
from buffer.policy import Versions

SAMPLES = {"payload": b"samples", "versions": Versions(oldest=0, newest=0)}
run_dir, seed = Path(sys.argv[1]), int(sys.argv[2])
rng = random.Random(seed)

def acknowledge(*what):
    os.write(1, json.dumps(what).encode() + b"\\n")

ledger = Ledger(run_dir)
ledger.recover()
waiting = deque((i.ordinal, i.attempt) for i in ledger.open_instances() if i.state == "issued")
last = ledger.last_commit()
step = last.step if last else 0
graded = [i.ordinal for i in ledger.open_instances() if i.state == "graded"]
assert all(ledger.payload(ordinal) == b"samples" for ordinal in graded)
while True:
    if waiting:
        ordinal, attempt = waiting.popleft()
    else:
        ordinal, attempt = ledger.issue("uid", epoch=0, position=ledger.next_position), 0
        acknowledge("issue", ordinal)
    ledger.start(ordinal, attempt=attempt)
    fate = rng.random()
    if attempt and fate < 0.3:
        assert not ledger.graded(ordinal, attempt=attempt - 1, **SAMPLES)
    if fate < 0.1:
        ledger.drop(ordinal, attempt=attempt, reason="filtered")
        acknowledge("drop", ordinal)
        continue
    if fate < 0.2:
        ledger.requeue(ordinal, attempt=attempt, reason="engine died")
        waiting.append((ordinal, attempt + 1))
        continue
    ledger.generated(ordinal, attempt=attempt)
    ledger.graded(ordinal, attempt=attempt, **SAMPLES)
    graded.append(ordinal)
    acknowledge("graded", ordinal)
    if len(graded) >= 4:
        graded, later = graded[:4], graded[4:]
        step += 1
        ledger.pack(graded, step=step)
        acknowledge("pack", step)
        if step % 2 == 0:
            ledger.commit(step, checkpoint=f"step_{step}", state={"step": step})
            acknowledge("commit", step)
        graded = later
"""


def run_and_kill(run_dir: Path, *, seed: int, num_acknowledged: int) -> list[Any]:
    """Let a writer acknowledge so many moves, kill it amid the next ones, and return all it acknowledged."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(run_dir), str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(num_acknowledged)]
        os.kill(process.pid, signal.SIGKILL)
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    whole = [line for line in b"".join(lines).splitlines() + rest.splitlines(keepends=True) if line]
    return [json.loads(line) for line in whole if line.strip().endswith(b"]")]


def test_nothing_is_lost_or_trained_twice_however_often_the_run_is_killed(tmp_path: Path) -> None:
    """Pins: an acknowledged move that is gone after a kill, a group in two committed steps, or in none.

    The parent keeps its own books from what the writer acknowledged, and every kill is witnessed by its exit status.
    """
    rng = random.Random(0)
    issued: set[int] = set()
    dropped: set[int] = set()
    committed_steps: list[int] = []
    for kill in range(NUM_KILLS):
        acknowledged = run_and_kill(tmp_path, seed=kill, num_acknowledged=rng.randint(1, 80))
        issued |= {number for what, number in acknowledged if what == "issue"}
        dropped |= {number for what, number in acknowledged if what == "drop"}
        committed_steps += [number for what, number in acknowledged if what == "commit"]

        audit = audit_run(tmp_path)
        assert audit.holds, str(audit)
        with Ledger(tmp_path) as ledger:
            rows = {instance.ordinal: instance for instance in ledger.instances()}
            last = ledger.last_commit()
        assert issued <= rows.keys()
        assert all(rows[ordinal].state == "dropped" for ordinal in dropped)
        if committed_steps:
            assert last is not None
            assert last.step >= max(committed_steps)
            assert last.checkpoint == f"step_{last.step}"
        sizes = Counter(row.step for row in rows.values() if row.state == "committed")
        assert set(sizes) == set(range(1, (last.step if last else 0) + 1))
        assert set(sizes.values()) <= {GROUPS_PER_STEP}

    assert len(committed_steps) == len(set(committed_steps)), "no step was committed twice"
    assert audit.num_committed > 10 * GROUPS_PER_STEP, "the kills left enough work between them to mean something"
    assert audit.num_requeued > NUM_KILLS / 2, "most kills hit instances on their way"
