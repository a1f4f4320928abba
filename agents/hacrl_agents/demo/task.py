"""The demo's task: sums of two three-digit numbers from reasoning-gym, answered with worked columns.

A worked answer adds digit by digit from the right, then states the result: for 404 + 666
`4+6=10;0+6+1=7;4+6=10;<answer>1070</answer>`. A hash puts every pair of operands, in whatever order, into
one of three worlds: the warm starts' examples, training prompts and held-out prompts never share a sum.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any, Final

FAMILY: Final = "basic_arithmetic"
SOURCE: Final = "reasoning-gym/basic_arithmetic"

_DIGITS = 3
_SMALLEST, _LARGEST = 10 ** (_DIGITS - 1), 10**_DIGITS - 1
_CONFIG: Final[dict[str, Any]] = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": _DIGITS,
    "max_digits": _DIGITS,
    "operators": ["+"],
    "allow_parentheses": False,
    "allow_negation": False,
}
_SEED_DISTANCE = 1_000_003
"""Data sets draw item i with seed + i, so neighbouring seeds would share items."""


@dataclass(frozen=True)
class Problem:
    """One sum, with the reasoning-gym entry it comes from."""

    first: int
    second: int
    entry_json: str
    """The entry as reasoning-gym made it, as JSON: what its scorer wants back."""

    @property
    def question(self) -> str:
        """The text that agents see."""
        return question(self.first, self.second)

    @property
    def prompt_id(self) -> str:
        """Names the prompt."""
        return f"sum-{self.first}-{self.second}"

    @property
    def source(self) -> str:
        """Where it comes from."""
        return SOURCE


class World(Enum):
    """What a pair of operands may be used for."""

    WARM_START = "warm start"
    TRAINING = "training"
    HELD_OUT = "held out"


def world(first: int, second: int) -> World:
    """Returns the one world that a sum belongs to: half are for warm starts, a tenth is held out."""
    smaller, larger = min(first, second), max(first, second)
    bucket = hashlib.sha256(f"{smaller}+{larger}".encode()).digest()[0]
    if bucket < 26:
        return World.HELD_OUT
    return World.TRAINING if bucket < 128 else World.WARM_START


@dataclass(frozen=True)
class Split:
    """The problems of a run."""

    training: tuple[Problem, ...]
    held_out: tuple[Problem, ...]


def make_split(seed: int, *, training: int, held_out: int) -> Split:
    """Returns a run's problems. The seed draws those to train on; those held out are always the same."""
    return Split(
        training=_problems(World.TRAINING, training, seed=seed + 1),
        held_out=_problems(World.HELD_OUT, held_out, seed=0),
    )


def question(first: int, second: int) -> str:
    """Returns the question as reasoning-gym words it."""
    return f"Calculate {first} + {second}."


def worked_answer(first: int, second: int) -> str:
    """Returns the answer that the agents imitate: columns from the right, then the tagged result."""
    columns, carry = [], 0
    left, right = str(first)[::-1], str(second)[::-1]
    for a, b in zip(left, right, strict=True):
        total = int(a) + int(b) + carry
        columns.append(f"{a}+{b}+1={total};" if carry else f"{a}+{b}={total};")
        carry = total // 10
    return f"{''.join(columns)}<answer>{first + second}</answer>"


def draw_warm_start_pair(rng: Random, *, parity: int, own_share: float) -> tuple[int, int]:
    """Returns the operands of an example for an agent that grew up with one half of the numbers.

    Its half are the numbers whose hundreds digit has the given parity (0 even, 1 odd). With probability
    `own_share` both operands are of that half, otherwise they are any.
    """
    if rng.random() >= own_share:
        return any_warm_start_pair(rng)
    while True:
        pair = any_warm_start_pair(rng)
        if all(number // _SMALLEST % 2 == parity for number in pair):
            return pair


def any_warm_start_pair(rng: Random) -> tuple[int, int]:
    """Returns two operands of the warm starts' world."""
    while True:
        pair = rng.randint(_SMALLEST, _LARGEST), rng.randint(_SMALLEST, _LARGEST)
        if world(*pair) is World.WARM_START:
            return pair


def write_prompts(problems: Iterable[Problem], path: Path) -> Path:
    """Writes problems as the JSON lines that `hacrl prompts add` reads, and returns the path.

    The reference is the whole reasoning-gym entry, so that the family's own scorer can judge.
    """
    lines = [
        json.dumps(
            {
                "id": problem.prompt_id,
                "prompt": problem.question,
                "reference": json.loads(problem.entry_json),
                "source": problem.source,
            },
            sort_keys=True,
        )
        for problem in problems
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def extract_answer(text: str) -> str | None:
    """Returns what stands between the last pair of answer tags, or None."""
    _, opened, rest = text.rpartition("<answer>")
    inner, closed, _ = rest.partition("</answer>")
    return inner if opened and closed else None


def score(text: str, entry: dict[str, Any]) -> float:
    """Returns the family's score of the extracted answer; what `hacrl agent --eval-scorer` calls."""
    answer = extract_answer(text)
    return 0.0 if answer is None else _scorer()(answer, entry)


@functools.cache
def _scorer() -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym  # a second to import, and only needed here

    scorer: Callable[[str, dict[str, Any]], float] = reasoning_gym.get_score_answer_fn(FAMILY)
    return scorer


def _problems(wanted: World, count: int, *, seed: int) -> tuple[Problem, ...]:
    import reasoning_gym

    entries = reasoning_gym.create_dataset(FAMILY, seed=seed * _SEED_DISTANCE, size=_SEED_DISTANCE, **_CONFIG)
    found: dict[frozenset[int], Problem] = {}
    for index in range(_SEED_DISTANCE):
        if len(found) == count:
            return tuple(found.values())
        entry = entries[index]
        # min_digits binds only the upper limit of the family's numbers: shorter ones come too.
        first, second = (int(term) for term in entry["metadata"]["expression"].split(" + "))
        in_range = all(_SMALLEST <= term <= _LARGEST for term in (first, second))
        if in_range and world(first, second) is wanted:
            problem = Problem(first, second, json.dumps(entry, sort_keys=True))
            found.setdefault(frozenset((first, second)), problem)
    raise ValueError(f"There are not {count} different sums for {wanted.value}: ask for fewer prompts.")
