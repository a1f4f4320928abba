"""A pool driven by hand: time is a number, every record is kept, what is due happens when asked for.

A process of its own can load this file with runpy; so it imports nothing from pytest's side but fixtures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from hacrl_exchange.broker.core import timers
from hacrl_exchange.broker.core.pool import decide, evolve, record_time_us
from hacrl_exchange.broker.core.records import (
    Ack,
    CloseStep,
    Command,
    CreatePool,
    EndPublishing,
    GroupAccepted,
    Join,
    Leave,
    MemberJoined,
    OpenStep,
    PublishGroup,
    Record,
    RecordBody,
    RecordVerdicts,
    RetireSteps,
    StepClosed,
    StepOpened,
    StoredGroup,
    Touch,
    VerdictsRecorded,
)
from hacrl_exchange.broker.core.schedule import epoch_order
from hacrl_exchange.broker.core.state import PoolState
from hacrl_exchange.broker.core.verification import GroupRef, Lease, VerificationQueue, pending_groups
from hacrl_exchange.broker.record_codec import (
    decode_record,
    encode_record,
    snapshot_from_bytes,
    snapshot_to_bytes,
)
from hacrl_exchange.errors import ExchangeError
from hacrl_exchange.types import (
    Lockstep,
    ModelSpec,
    PoolSpec,
    Scored,
    Unscored,
    UnscoredKind,
    Verdict,
    VerificationPlan,
    VerifierUse,
)

SECOND = 1_000_000
START_US = 1_700_000_000 * SECOND


def small_spec(*, group_size: int = 2, retained_steps: int = 0, **lockstep: float) -> PoolSpec:
    """Two prompts a step, groups of two, one minute to publish and half a minute to verify."""
    settings = Lockstep(prompts_per_step=2, publish_timeout_seconds=60.0, verify_timeout_seconds=30.0)
    return PoolSpec(
        prompt_set="sums",
        group_size=group_size,
        plan=VerificationPlan(verifiers=(VerifierUse("exact_match"),)),
        lockstep=replace(settings, **lockstep),  # type: ignore[arg-type]  # named and typed by Lockstep
        seed=7,
        retained_steps=retained_steps,
    )


class World:
    """One pool and its log."""

    def __init__(self, spec: PoolSpec | None = None, *, prompt_count: int = 6) -> None:
        self.now_us = START_US
        self.records: list[Record] = []
        self.maybe_state: PoolState | None = None
        self.prompt_ids = tuple(f"p{index}" for index in range(prompt_count))
        self.instances = 0
        self.send(CreatePool("sums", spec or small_spec(), prompt_count))

    @property
    def state(self) -> PoolState:
        """The state, which exists from the first record on."""
        assert self.maybe_state is not None
        return self.maybe_state

    def send(self, command: Command) -> RecordBody | None:
        """Decides and evolves; what was recorded."""
        now_us = record_time_us(self.maybe_state, now_us=self.now_us)
        body = decide(self.maybe_state, command, now_us=now_us)
        if body is not None:
            record = Record(now_us, body)
            self.maybe_state = evolve(self.maybe_state, record)
            self.records.append(record)
        return body

    def settle(self, *, verifier_alive: bool = True) -> list[RecordBody]:
        """Does what is due until nothing is."""
        done: list[RecordBody] = []
        while (due := timers.due(self.state, now_us=self.now_us)) is not None:
            body = self.send(self.command_for(due, verifier_alive=verifier_alive))
            assert body is not None
            done.append(body)
        return done

    def command_for(self, due: timers.Due, *, verifier_alive: bool) -> Command:
        """What the service sends for it."""
        match due:
            case timers.OpenDue():
                order = epoch_order(self.prompt_ids, seed=self.state.spec.seed, epoch=due.epoch)
                size = self.state.spec.lockstep.prompts_per_step
                return OpenStep(due.step, due.epoch, order[due.offset : due.offset + size])
            case timers.EndPublishingDue():
                return EndPublishing(due.step)
            case timers.CloseDue():
                return CloseStep(due.step, verifier_alive)
            case timers.RetireDue():
                return RetireSteps(due.through_step)

    def advance(self, seconds: float, *, verifier_alive: bool = True) -> None:
        """Lets time pass, waking up whenever the pool asks for it."""
        until_us = self.now_us + round(seconds * SECOND)
        self.settle(verifier_alive=verifier_alive)
        while (wake := timers.wake_us(self.state)) is not None and wake <= until_us:
            self.now_us = max(self.now_us, wake)
            self.settle(verifier_alive=verifier_alive)
        self.now_us = until_us
        self.settle(verifier_alive=verifier_alive)

    def join(self, agent: str, *, principal: str = "local", instance: str = "") -> int:
        """Joins, under a new instance if none is given, and settles; the session."""
        self.instances += 1
        name = instance or f"life-{self.instances}"
        body = self.send(Join(agent, principal, name, ModelSpec(model=f"model of {agent}")))
        self.settle()
        return body.session if isinstance(body, MemberJoined) else self.state.members[agent].session

    def publish_command(
        self, agent: str, prompt_index: int, *, step: int = 0, text: str = ""
    ) -> PublishGroup:
        """A group of the agent's newest session for a prompt of an open step (default: the newest)."""
        number = step or self.state.last_step
        return PublishGroup(
            agent=agent,
            session=self.state.members[agent].session,
            step=number,
            prompt_id=self.state.open_steps[number].prompt_ids[prompt_index],
            digest=f"{agent}/{number}/{prompt_index}/{text}".encode(),
            rollout_count=self.state.spec.group_size,
            envelope=b"envelope",
        )

    def publish(self, agent: str, *prompt_indices: int, step: int = 0) -> None:
        """Publishes groups; no index means all prompts."""
        number = step or self.state.last_step
        for index in prompt_indices or range(len(self.state.open_steps[number].prompt_ids)):
            self.send(self.publish_command(agent, index, step=number))
        self.settle()

    def judge(
        self, prompt_index: int, roster_index: int, *scores: float | None, step: int = 0
    ) -> RecordBody | None:
        """Records verdicts for a group; None is a verifier error."""
        number = step or min(self.state.open_steps)
        verdicts: tuple[Verdict, ...] = tuple(
            Unscored(UnscoredKind.VERIFIER_ERROR) if score is None else Scored(score) for score in scores
        )
        return self.send(RecordVerdicts(number, prompt_index, roster_index, 1, None, "worker", verdicts))

    def judge_all(self, *scores: float | None, step: int = 0) -> None:
        """Gives every pending group of a step the same verdicts (default: all 1.0) and settles."""
        number = step or min(self.state.open_steps)
        given = scores or (1.0,) * self.state.spec.group_size
        for (prompt_index, roster_index), group in sorted(self.state.open_steps[number].groups.items()):
            if not group.generation:
                self.judge(prompt_index, roster_index, *given, step=number)
        self.settle()


class Chaos:
    """Agents, workers and a broker that do anything in any order, with what must hold after every move.

    A move is (name, who, number), so that a run is plain numbers and can be repeated in another process.
    """

    AGENTS = ("a", "b", "c", "d")
    OWNERS = ("alice", "alice", "bob", "local")

    def __init__(self, spec: PoolSpec) -> None:
        self.world = World(spec, prompt_count=7)
        self.queue = self.fresh_queue()
        self.leases: list[Lease] = []
        self.commands: list[PublishGroup] = []
        self.lease_count = 0
        self.refusals: list[str] = []
        self.outages = 0

    def run(self, moves: Iterable[tuple[str, int, int]]) -> None:
        """Makes moves; checks after each."""
        for name, who, number in moves:
            move: Callable[[str, int], None] = getattr(self, name)
            move(self.AGENTS[who % len(self.AGENTS)], number)
            self.settle()
            self.check()

    def send(self, command: Command) -> RecordBody | None:
        """A command; a refusal, or nothing to record, leaves the state as it was to the byte."""
        before = snapshot_to_bytes(self.world.state)
        try:
            body = self.world.send(command)
        except ExchangeError as error:
            self.refusals.append(error.reason)
            body = None
        if body is None:
            assert snapshot_to_bytes(self.world.state) == before
        if isinstance(body, GroupAccepted):
            self.requeue()
        return body

    def settle(self) -> None:
        """The broker's timers."""
        alive = self.queue.verifier_alive("exact_match", now=self.seconds())
        for body in self.world.settle(verifier_alive=alive):
            if isinstance(body, StepClosed):
                self.queue.remove_step("sums", body.step)

    def seconds(self) -> float:
        return (self.world.now_us - START_US) / SECOND

    def fresh_queue(self) -> VerificationQueue:
        queue = VerificationQueue(lease_seconds=10.0)
        for worker in ("w0", "w1"):
            queue.register(
                worker, identity=worker, verifiers=("exact_match",), principal="", now=self.seconds()
            )
        return queue

    def requeue(self) -> None:
        for ref in pending_groups(self.world.state):
            self.queue.add(ref)

    def own_group(self, agent: str, number: int) -> PublishGroup | None:
        """A group for some open step: of a member's newest session, on the roster or not."""
        steps = list(self.world.state.steps_in_order())
        if not steps or agent not in self.world.state.members:
            return None
        step = steps[number % len(steps)]
        return self.world.publish_command(agent, number % len(step.prompt_ids), step=step.step)

    # --- moves ---

    def join(self, agent: str, number: int) -> None:
        self.world.instances += 1
        self.send(Join(agent, self.owner(agent), f"life-{self.world.instances}", ModelSpec()))

    def rejoin(self, agent: str, number: int) -> None:
        member = self.world.state.members.get(agent)
        instance = member.instance if member else "first"
        self.send(Join(agent, self.owner(agent), instance, ModelSpec()))

    def steal(self, agent: str, number: int) -> None:
        self.send(
            Join(
                agent, "mallory" if agent in self.world.state.members else self.owner(agent), "x", ModelSpec()
            )
        )

    def owner(self, agent: str) -> str:
        return self.OWNERS[self.AGENTS.index(agent)]

    def session(self, agent: str, number: int) -> int:
        """Mostly the newest session, sometimes an older one or one that never was."""
        member = self.world.state.members.get(agent)
        newest = member.session if member else 0
        return newest + (0, 0, 0, -1, 1)[number % 5]

    def touch(self, agent: str, number: int) -> None:
        self.send(Touch(agent, self.session(agent, number)))

    def leave(self, agent: str, number: int) -> None:
        self.send(Leave(agent, self.session(agent, number)))

    def publish(self, agent: str, number: int) -> None:
        command = self.own_group(agent, number)
        if command is not None:
            self.commands.append(command)
            self.send(command)

    def publish_all(self, agent: str, number: int) -> None:
        for step in list(self.world.state.open_steps):
            for index in range(self.world.state.spec.lockstep.prompts_per_step):
                if agent in self.world.state.members:
                    self.send(self.world.publish_command(agent, index, step=step))

    def repeat(self, agent: str, number: int) -> None:
        if self.commands:
            self.send(self.looked_up(self.commands[-1 - number % len(self.commands)]))

    def differ(self, agent: str, number: int) -> None:
        if self.commands:
            command = self.looked_up(self.commands[-1 - number % min(4, len(self.commands))])
            self.send(replace(command, digest=b"another"))

    def looked_up(self, command: PublishGroup) -> PublishGroup:
        """With what the log's index would know of the slot, if its step is closed."""
        prompts = {
            r.body.step: r.body.prompt_ids for r in self.world.records if isinstance(r.body, StepOpened)
        }
        if command.step in self.world.state.open_steps or command.step not in prompts:
            return command
        for record in self.world.records:
            body = record.body
            if not isinstance(body, GroupAccepted) or body.step != command.step:
                continue
            if body.digest == command.digest and prompts[body.step][body.prompt_index] == command.prompt_id:
                return replace(command, stored=StoredGroup(body.digest, body.session, body.rollout_count))
        return command

    def zombie(self, agent: str, number: int) -> None:
        command = self.own_group(agent, number)
        if command is not None:
            self.send(replace(command, session=command.session - 1, digest=b"zombie"))

    def late(self, agent: str, number: int) -> None:
        """A publish whose clock stands beyond the deadline, before the broker took notice."""
        command = self.own_group(agent, number)
        wake = timers.wake_us(self.world.state)
        if command is not None and wake is not None:
            self.world.now_us = max(self.world.now_us, wake)
            self.send(replace(command, digest=b"late"))

    def work(self, agent: str, number: int) -> None:
        self.lease_count += 1
        worker = f"w{number % 2}"
        self.queue.register(
            worker, identity=worker, verifiers=("exact_match",), principal="", now=self.seconds()
        )
        lease = self.queue.acquire(
            worker, lease_id=f"lease-{self.lease_count}", max_groups=1 + number % 3, now=self.seconds()
        )
        if lease is not None:
            self.leases.append(lease)

    def report(self, agent: str, number: int) -> None:
        """Reports some lease, perhaps one that ran out, was reported before or outlived its broker."""
        if not self.leases:
            return
        for ref in self.leases[number % len(self.leases)].items:
            outcomes: tuple[Verdict, ...] = (Scored(1.0), Unscored(UnscoredKind.VERIFIER_ERROR), Scored(0.0))
            verdicts = tuple(
                outcomes[(number + rollout) % 3] for rollout in range(self.world.state.spec.group_size)
            )
            self.send(RecordVerdicts(ref.step, ref.prompt_index, ref.roster_index, 1, None, "w", verdicts))
            self.queue.finish(ref)

    def worker_dies(self, agent: str, number: int) -> None:
        self.end_exhausted(self.queue.release_worker(f"w{number % 2}").exhausted)

    def end_exhausted(self, refs: tuple[GroupRef, ...]) -> None:
        error = Unscored(UnscoredKind.VERIFIER_ERROR)
        for ref in refs:
            verdicts = (error,) * self.world.state.spec.group_size
            self.send(RecordVerdicts(ref.step, ref.prompt_index, ref.roster_index, 1, None, "", verdicts))

    def ack(self, agent: str, number: int) -> None:
        self.send(Ack(agent, self.session(agent, 0), self.world.state.last_step - number % 3))

    def out_of_turn(self, agent: str, number: int) -> None:
        """Commands of the broker itself when they are not due, or done already."""
        step = self.world.state.last_step + number % 3 - 1
        self.send(EndPublishing(step))
        self.send(CloseStep(step, True))
        self.send(RetireSteps(step))
        self.send(OpenStep(step, 0, ("p0", "p1")))

    def wait(self, agent: str, number: int) -> None:
        """Time passes and the broker wakes up whenever it asked for it."""
        until_us = self.world.now_us + (1, 5, 12, 31, 61, 200)[number % 6] * SECOND
        while (wake := timers.wake_us(self.world.state)) is not None and wake <= until_us:
            self.world.now_us = max(self.world.now_us, wake)
            self.settle()
        self.world.now_us = until_us
        self.end_exhausted(self.queue.expire(now=self.seconds()).exhausted)

    def outage(self, agent: str, number: int) -> None:
        """Time passes and nobody is there. Workers get their time for what publishing left all the same."""
        self.outages += 1
        self.world.now_us += (40, 70, 500)[number % 3] * SECOND

    def restart(self, agent: str, number: int) -> None:
        """The broker starts again from a snapshot and the records after it; what was volatile is lost."""
        records = self.world.records
        middle = 1 + number * 7 % len(records)
        state = snapshot_from_bytes(snapshot_to_bytes(folded(records[:middle])))
        for record in records[middle:]:
            state = evolve(state, decode_record(encode_record(record)))
        self.world.maybe_state = state
        self.queue = self.fresh_queue()
        self.requeue()

    def power_loss(self, agent: str, number: int) -> None:
        """Records that were not durable are gone, and with them what nobody was told."""
        del self.world.records[max(1, len(self.world.records) - number % 3) :]
        self.restart(agent, number)

    # --- what must hold ---

    def check(self) -> None:
        """Conservation, deadlines and order, recounted from the records."""
        state = self.world.state
        bodies = [record.body for record in self.world.records]
        sizes = {
            (body.step, body.prompt_index, body.roster_index): body.rollout_count
            for body in bodies
            if isinstance(body, GroupAccepted)
        }
        assert len(sizes) == sum(isinstance(body, GroupAccepted) for body in bodies)
        closed = [body for body in bodies if isinstance(body, StepClosed)]
        judged = [body for body in bodies if isinstance(body, VerdictsRecorded)]
        expired = [
            (body.step, group.prompt_index, group.roster_index) for body in closed for group in body.expired
        ]
        final = [(body.step, body.prompt_index, body.roster_index) for body in judged] + expired
        assert len(set(final)) == len(final)
        scored = sum(body.scored_count for body in judged)
        unscored = sum(sizes[slot] for slot in final) - scored
        pending = sum(sizes[slot] for slot in sizes.keys() - set(final))
        assert (state.accepted_count, state.scored_count, state.unscored_count, state.pending_count) == (
            sum(sizes.values()), scored, unscored, pending,
        )  # fmt: skip
        assert [body.step for body in closed] == list(range(1, len(closed) + 1))
        assert sorted(state.open_steps) == list(range(len(closed) + 1, state.last_step + 1))
        assert {slot for slot in sizes if slot[0] <= len(closed)} <= set(final)
        for body in closed:
            slots = [(entry.prompt_index, entry.roster_index) for entry in body.entries]
            assert slots == sorted(slot[1:] for slot in sizes if slot[0] == body.step)
        assert timers.due(state, now_us=self.world.now_us) is None
        self.check_deadlines()
        self.check_indices()

    def check_indices(self) -> None:
        """What evolve maintains, and a snapshot does not hold, is what the groups say."""
        for step in self.world.state.open_steps.values():
            accepted = [0] * len(step.roster)
            for _, roster_index in step.groups:
                accepted[roster_index] += 1
            assert step.accepted_by_member == accepted
            pending = sum(not group.generation for group in step.groups.values())
            assert step.pending_group_count == pending

    def check_deadlines(self) -> None:
        state, now_us = self.world.state, max(self.world.now_us, self.world.state.last_time_us)
        lockstep = state.spec.lockstep
        publish_us = round(lockstep.publish_timeout_seconds * SECOND)
        verify_us = round(lockstep.verify_timeout_seconds * SECOND)
        wake = timers.wake_us(state)
        assert (wake is None) is not bool(state.open_steps)
        assert wake is None or wake > now_us
        oldest = next(state.steps_in_order(), None)
        if oldest is not None and oldest.publishing_end_time_us:
            assert now_us < oldest.publishing_end_time_us + verify_us
        for step in state.open_steps.values():
            assert step.publishing_end_time_us or now_us < step.open_time_us + publish_us
            assert self.outages or now_us < step.open_time_us + publish_us + verify_us


def folded(records: Iterable[Record]) -> PoolState:
    """The fold of records that went through their bytes."""
    state: PoolState | None = None
    for record in records:
        state = evolve(state, decode_record(encode_record(record)))
    assert state is not None
    return state


@pytest.fixture
def make_world() -> Callable[..., World]:
    """Makes pools: `make_world(spec, prompt_count=...)`."""
    return World


@pytest.fixture
def make_spec() -> Callable[..., PoolSpec]:
    """`small_spec`."""
    return small_spec


@pytest.fixture
def world() -> World:
    """A pool of two agents, a and b, whose first step is open."""
    pool = World()
    pool.join("a")
    pool.join("b")
    return pool


@pytest.fixture
def make_chaos() -> Callable[..., Chaos]:
    """Makes pools that are driven at random: `make_chaos(spec)`."""
    return Chaos
