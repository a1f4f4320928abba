"""Verifiers for the tests, imported by real zygotes as `sample_verifiers:NAME`."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hacrl_verifiers.api import Item, Json, Result, verifier


# -- start same-length --
@verifier(name="same_length", version="1", config={"tolerance": 0})
def same_length(response: str, reference: Json, *, config: Mapping[str, Json]) -> float | None:
    """1 if the response is as long as the reference; not applicable without a reference."""
    if reference is None:
        return None
    return float(abs(len(response) - len(reference)) <= config["tolerance"])


# -- end same-length --


# -- start batch --
@verifier(name="known_words", version="1", config={"words": ["yes", "no"]})
class KnownWords:
    """The share of a response's words that are known; looked up in one go for a whole batch."""

    def setup(self, config: Mapping[str, Json]) -> None:
        self.words = frozenset(config["words"])

    def verify(self, items: Sequence[Item]) -> Sequence[Result]:
        found = [[word in self.words for word in item.response.split()] for item in items]
        return [sum(known) / len(known) if known else None for known in found]


# -- end batch --


@verifier(name="equal", version="3", full_score=2.0)
def equal(response: str, reference: Json) -> float:
    return 1.0 if response == reference else 0.0


@verifier(name="returns", version="1")
def returns(response: str, reference: Json) -> Result:
    """Returns what the reference says, in Python: only for tests."""
    names = {"nan": float("nan"), "many": {str(n): 1.0 for n in range(100)}}
    result: Result = eval(str(reference), names)
    return result


def _spin() -> None:
    while True:
        pass


def _hang_in_c() -> None:
    ctypes.CDLL(None).pause()


def _alarm_and_go() -> None:
    signal.alarm(1)


def _alarm_and_wait() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    signal.pause()


def _ignore_signals_and_hang() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    _spin()


def _recurse() -> None:
    def deeper(depth: int) -> int:
        return deeper(depth + 1) + 1

    deeper(0)


def _segfault() -> None:
    ctypes.string_at(0)


def _kill_the_zygote() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()


def _raise_keyboard_interrupt() -> None:
    raise KeyboardInterrupt


class _UnshowableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def _raise_unshowable() -> None:
    raise _UnshowableError


def _write_much() -> None:
    for _ in range(100):
        os.write(1, b"x" * (1 << 20))
    print("y" * (1 << 20))
    print("y" * (1 << 20), file=sys.stderr)


def _raise_much() -> None:
    raise ValueError("z" * (5 << 20))


def _leave_processes() -> None:
    """A grandchild in a session of its own, whose parent ends; its pid goes to the file the test reads."""
    marker = os.environ["SAMPLE_PIDS"]
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with open(marker, "a") as file:
                file.write(f"{os.getpid()}\n")
            _hang_in_c()
        os._exit(0)
    os.wait()
    while not Path(marker).exists() or not Path(marker).read_text().endswith("\n"):
        pass
    os._exit(0)


def _run_a_program() -> None:
    subprocess.run(["sleep", "1000"], check=True)


def _write_noise_to_every_socket() -> None:
    for fd in range(3, 20):
        try:
            os.write(fd, b"\xff" * 64)
        except OSError:
            continue
    _spin()


def _lie_about_time() -> None:
    time.monotonic = lambda: 1e12


DEEDS: dict[str, Callable[[], object]] = {
    "spin": _spin,
    "hang in c": _hang_in_c,
    "exit": lambda: os._exit(0),
    "kill itself": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill its group": lambda: os.killpg(0, signal.SIGKILL),
    "kill the zygote": _kill_the_zygote,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "system exit": lambda: sys.exit(3),
    "keyboard interrupt": _raise_keyboard_interrupt,
    "alarm and go": _alarm_and_go,
    "alarm and wait": _alarm_and_wait,
    "ignore signals": _ignore_signals_and_hang,
    "recurse": _recurse,
    "segfault": _segfault,
    "much memory": lambda: bytearray(8 << 30),
    "much output": _write_much,
    "much text": _raise_much,
    "unshowable": _raise_unshowable,
    "fork and return": os.fork,
    "close descriptors": lambda: os.closerange(0, 256),
    "leave processes": _leave_processes,
    "run a program": _run_a_program,
    "noise": _write_noise_to_every_socket,
    "lie": _lie_about_time,
}


@verifier(name="hostile", version="1")
def hostile(response: str, reference: Json) -> float:
    """Does what the response says."""
    if response in DEEDS:
        DEEDS[response]()
    return 1.0


@verifier(name="hostile_batch", version="1")
class HostileBatch:
    """The same, in batches."""

    def verify(self, items: Sequence[Item]) -> Sequence[Result]:
        for item in items:
            if item.response in DEEDS:
                DEEDS[item.response]()
        return [None if item.response == "none" else 1.0 for item in items]


@verifier(name="short_batch", version="1")
class ShortBatch:
    """Returns one result too few for more than one item."""

    def verify(self, items: Sequence[Item]) -> Sequence[Result]:
        return [1.0] * max(1, len(items) - 1)


@verifier(name="bad_setup", version="1")
class BadSetup:
    """Does what its configuration says, too early."""

    def setup(self, config: Mapping[str, Json]) -> None:
        raise RuntimeError("the model file is missing")

    def verify(self, items: Sequence[Item]) -> Sequence[Result]:
        return [1.0 for _ in items]


@verifier(name="dying_setup", version="1")
class DyingSetup:
    """Dies before it can judge anything."""

    def setup(self, config: Mapping[str, Json]) -> None:
        os._exit(1)

    def verify(self, items: Sequence[Item]) -> Sequence[Result]:
        return [1.0 for _ in items]


@verifier(name="environment", version="1")
def environment(response: str, reference: Json) -> float:
    """1 if the variable named by the response exists."""
    return response in os.environ


@verifier(name="spoils", version="1")
def spoils(response: str, reference: Json) -> float:
    """Changes its copy of the reference; 1 if it came unchanged."""
    unchanged = bool(reference == {"answer": ["4"]})
    reference["answer"].append("5")
    return unchanged


@verifier(name="sees", version="1", needs_tokens=True)
def sees(response: str, reference: Json, *, item: Item) -> dict[str, float]:
    """What an item holds."""
    tokens = item.token_ids or ()
    return {"score": 1.0, "tokens": float(sum(tokens)), "messages": float(len(item.prompt.messages))}


@verifier(name="gated", version="1")
def gated(response: str, reference: Json) -> float:
    """Waits at the named pipe SAMPLE_GATE until the test writes to it."""
    if response == "wait":
        with open(os.environ["SAMPLE_GATE"]) as gate:
            return float(gate.read())
    return 0.5
