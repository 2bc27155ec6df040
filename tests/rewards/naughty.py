"""Reward functions that misbehave, chosen by the sample's label. Loaded in worker processes only."""

import asyncio
import ctypes
import os
import re
import signal
import sys
import time

from rewards import Abstain, Failed, Score

HOARD = []


def good(sample):
    return Score(value=0.5, parts={"pid": os.getpid()})


def raises(sample):
    return int(sample.response)


def returns_none(sample):
    return None


def returns_nan(sample):
    return float("nan")


def returns_text(sample):
    return "1.0"


def abstains(sample):
    return Abstain(reason="no rule applies")


def exits(sample):
    sys.exit(3)


def loops(sample):
    while True:
        pass


def backtracks(sample):
    return re.match(r"(a+)+$", "a" * 60 + "b")


def multiplies(sample):
    return 9**9**9


def blocks_signals(sample):
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    time.sleep(1000)


async def waits(sample):
    await asyncio.Event().wait()


async def answers_later(sample):
    await asyncio.sleep(0.01)
    return True


def dies(sample):
    print("last words", flush=True)
    os._exit(7)


def crashes(sample):
    ctypes.string_at(0)


def allocates(sample):
    return len(bytearray(1 << 50))


def leaks(sample):
    HOARD.append(b"x" * (30 << 20))
    return Score(value=1.0, parts={"pid": os.getpid()})


def prints(sample):
    line = "x" * 999 + "\n"
    for _ in range(100_000):
        sys.stdout.write(line)
    return 1.0


def leaves_children(sample):
    if os.fork() == 0:
        time.sleep(1000)
    if os.fork() == 0:
        os.setsid()  # leaves the process group as well
        time.sleep(1000)
    return 1.0


def answers_twice(sample):
    return 1.0 if os.fork() else 0.0


def dies_once(sample):
    if os.path.exists(sample.response):
        return 1.0
    open(sample.response, "w").close()
    os._exit(7)


def fails_once(sample):
    if os.path.exists(sample.response):
        return 1.0
    open(sample.response, "w").close()
    return Failed(kind="judge_down", detail="", retryable=True)


def has_torch(sample):
    return "torch" in sys.modules


def score(sample):
    return globals()[sample.label](sample)
