"""The Ray cluster a run lives in. Ray is imported nowhere else.

A run reserves one bundle a device (a placement group) and puts its actors into the bundles; in colocated mode an engine
and a training rank share a bundle, each taking half of the device.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slime.errors import ConfigError, SlimeError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 10.0
LOOPBACK = ("127.0.0.1:", "localhost:")
CHILDREN_STAY = {"RAY_kill_child_processes_on_worker_exit": "0"}
"""For actors: Ray would kill an engine's first process alone, before it can end the others and clean up."""
OBJECT_STORE_BYTES = 2**29
"""Of a Ray started here: batches on their way to the ranks are all it holds."""


class Actor:
    """A process of the run, holding one object whose methods are awaited through `call`."""

    def __init__(self, handle: Any, *, name: str, error: type[SlimeError]) -> None:
        self._handle = handle
        self._name = name
        self._error = error

    async def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        """Await a method of the actor's object.

        Raises:
            SlimeError: what the method raised, or the actor's own error class when it died or the deadline passed.
        """
        from ray.exceptions import RayActorError, RayTaskError

        reference = getattr(self._handle, method).remote(*args, **kwargs)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(reference.future()), timeout_s)
        except RayTaskError as failure:
            if isinstance(failure.cause, SlimeError):
                raise failure.cause from None
            trace = re.sub(r"\x1b\[\d+m", "", str(failure))
            raise self._error(f"{self._name}, {method}:\n{trace}") from None
        except RayActorError as failure:
            raise self._error(f"{self._name} died during {method}: {failure}") from None
        except TimeoutError:
            raise self._error(f"{self._name} did not finish {method} within {timeout_s:.0f} s") from None

    def kill(self) -> None:
        """End the process at once."""
        import ray

        ray.kill(self._handle)


class Cluster:
    """The bundles of one run, in a Ray started here or joined.

    Args:
        address: an existing cluster's, or None to start one that ends with this process.
        num_devices: bundles to reserve.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: the cluster cannot be reached, or has fewer free devices than asked for.
    """

    def __init__(self, *, address: str | None, num_devices: int, device: str) -> None:
        ray = _connect(address, num_devices=num_devices)
        from ray.util.placement_group import placement_group

        self._ray = ray
        bundle = {"CPU": 1.0} if device == "cpu" else {"CPU": 1.0, "GPU": 1.0}
        self._device = device
        self._group: PlacementGroup = placement_group([bundle] * num_devices, strategy="PACK")
        if not self._group.wait(START_TIMEOUT_S):
            have = {name: amount for name, amount in ray.cluster_resources().items() if name in ("CPU", "GPU")}
            self.close()
            raise ConfigError(
                f"the profile wants {num_devices} bundles of {bundle}; Ray has {have} in all, not all free.\n"
                "Free devices, or choose a smaller profile with --profile."
            )

        self._require_one_machine()

    def _require_one_machine(self) -> None:
        """Weights are published through memory that engines and trainer share."""
        from ray.util.placement_group import placement_group_table

        places = placement_group_table(self._group)["bundles_to_node_id"].values()
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in self._ray.nodes()}
        here = self._ray.util.get_node_ip_address()
        elsewhere = sorted({addresses[node] for node in places} - {here})
        if elsewhere:
            self.close()
            raise ConfigError(
                f"Ray placed part of the run on {', '.join(elsewhere)}, and this command runs on {here}.\n"
                "Give the command on a machine with enough free devices, or choose a profile with fewer."
            )

    def spawn(
        self,
        cls: type,
        *args: Any,
        bundle: int,
        name: str,
        error: type[SlimeError],
        env: Mapping[str, str],
        **kwargs: Any,
    ) -> Actor:
        """Start an actor of `cls` in a bundle. Its constructor runs there; the first `call` awaits it."""
        handle = (
            self._ray.remote(cls)
            .options(
                num_cpus=0.5,
                num_gpus=0.5 if self._device == "cuda" else 0,
                scheduling_strategy=self._in_bundle(bundle),
                runtime_env={"env_vars": {**CHILDREN_STAY, **env}},
            )
            .remote(*args, **kwargs)
        )
        return Actor(handle, name=name, error=error)

    async def address_of(self, *, bundle: int) -> str:
        """The host that a bundle is on."""
        task = self._ray.remote(_address).options(num_cpus=0, scheduling_strategy=self._in_bundle(bundle))
        host: str = await asyncio.wait_for(asyncio.wrap_future(task.remote().future()), START_TIMEOUT_S)
        return host

    def close(self) -> None:
        """Free the bundles, and end the cluster if it was started here. Ends every actor of the run."""
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._group)
        self._ray.shutdown()

    def _in_bundle(self, index: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)


def _connect(address: str | None, *, num_devices: int) -> Any:
    """Start or join Ray, and return the module.

    A cluster of our own stays on the loopback interface and wants a token of its own. Ray takes both from the
    environment when it is imported, so it is imported here. The switch's name speaks of other systems; on Linux it
    makes the node's address 127.0.0.1, and Ray's services then bind to nothing else.
    """
    if address is None or address.startswith(LOOPBACK):
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    else:
        _require_answer(address)
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if address is None:
        cpus = max(os.cpu_count() or 1, num_devices)
        ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        return ray
    try:
        ray.init(address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, error) from error
    return ray


def _require_answer(address: str) -> None:
    """Ray itself tries for minutes to reach an address where nothing listens."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # "auto": Ray looks it up on this machine
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"profile.placement.ray_address = {address!r}: no Ray cluster answers there ({error}).\n"
        "Start one with `ray start --head`, or remove the key to let slime start its own."
    )


def _address() -> str:
    import ray

    host: str = ray.util.get_node_ip_address()
    return host
