"""What holds in every order of events that a test can draw.

The moves and the checks after each are Chaos in conftest.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hacrl_exchange.broker.core.pool import decide, evolve
from hacrl_exchange.broker.core.records import Record, RecordBody
from hacrl_exchange.broker.core.state import PoolState
from hacrl_exchange.broker.record_codec import (
    decode_record,
    encode_record,
    snapshot_from_bytes,
    snapshot_to_bytes,
)
from hacrl_exchange.types import PoolSpec, StepState

if TYPE_CHECKING:
    from tests.unit.core.conftest import Chaos, World

MOVES = (
    *("join", "rejoin", "steal", "touch", "leave", "publish", "publish_all", "repeat", "differ"),
    *("zombie", "late", "work", "report", "worker_dies", "ack", "out_of_turn", "wait", "outage"),
    *("restart", "power_loss"),
)
# Two members and a first publish, so that most runs get somewhere; moves are drawn from there on.
OPENING = [("join", 0, 0), ("join", 1, 0)]
COMMON = ("publish_all", "publish", "work", "report", "touch", "wait")

CHILD = """
import hashlib, json, runpy, sys
from hacrl_exchange.broker.record_codec import encode_record, snapshot_to_bytes
names = runpy.run_path(sys.argv[1])
job = json.load(sys.stdin)
chaos = names["Chaos"](names["small_spec"](**job["spec"]))
chaos.run(job["moves"])
folded = names["folded"](chaos.world.records)
records = b"".join(encode_record(record) for record in chaos.world.records)
digests = [records, snapshot_to_bytes(folded), snapshot_to_bytes(chaos.world.state)]
print(json.dumps([hashlib.sha256(part).hexdigest() for part in digests]))
"""


def moves_of(seed: int, *, count: int) -> list[tuple[str, int, int]]:
    chance = random.Random(seed)
    names = [*MOVES, *COMMON, *COMMON]
    drawn = [(chance.choice(names), chance.randrange(4), chance.randrange(60)) for _ in range(count)]
    return [*OPENING, *drawn]


def assert_replays(chaos: Chaos, fold: Callable[[list[Record]], PoolState]) -> None:
    """The fold of the records, through their bytes, is the state that was lived through."""
    for record in chaos.world.records:
        assert decode_record(encode_record(record)) == record
    again = fold(chaos.world.records)
    assert again == chaos.world.state
    assert snapshot_to_bytes(again) == snapshot_to_bytes(chaos.world.state)


def fold(records: list[Record]) -> PoolState:
    state: PoolState | None = None
    for record in records:
        state = evolve(state, decode_record(encode_record(record)))
    assert state is not None
    return state


SPECS = st.fixed_dictionaries(
    {
        "max_open_steps": st.integers(1, 3),
        "min_members": st.integers(1, 3),
        "max_steps": st.sampled_from([0, 0, 4]),
        "retained_steps": st.integers(0, 2),
    }
)
DRAWN = st.lists(
    st.tuples(st.sampled_from([*MOVES, *COMMON]), st.integers(0, 3), st.integers(0, 59)),
    min_size=5,
    max_size=80,
)


@pytest.mark.slow
@given(SPECS, DRAWN)
@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the fixtures are classes, without state
)
def test_every_order_of_events_keeps_the_books_and_the_deadlines(
    make_chaos: Callable[[PoolSpec], Chaos],
    make_spec: Callable[..., PoolSpec],
    spec: dict[str, int],
    moves: list[tuple[str, int, int]],
) -> None:
    chaos = make_chaos(make_spec(**spec))
    chaos.run([*OPENING, *moves])
    assert_replays(chaos, fold)
    chaos.world.advance(1000)
    chaos.check()
    assert not chaos.world.state.open_steps or chaos.world.state.active_agents()


@pytest.mark.slow
def test_long_runs_keep_them_too_and_reach_every_corner(
    make_chaos: Callable[[PoolSpec], Chaos], make_spec: Callable[..., PoolSpec]
) -> None:
    reasons: set[str] = set()
    kinds: set[str] = set()
    for seed in range(10):
        chaos = make_chaos(make_spec(max_open_steps=1 + seed % 3, retained_steps=seed % 3))
        chaos.run(moves_of(seed, count=400))
        assert_replays(chaos, fold)
        assert chaos.world.state.last_step > 5
        reasons.update(chaos.refusals)
        kinds.update(type(record.body).__name__ for record in chaos.world.records)
    assert reasons == {
        *("AGENT_TAKEN", "ALREADY_VERIFIED", "INVALID_REQUEST", "NOT_JOINED", "NOT_ON_ROSTER"),
        *("SESSION_SUPERSEDED", "SLOT_TAKEN", "STEP_CLOSED", "STEP_NOT_FOUND", "STEP_RETIRED"),
    }
    assert kinds == {kind.__name__ for kind in get_args(RecordBody)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_processes_with_other_hash_seeds_decide_and_fold_the_same_bytes(seed: int) -> None:
    spec = {"max_open_steps": 2, "retained_steps": 1}
    job = json.dumps({"spec": spec, "moves": moves_of(seed, count=150)})
    digests = set()
    for hash_seed in ("0", "1", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(Path(__file__).with_name("conftest.py"))],
            input=job,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            timeout=60,
        )
        records, folded, lived = json.loads(done.stdout)
        assert folded == lived
        digests.add((records, folded))
    assert len(digests) == 1


def test_the_same_commands_make_the_same_records(
    make_chaos: Callable[[PoolSpec], Chaos], make_spec: Callable[..., PoolSpec]
) -> None:
    runs = []
    for _ in range(2):
        chaos = make_chaos(make_spec())
        chaos.run(moves_of(3, count=80))
        runs.append(hashlib.sha256(b"".join(map(encode_record, chaos.world.records))).hexdigest())
    assert runs[0] == runs[1]


def test_a_snapshot_at_any_record_continues_like_the_whole_log(world: World) -> None:
    world.publish("a")
    world.publish("b", 0)
    world.judge_all(1.0, None)
    world.advance(60)
    world.join("c")
    world.advance(60)
    for middle in range(1, len(world.records)):
        state = fold(world.records[:middle])
        restored = snapshot_from_bytes(snapshot_to_bytes(state))
        assert restored == state
        for record in world.records[middle:]:
            restored = evolve(restored, record)
        assert snapshot_to_bytes(restored) == snapshot_to_bytes(world.state)


def test_deciding_and_evolving_a_publish_costs_the_same_in_a_large_step(
    make_world: Callable[..., World], make_spec: Callable[..., PoolSpec]
) -> None:
    """No scan of the step per group: the work per publish is counted in lookups, not in seconds."""
    world = make_world(make_spec(prompts_per_step=400), prompt_count=400)
    world.join("a")
    world.join("b")
    step = world.state.open_steps[1]

    class Counting(dict[tuple[int, int], object]):
        scans = 0

        def __iter__(self):  # type: ignore[no-untyped-def]  # only counted
            Counting.scans += 1
            return super().__iter__()

        items = values = keys = __iter__

    step.groups = Counting(step.groups)  # type: ignore[assignment]  # a dict that counts
    for index in range(399):
        command = world.publish_command("a", index)
        body = decide(world.state, command, now_us=world.now_us)
        assert body is not None
        evolve(world.state, Record(world.now_us, body))
    assert (Counting.scans, len(step.groups), step.state) == (0, 399, StepState.PUBLISHING)
