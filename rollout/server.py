"""The engine's own process, ``python -P -m rollout.server``: the only place that launches SGLang.

    stdin, first line ── {"options": {field of ServerArgs: value}, "scratch": directory} ──► SGLang's HTTP server
    stdin, end of file ── the parent is gone ──► the whole process group is killed

The arguments come through the pipe because they hold the run's token, and command lines can be read by every user of
the machine. The same pipe ties the engine's life to its parent's: the kernel closes it however the parent dies. The
parent starts this process as the leader of a new session, so that its group is exactly the engine.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from typing import Any

from rollout.process_group import kill_group

STDIN = 0


def main() -> None:
    """Serve until killed."""
    arguments = json.loads(sys.stdin.readline())
    watch = threading.Thread(target=_die_with_parent, args=[arguments["scratch"]], name="die-with-parent", daemon=True)
    watch.start()
    serve(arguments["options"])


def _die_with_parent(scratch: str) -> None:
    # Not PR_SET_PDEATHSIG: it fires when the parent's *thread* ends, and an actor starts engines from any thread.
    os.read(STDIN, 1)
    shutil.rmtree(scratch, ignore_errors=True)
    kill_group(os.getpgrp())


def serve(options: dict[str, Any]) -> None:
    """Launch SGLang with these fields of its ServerArgs. Raises TypeError for a field it does not have."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    _require_hooks()

    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(**options)
    arguments.resolve_once()
    launch_server(arguments)


def _require_hooks() -> None:
    """SGLang only logs a plugin that fails; without ours, seeds would be ignored in silence."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from rollout.sglang_plugin import hooks

    missing = hooks().keys() - HookRegistry._patched
    if missing:
        sys.exit(
            f"SGLang did not apply slime's hooks on {', '.join(sorted(missing))}. Install slime again so that its "
            "entry point is found (pip install -e .), or install the SGLang version that pyproject.toml names"
        )


if __name__ == "__main__":
    main()
