"""A crash at every transaction of a small run, and what its continuation ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.crash_points import main


def test_a_crash_at_any_transaction_leaves_no_trace_in_the_result(tmp_path: Path) -> None:
    """Pins: rollouts lost or trained twice on resume, and a resumed run that ends with other weights or samples."""
    crashes: list[dict[str, Any]] = []
    main(tmp_path, report=crashes.append)
    assert len(crashes) >= 100
    assert all(crash["died"] for crash in crashes)
    assert [crash for crash in crashes if crash["audits"] or not crash["equal"]] == []
