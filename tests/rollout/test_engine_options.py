from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import aiohttp
import pytest

from rollout.engine import SGLangEngine, reserve_port
from rollout.engine_options import option_names, server_environment, server_options
from slime.config import EngineConfig
from slime.errors import ConfigError, EngineError
from tests.rollout.engines import make_engine


def options(*, device: str = "cpu", **config: object) -> dict[str, object]:
    return server_options(
        "/model", config=EngineConfig.model_validate(config), device=device, port=1234, token="secret"
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_every_option_slime_sets_exists_in_the_installed_sglang(device: str, deterministic: bool) -> None:
    """Pins the option names against SGLang's own list: the CUDA ones are not exercised by a CPU run."""
    assert set(options(device=device, deterministic=deterministic)) <= option_names()


def test_the_users_options_win() -> None:
    """Pins the one table through which SGLang's options pass."""
    assert options(sglang={"max_total_tokens": 99, "log_level": "debug"})["max_total_tokens"] == 99


def test_a_misspelt_option_is_refused_with_the_nearest_right_one() -> None:
    """Pins that an option without effect is noticed before an engine starts."""
    with pytest.raises(ConfigError, match=r"mem_fraction_statik.*did you mean 'mem_fraction_static'"):
        options(sglang={"mem_fraction_statik": 0.5})


@pytest.mark.parametrize(("name", "instead"), [("tp_size", "leave it out"), ("api_key", "leave it out")])
def test_an_option_that_slime_owns_is_refused_with_slimes_own_key(name: str, instead: str) -> None:
    """Pins that the run's token, ports and versions are never overridden by accident."""
    with pytest.raises(ConfigError, match=instead):
        options(sglang={name: "x"})


def test_a_cuda_engine_gets_no_stub_and_no_cpu_option() -> None:
    """Pins that stand-ins for CUDA kernels never shadow the real ones."""
    given = {"config": EngineConfig(), "threads": 1, "scratch": "/s"}
    environment = server_environment({"PYTHONPATH": "/mine"}, device="cuda", **given)
    assert environment["PYTHONPATH"] == "/mine"
    assert "SGLANG_USE_CPU_ENGINE" not in environment
    assert "attention_backend" not in options(device="cuda")
    assert server_environment({"PYTHONPATH": "/mine"}, device="cpu", **given)["PYTHONPATH"].endswith(
        "sglang_stubs:/mine"
    )


def test_a_taken_port_is_named_with_two_ways_out() -> None:
    """Pins the message of a collision, which would otherwise come late and from SGLang."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        base = taken.getsockname()[1] - 3
        with pytest.raises(EngineError, match=rf"port {base + 3} for engine 3 is taken.*another base_port.*leave it"):
            reserve_port(base, index=3)


def test_engines_count_up_from_the_base_port() -> None:
    """Pins that two engines of one run do not want the same port."""
    with reserve_port(None, index=0) as free:
        port = free.getsockname()[1]
    with reserve_port(port - 2, index=2) as reservation:
        assert reservation.getsockname()[1] == port


@pytest.mark.parametrize("given", [True, False])
def test_a_reserved_port_is_given_to_nobody_but_the_server(given: bool) -> None:
    """Pins an engine whose port went to an outgoing connection while it started: it neither served nor ended."""
    with reserve_port(None, index=0) as free:
        base = free.getsockname()[1] if given else None
    with reserve_port(base, index=0) as reservation, socket.socket() as other:
        address = reservation.getsockname()
        with pytest.raises(OSError, match="in use"):
            other.bind(address)
        with socket.create_server(address) as server, socket.create_connection(address) as client:
            accepted, peer = server.accept()
            accepted.close()
            assert peer == client.getsockname()


def test_connections_of_an_earlier_run_do_not_take_the_port() -> None:
    """Pins a run that is refused its own base_port for a minute after it was killed."""
    with reserve_port(None, index=0) as reservation:
        address = reservation.getsockname()
        with socket.create_server(address) as server, socket.create_connection(address) as client:
            server.accept()[0].close()  # the side that closes first lingers
            client.recv(1)
    reserve_port(address[1], index=0).close()


async def test_a_call_on_an_engine_that_does_not_run_says_so(tmp_path: Path) -> None:
    """Pins the error of a wrong order of calls."""
    with pytest.raises(EngineError, match="not running"):
        await make_engine(tmp_path, tmp_path).pause()


@pytest.mark.stack
async def test_a_start_that_fails_ends_with_the_servers_own_last_lines(tmp_path: Path) -> None:
    """Pins that the reason is in the message, that it comes when the server ends, and that nothing is left running."""
    (tmp_path / "empty").mkdir()
    engine: SGLangEngine = make_engine(tmp_path / "empty", tmp_path)
    with pytest.raises(EngineError, match=r"(?s)ended while it started.*last lines of .*config\.json"):
        await engine.start()
    assert engine._process is None


@pytest.mark.stack
async def test_a_start_that_takes_too_long_is_given_up_at_its_deadline(tmp_path: Path) -> None:
    """Pins that a wait for an engine always ends."""
    engine = make_engine(tmp_path, tmp_path, start_timeout_s=0.5)
    with pytest.raises(EngineError, match=r"not healthy within 0\.5 s.*start_timeout_s"):
        await asyncio.wait_for(engine.start(), 30)
    assert engine._process is None


async def test_the_client_gives_up_an_idle_connection_long_before_the_server_does() -> None:
    """A server that closes first does it, now and then, under a request: a run then dies after an idle pause."""
    environment = server_environment({}, config=EngineConfig(), device="cpu", threads=1, scratch="/tmp")
    connector = aiohttp.TCPConnector()
    assert float(environment["SGLANG_TIMEOUT_KEEP_ALIVE"]) > 4 * connector._keepalive_timeout
    await connector.close()
