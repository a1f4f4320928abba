"""The SDK against real brokers: the node owner's loop, restarts, and lives that take over from each other."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hacrl_exchange import Agent, Group, JointBatch, ModelSpec, PolicyVersion, Rollout, Scored, Step, connect
from hacrl_exchange.broker.audit import audit
from hacrl_exchange.client import AdminClient, OfferedVerifier, VerdictReport, WorkerClient
from hacrl_exchange.errors import (
    InvalidLogprobError,
    PoolNotFoundError,
    SessionSupersededError,
    StepNotFoundError,
    UnreachableError,
    WrongGroupSizeError,
)
from hacrl_exchange.testing import BrokerProcess, running_broker
from hacrl_exchange.types import (
    Lockstep,
    Message,
    PoolSpec,
    Prompt,
    PromptEntry,
    RosterState,
    StepOutcome,
    VerificationPlan,
    VerifierIdentity,
    VerifierUse,
)

FINGERPRINT = "ab" * 32
GROUP_SIZE = 2
PROMPTS_PER_STEP = 3


def create_pool(target: str, *, steps: int = 2, members: int = 2, publish_seconds: float = 60.0) -> None:
    """A pool of sums that end after some steps."""
    entries = [
        PromptEntry(Prompt(f"sums/{n} ü", (Message("user", f"{n} + {n} ="),)), f'"{2 * n}"')
        for n in range(12)
    ]
    lockstep = Lockstep(
        PROMPTS_PER_STEP,
        min_members=members,
        max_steps=steps,
        publish_timeout_seconds=publish_seconds,
        verify_timeout_seconds=30.0,
    )
    plan = VerificationPlan((VerifierUse("exact_match"),))
    with AdminClient(target) as admin:
        admin.create_prompt_set("sums", entries)
        admin.create_pool("math", PoolSpec("sums", GROUP_SIZE, plan, lockstep))


def solve(prompt: Prompt, *, session: int = 1, right: bool = True, noise: str = "") -> Group:
    """A group of one right and one wrong answer, or of wrong ones alone."""
    number = int(prompt.messages[0].content.split()[0])
    texts = [str(2 * number) if right else "?", f"no idea {noise}"]
    rng = np.random.default_rng(number)
    rollouts = []
    for text in texts:
        logprobs = -rng.exponential(1.0, 5)
        rollouts.append(Rollout(text, 5, logprobs.sum(), token_ids=np.arange(5), logprobs=logprobs))  # type: ignore[arg-type]  # arrays
    version = PolicyVersion(session, 0)
    return Group(prompt.prompt_id, tuple(rollouts), FINGERPRINT, version, version)


class Verifying(threading.Thread):
    """A worker in a thread: its scorer compares texts. Counts what it reported."""

    def __init__(self, target: str) -> None:
        super().__init__(daemon=True)
        self._client = WorkerClient(target)
        self._over = threading.Event()

    def run(self) -> None:
        """Works until `stop`."""
        identity = VerifierIdentity("exact_match", "1", hashlib.sha256(b"{}").digest())
        with self._client:
            worker = self._client.register("test", offered=[OfferedVerifier("exact_match", "1")]).worker
            while not self._over.is_set():
                lease = self._client.acquire(worker, max_groups=8, wait_seconds=0.2)
                if lease is None:
                    continue
                reports = [
                    VerdictReport(
                        group.name,
                        group.generation,
                        identity,
                        tuple(
                            Scored(float(f'"{one.text}"' == group.prompt.reference_json))
                            for one in group.rollouts
                        ),
                    )
                    for group in lease.groups
                ]
                assert self._client.report(worker, lease=lease.lease, reports=reports) == (None,) * len(
                    reports
                )

    def stop(self) -> None:
        """Ends the thread."""
        self._over.set()
        self.join(10)


@pytest.fixture
def target() -> Iterator[str]:
    """A broker with a worker."""
    with running_broker() as broker:
        worker = Verifying(broker.target)
        worker.start()
        yield broker.target
        worker.stop()


def together(*lives: Callable[[], object]) -> list[object]:
    """Runs several agents' lives at once and returns what they return."""
    with ThreadPoolExecutor(len(lives)) as threads:
        return [future.result(60) for future in [threads.submit(life) for life in lives]]


def test_two_agents_share_what_they_made(target: str) -> None:
    """The loop of the documentation."""
    create_pool(target)
    seen: dict[str, list[JointBatch]] = {"lab-a": [], "lab-b": []}

    def my_groups(prompts: Iterable[Prompt]) -> Iterator[Group]:
        return (solve(prompt) for prompt in prompts)

    def life(name: str, train: Callable[[JointBatch], object]) -> None:
        spec = ModelSpec(model=name, architecture="LlamaForCausalLM", tokenizer_fingerprint=FINGERPRINT)
        # -- start loop --
        with connect(target) as exchange, exchange.join("math", agent=name, model=spec) as agent:
            for step in agent.steps():
                agent.publish(my_groups(step.prompts))
                batch = step.joint_batch()
                train(batch)
        # -- end loop --

    together(*(lambda name=name: life(name, seen[name].append) for name in seen))

    ours, theirs = seen.values()
    assert [batch.step for batch in ours] == [batch.step for batch in theirs] == [1, 2]
    for mine, other in zip(ours, theirs, strict=True):
        assert [group.digest for group in mine.groups] == [group.digest for group in other.groups]
        assert mine.outcome is StepOutcome.COMPLETE
        assert len(mine.own("lab-a")) == len(mine.peers("lab-a")) == PROMPTS_PER_STEP
        assert mine.capabilities == {"lab-a": 0.5, "lab-b": 0.5}
        assert [group.verdicts for group in mine.groups] == [(Scored(1.0), Scored(0.0))] * 6
        assert [model.model for model in mine.models] == ["lab-a", "lab-b"]
        assert all(prompt.messages for prompt in mine.prompts)


def test_the_rewards_of_a_batch_come_from_scored_rollouts_alone(target: str) -> None:
    create_pool(target, steps=1, members=1)

    with connect(target) as exchange, exchange.join("math", agent="lab-a") as agent:
        step = next(agent.steps())
        agent.publish(solve(prompt) for prompt in step.prompts)
        batch = step.joint_batch()

    # -- start rewards --
    rewards = {
        (group.agent, group.group.prompt_id, index): verdict.score
        for group in batch.groups
        for index, verdict in enumerate(group.verdicts)
        if isinstance(verdict, Scored)
    }
    # -- end rewards --
    assert sorted(rewards.values()) == [0.0] * 3 + [1.0] * 3


def test_a_new_life_goes_on_with_what_the_old_one_published(target: str, tmp_path: Path) -> None:
    """The first life dies in the middle of a step; the second resumes from a checkpoint before step 1."""
    create_pool(target, steps=2, members=1)
    journal = tmp_path / "lab-a.jsonl"

    # -- start resume --
    def run(resume_after: int, publish_at_most: int) -> Iterator[JointBatch]:
        with (
            connect(target) as exchange,
            exchange.join("math", agent="lab-a", resume_after=resume_after, journal=journal) as agent,
        ):
            for step in agent.steps():
                missing = step.missing[:publish_at_most]
                agent.publish(solve(prompt, session=agent.session) for prompt in missing)
                if step.missing:
                    raise RuntimeError("the machine went down")
                yield step.joint_batch()

    # -- end resume --
    with pytest.raises(RuntimeError):
        next(run(0, publish_at_most=2))
    batches = list(run(0, publish_at_most=3))
    again = list(run(1, publish_at_most=3))

    assert [batch.step for batch in batches] == [1, 2]
    assert [len(batch.groups) for batch in batches] == [3, 3]
    sessions = [group.group.policy_start.session for group in batches[0].groups]
    assert sorted(sessions) == [1, 1, 2]
    assert [batch.step for batch in again] == [2]
    assert again[0].groups[0].digest == batches[1].groups[0].digest
    assert len(journal.read_text(encoding="utf-8").splitlines()) == 6


def test_an_older_life_is_told_to_stop(target: str) -> None:
    create_pool(target, members=1)
    with connect(target) as exchange:
        old = exchange.join("math", agent="lab-a")
        step = next(old.steps())
        new = exchange.join("math", agent="lab-a")

        with pytest.raises(SessionSupersededError):
            old.publish(solve(prompt) for prompt in step.prompts)
        with pytest.raises(SessionSupersededError):
            step.joint_batch()
        taken_over = next(new.steps())
        report = new.publish(solve(prompt, session=2) for prompt in taken_over.prompts)

    assert new.session == old.session + 1
    assert {receipt.session for receipt in report.receipts} == {2}


def test_the_first_group_of_a_slot_stays(target: str) -> None:
    """The second life sampled anew before it asked what was there."""
    create_pool(target, steps=1, members=1)
    with connect(target) as exchange:
        first = exchange.join("math", agent="lab-a")
        step = next(first.steps())
        second = exchange.join("math", agent="lab-a")
        stale = next(second.steps())
        third = exchange.join("math", agent="lab-a")
        stored = third.publish([solve(step.prompts[0], noise="first")], step=step)
        fourth = exchange.join("math", agent="lab-a")

        report = fourth.publish([solve(prompt, noise="fourth") for prompt in step.prompts], step=stale)

    assert report.kept == (step.prompts[0].prompt_id,)
    assert len(report.receipts) == 3
    assert stored.receipts[0] in report.receipts
    assert stale.committed[step.prompts[0].prompt_id].rollouts[1].text == "no idea first"
    assert stale.missing == ()


def test_a_bad_group_is_refused_alone_and_what_is_late_is_listed(target: str) -> None:
    create_pool(target, steps=1, members=1, publish_seconds=1.0)
    with connect(target) as exchange, exchange.join("math", agent="lab-a") as agent:
        step = next(agent.steps())
        good, bad, late = (solve(prompt) for prompt in step.prompts)
        lone = dataclasses.replace(bad, rollouts=bad.rollouts[:1])

        with pytest.raises(WrongGroupSizeError):
            agent.publish([lone, good])
        with pytest.raises(InvalidLogprobError):
            agent.publish([dataclasses.replace(bad, rollouts=(Rollout("x", 1, 0.5),) * GROUP_SIZE)])
        batch = step.joint_batch()
        report = agent.publish([late])

    assert (report.receipts, report.late) == ((), (late.prompt_id,))
    assert [group.group.prompt_id for group in batch.groups] == [good.prompt_id]
    assert batch.roster[0].state is RosterState.LATE
    assert not batch.quorum_met


def test_a_reader_follows_a_pool(target: str) -> None:
    create_pool(target, steps=2, members=1)

    def learn() -> list[JointBatch]:
        with connect(target) as exchange, exchange.join("math", agent="lab-a") as agent:
            return [_answered(agent, step) for step in agent.steps()]

    def follow() -> list[JointBatch]:
        with connect(target) as exchange:
            return list(exchange.follow("math", parts=("text",)))

    learned, followed = together(learn, follow)
    assert isinstance(learned, list)
    assert isinstance(followed, list)
    assert [[group.digest for group in batch.groups] for batch in learned] == [
        [group.digest for group in batch.groups] for batch in followed
    ]
    with connect(target) as exchange:
        with pytest.raises(StepNotFoundError):
            exchange.replay("math", 3)
        with pytest.raises(PoolNotFoundError):
            exchange.join("maths", agent="lab-a")
        status = exchange.pool("math")
    assert status.accepted_count == status.scored_count == 12


def _answered(agent: Agent, step: Step) -> JointBatch:
    agent.publish(solve(prompt) for prompt in step.prompts)
    return step.joint_batch()


@pytest.mark.slow
def test_a_killed_broker_that_comes_back_costs_nothing(tmp_path: Path) -> None:
    """kill -9 after the first receipts and again while everybody waits for the joint batch."""
    journals = [tmp_path / "lab-a.jsonl", tmp_path / "lab-b.jsonl"]
    killed = threading.Semaphore(0)
    with BrokerProcess(tmp_path / "broker", workers=0) as broker:
        create_pool(broker.target, steps=2)

        def life(name: str, journal: Path) -> list[int]:
            with (
                connect(broker.target) as exchange,
                exchange.join("math", agent=name, journal=str(journal)) as agent,
            ):
                steps = []
                for step in agent.steps():
                    agent.publish([solve(step.prompts[0])])
                    killed.release()
                    agent.publish(solve(prompt) for prompt in step.prompts)
                    killed.release()
                    steps.append(len(step.joint_batch().groups))
                return steps

        with ThreadPoolExecutor(2) as threads:
            lives = [
                threads.submit(life, name, journal)
                for name, journal in zip(("lab-a", "lab-b"), journals, strict=True)
            ]
            for _ in range(2):
                killed.acquire(timeout=30)
                killed.acquire(timeout=30)
                broker.kill()
                broker.start()
            worker = Verifying(broker.target)
            worker.start()
            assert [life.result(60) for life in lives] == [[6, 6], [6, 6]]
            worker.stop()
    report = audit(tmp_path / "broker", journals)

    assert report.problems == ()
    assert sum(len(journal.read_text(encoding="utf-8").splitlines()) for journal in journals) == 12


@pytest.mark.slow
def test_a_large_batch_arrives_whole(target: str) -> None:
    """Several messages: incompressible text of 400 kB per rollout."""
    create_pool(target, steps=1)

    def make(prompts: Sequence[Prompt], session: int) -> Iterator[Group]:
        version = PolicyVersion(session, 0)
        for prompt in prompts:
            rollouts = tuple(Rollout(os.urandom(200_000).hex(), 100_000, -1.0) for _ in range(GROUP_SIZE))
            yield Group(prompt.prompt_id, rollouts, FINGERPRINT, version, version)

    def life(name: str) -> JointBatch:
        with connect(target) as exchange, exchange.join("math", agent=name) as agent:
            step = next(agent.steps())
            agent.publish(make(step.prompts, agent.session))
            return step.joint_batch()

    ours, theirs = together(lambda: life("lab-a"), lambda: life("lab-b"))
    assert isinstance(ours, JointBatch)
    assert isinstance(theirs, JointBatch)
    assert ours.wire_bytes > 2 * PROMPTS_PER_STEP * GROUP_SIZE * 200_000
    assert [group.digest for group in ours.groups] == [group.digest for group in theirs.groups]


def test_a_broker_that_is_gone_is_missed_in_a_sentence(tmp_path: Path) -> None:
    with running_broker() as broker:
        create_pool(broker.target, members=1)
        exchange = connect(broker.target, patience_seconds=0.3)
        agent = exchange.join("math", agent="lab-a")
        step = next(agent.steps())

    with (
        exchange,
        pytest.raises(UnreachableError, match=r"^The broker at 127\.0\.0\.1:\d+ has not answered for "),
    ):
        agent.publish(solve(prompt) for prompt in step.prompts)
