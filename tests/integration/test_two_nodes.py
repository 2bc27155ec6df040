"""The same run on a Ray cluster of two nodes, joined by its address."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.cluster import Cluster
from slime.errors import ConfigError
from tests.integration.task import Training, audit, make_task, rows

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

CLUSTER = """\
import os, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
PROFILE = """\
[placement]
ray_address = "{address}"
[engine]
num_engines = 2
[engine.sglang]
max_total_tokens = 4096
[trainer]
num_ranks = 2
tokens_per_microbatch = 256
"""


@pytest.fixture
def address() -> Iterator[str]:
    """Two nodes with one CPU each, in a process that ends with its standard input."""
    environment = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.communicate(timeout=60)


def test_a_run_spreads_over_the_nodes_of_a_cluster_it_joins(address: str, tmp_path: Path) -> None:
    """Placement groups, data-parallel ranks that meet over the network, and two engines that get every publish."""
    run_file = make_task(tmp_path)
    (tmp_path / "profile.toml").write_text(PROFILE.format(address=address))
    with Training(run_file, tmp_path / "run", "num_steps=2") as run:
        assert run.wait() == 0, run.text()
    steps = [row for row in rows(run.run_dir) if "time/step_s" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["staleness/max"] == 0 and row["mismatch/logprob_abs_mean"] < 0.03 for row in steps)
    assert {path.name for path in (run.run_dir / "logs").iterdir()} >= {"engine_0.log", "engine_1.log"}
    assert audit(run.run_dir).holds


def test_an_address_where_no_cluster_answers_is_refused_at_once(tmp_path: Path) -> None:
    """Ray alone would try for minutes, without a word."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match="ray_address"):
            Cluster(address=f"127.0.0.1:{unused.getsockname()[1]}", num_devices=1, device="cpu")
