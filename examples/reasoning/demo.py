"""The whole of "thinking pays" in one command: data and model, warm start, GRPO, curves.

    python examples/reasoning/demo.py --seed 0 --run-dir runs/demo

It calls `slime` as you would; stopped, the same command continues. The run is in ``--run-dir``, its data and models in
``setup`` below it. A demo of another seed that is found there is moved aside.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import prepare

from slime.metrics import read
from slime.report import summary, write_report

PASS = "eval/held_out/pass@1"


class Demo:
    """One demo, and the note it keeps of its seed and of the seconds its commands took."""

    def __init__(self, run_dir: Path, *, seed: int) -> None:
        self.run_dir = run_dir
        self.setup = (run_dir / "setup").resolve()
        self._seed = seed
        self._note = self.setup / "demo.json"
        self._move_another_seed_aside()
        self.seconds: float = json.loads(self._note.read_text())["seconds"] if self._note.exists() else 0.0

    def run(self) -> None:
        """From nothing to a finished run, or on from where an earlier call stopped."""
        data, random, warm = self.setup / "data", self.setup / "model" / "random", self.setup / "model" / "warm"
        if not warm.exists():
            print("demo: making problems and a tiny model that has learned nothing yet", flush=True)
            prepare.prepare(self.setup, seed=self._seed)
            self._slime("sft", "sft.toml", {"model.path": random, "sft.data": data / "sft.jsonl", "sft.output": warm})
        places = {"run_dir": self.run_dir, "model.path": warm, "data.train": data / "train.jsonl"}
        self._slime("train", "run.toml", places)

    def conclude(self) -> None:
        """The summary, and how far held-out pass@1 came from the warm start."""
        rows = read(self.run_dir)
        passed = [row[PASS] for row in rows if PASS in row]
        print(summary(self.run_dir))
        picture = write_report(self.run_dir)
        print(
            f"demo: held-out pass@1 {passed[0]:.3f} -> {passed[-1]:.3f} in {rows[-1]['step']} steps, "
            f"{self.seconds / 60:.1f} min"
        )
        print(f"demo: curves in {picture}")

    def _slime(self, command: str, file: str, settings: dict[str, Path]) -> None:
        """One command, to its end. Leaves with its exit code if that is not 0."""
        assignments = [f"--set={name}={value}" for name, value in {"seed": self._seed, **settings}.items()]
        arguments = [command, os.path.relpath(prepare.HERE / file), *assignments]
        print(f"$ slime {shlex.join(arguments)}", flush=True)
        start = time.monotonic()
        with subprocess.Popen([Path(sys.executable).with_name("slime"), *arguments]) as process:
            signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches slime too: it commits and leaves
            signal.signal(signal.SIGTERM, lambda *_: process.terminate())
            code = process.wait()
        self.seconds += time.monotonic() - start
        self._note.write_text(json.dumps({"seed": self._seed, "seconds": self.seconds}))
        if code:
            sys.exit(f"demo: `slime {command}` left with exit code {code}; the same command continues")

    def _move_another_seed_aside(self) -> None:
        """Nothing is lost, and no run continues with data of another seed."""
        if self._note.exists() and (other := json.loads(self._note.read_text())["seed"]) != self._seed:
            aside = self.run_dir.with_name(f"{self.run_dir.name}-seed{other}-{time.strftime('%Y%m%d-%H%M%S')}")
            self.run_dir.rename(aside)
            print(f"demo: the demo of seed {other} is now in {aside}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    demo = Demo(arguments.run_dir, seed=arguments.seed)
    demo.run()
    demo.conclude()


if __name__ == "__main__":
    main()
