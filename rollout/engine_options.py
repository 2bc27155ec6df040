"""Which options and environment an SGLang server is launched with, on CPUs and on CUDA."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from slime.config import EngineConfig
from slime.errors import ConfigError

LOAD_FORMAT = "rollout.weight_loader.load_staged"
"""The weight loader, as SGLang names it at launch and in each update."""

STUBS = Path(__file__).parent / "sglang_stubs"

CPU_OPTIONS: dict[str, Any] = {
    "attention_backend": "torch_native",
    "mem_fraction_static": 0.1,
    "max_total_tokens": 32768,
    "sleep_on_idle": True,  # an idle scheduler otherwise spins on the core that the trainer needs
}

CUDA_OPTIONS: dict[str, Any] = {"enable_memory_saver": True}  # offload and onload

OWNED = {
    "model_path": "model.path",
    "device": "profile.device",
    "tp_size": None,
    "port": "profile.engine.base_port",
    "max_running_requests": "profile.engine.max_running_requests",
    "enable_deterministic_inference": "profile.engine.deterministic",
    "host": "",
    "api_key": "",
    "admin_api_key": "",
    "weight_version": "",
    "custom_weight_loader": "",
}
"""Options that slime sets itself → its own key for them, if there is one."""


def server_options(model_path: str, *, config: EngineConfig, device: str, port: int, token: str) -> dict[str, Any]:
    """Fields of SGLang's ServerArgs for one engine: slime's, overridden by the user's ``[profile.engine.sglang]``.

    Raises:
        ConfigError: the user names an option that SGLang does not have or that slime sets itself.
    """
    check_options(config.sglang)
    on_cpu = device == "cpu"
    # A prefix hit changes the shapes of matrix products and so their rounding: equal bits need every prompt computed.
    deterministic = {"disable_radix_cache": True} if on_cpu else {"enable_deterministic_inference": True}
    return {
        "model_path": model_path,
        "device": device,
        "host": "127.0.0.1",
        "port": port,
        # Both keys: with only one, either generation or the weight and pause endpoints would be open to everyone.
        "api_key": token,
        "admin_api_key": token,
        "weight_version": "0",
        "custom_weight_loader": [LOAD_FORMAT],
        "max_running_requests": config.max_running_requests,
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "skip_server_warmup": True,
        "log_level_http": "warning",
        **(CPU_OPTIONS if on_cpu else CUDA_OPTIONS),
        **(deterministic if config.deterministic else {}),
        **config.sglang,
    }


def server_environment(
    environment: Mapping[str, str], *, config: EngineConfig, device: str, threads: int, scratch: str
) -> dict[str, str]:
    """`environment` with what an engine's processes need on top; `scratch` takes the sockets SGLang leaves behind."""
    changed = {
        "SGLANG_PLUGINS": "slime",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "TMPDIR": scratch,
        # Clients drop an idle connection after 15 s. A server that did so first (SGLang: after 5 s) would now and then
        # do it under a request that is just being sent.
        "SGLANG_TIMEOUT_KEEP_ALIVE": "600",
    }
    if device == "cpu":
        changed["PYTHONPATH"] = ":".join(filter(None, [str(STUBS), environment.get("PYTHONPATH")]))
        changed["SGLANG_USE_CPU_ENGINE"] = "1"
        changed["GLOO_SOCKET_IFNAME"] = "lo"
        changed["SLIME_SEEDED_SAMPLING"] = "1" if config.deterministic else "0"
    return {**environment, **changed}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that SGLang does not have or that slime sets itself.

    Raises:
        ConfigError: names the key, the nearest right one, and slime's own key where there is one.
    """
    for name in options:
        key = f"profile.engine.sglang.{name}"
        if name in OWNED:
            instead = f"set {OWNED[name]} instead, or leave it out" if OWNED[name] else "leave it out"
            raise ConfigError(f"{key}: slime sets this option itself; {instead}")
        if name not in option_names():
            near = difflib.get_close_matches(name, option_names(), n=1)
            guess = f"did you mean {near[0]!r}? Otherwise" if near else "correct its name, or"
            raise ConfigError(f"{key}: the installed SGLang has no such option; {guess} leave it out")


@cache
def option_names() -> frozenset[str]:
    """Field names of the installed SGLang's ServerArgs, read from its source: importing it takes seconds and torch.

    Raises:
        ConfigError: SGLang is not installed, or is not of the version slime knows.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise ConfigError("sglang is not installed; run `make setup`, or install slime-rl[gpu] on a machine with GPUs")
    source = Path(spec.origin).parent / "srt" / "arg_groups" / "field_order.py"
    if not source.exists():
        raise ConfigError(f"{source} is missing: this SGLang is not the version pyproject.toml names; install that one")
    (names,) = [
        ast.literal_eval(node.value) for node in ast.parse(source.read_text()).body if isinstance(node, ast.Assign)
    ]
    return frozenset(names)
