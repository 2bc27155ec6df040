"""The real service, killed at random moments, with replies lost and consumers dead: see `buffer.chaos.run`."""

from __future__ import annotations

from pathlib import Path

from buffer.chaos.run import run_chaos

NUM_KILLS = 60
SEED = 0


async def test_a_service_that_is_killed_over_and_over_keeps_every_promise(tmp_path: Path) -> None:
    """Pins: an acknowledged group that is lost, trained twice, torn or too old; a fenced consumer that is believed.

    The counts are witnesses: every kind of harm has come about, and work was done in between.
    """
    report = await run_chaos(tmp_path, seed=SEED, num_kills=NUM_KILLS)
    assert report.problems == (), f"seed {SEED}, history {tmp_path / 'history.jsonl'}: {report.problems[:10]}"
    assert report.num_kills == NUM_KILLS
    assert 0 < report.num_stillborn < NUM_KILLS / 2
    assert report.num_lost_replies > NUM_KILLS / 2
    assert report.num_dead_consumers > 0
    assert report.num_unknown > 0
    assert report.num_refused > 0
    assert report.num_steps > NUM_KILLS / 6
