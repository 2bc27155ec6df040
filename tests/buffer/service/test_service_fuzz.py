"""The service as a client sees it that knows nothing but its OpenAPI document."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from buffer.ledger import Ledger
from buffer.local import LocalBuffer
from buffer.policy import Policy
from buffer.prompts.order import PromptOrder
from tests.builders import make_group, make_prompt
from tests.served import TOKEN, served

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent


def open_buffer(ledger: Ledger) -> LocalBuffer:
    """With leases out (the first has a partial group), room for more, and groups to take."""
    prompts = PromptOrder([make_prompt(f"{i:016x}", text=f"{i} + 1 =") for i in range(7)], seed=0, shuffle=False)
    buffer = LocalBuffer(ledger, prompts, Policy(groups_per_step=500, num_steps=100, max_staleness=1))
    asyncio.get_running_loop().create_task(fill(buffer))
    return buffer


async def fill(buffer: LocalBuffer) -> None:
    await buffer.published(0)
    leases = [await buffer.admit() for _ in range(8)]
    groups = [make_group(uid=lease.prompt.uid, ordinal=lease.ordinal) for lease in leases]
    await buffer.requeue(leases[0], reason="parked", partial=groups[0])
    await buffer.admit()
    await buffer.put(leases[7], groups[7], keep=True)


def test_no_input_makes_the_service_fail_or_break_its_own_description(tmp_path: Path) -> None:
    """Pins: a 5xx for input from outside, an undocumented answer, a body that is accepted against its schema, and a
    path that answers without the token."""
    with served(tmp_path, open_buffer=open_buffer, max_wait_s=0.02) as url:
        fuzz = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml")),
                *("--no-color", "run", f"{url}/openapi.json", "--header", f"Authorization: Bearer {TOKEN}"),
                *("--checks", "all", "--warnings", "off"),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=55,
        )
    assert fuzz.returncode == 0, fuzz.stdout + fuzz.stderr
    with Ledger(tmp_path) as ledger:
        assert ledger.audit().holds, str(ledger.audit())
