"""`hacrl worker` as a process of its own against a real broker."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.client import AdminClient, JointBatch, connect
from hacrl_exchange.testing import BrokerProcess, running_broker
from hacrl_exchange.types import (
    Group,
    Lockstep,
    Message,
    PolicyVersion,
    PoolSpec,
    Prompt,
    PromptEntry,
    Rollout,
    Scored,
    StepOutcome,
    Unscored,
    UnscoredKind,
    VerdictReason,
    VerificationPlan,
    VerifierUse,
)

pytest.importorskip("hacrl_verifiers")
pytestmark = pytest.mark.slow

SAMPLES = Path(__file__).parents[1] / "unit" / "verifiers"
SECONDS = 30.0
GOOD = Scored(1.0)

StartWorker = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartWorker]:
    """Starts worker processes; whatever still runs at the end is killed."""
    monkeypatch.setenv("PYTHONPATH", str(SAMPLES))
    with ExitStack() as stack:

        def start(target: str, *arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "hacrl_exchange.cli", "worker", "--broker", target, *arguments]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
            )
            stack.callback(_end, process)
            return process

        yield start


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(SECONDS)
    for stream in (process.stdin, process.stderr):
        if stream is not None:
            stream.close()


def _await_no_reader(descriptor: int) -> None:
    poller = select.poll()
    poller.register(descriptor, select.POLLERR)
    assert poller.poll(SECONDS * 1000)


def create_pool(
    target: str, *, verifier: str, prompts: int, config: str = "{}", deadline: float = 1.0
) -> None:
    entries = [PromptEntry(Prompt(f"q{n}", (Message("user", "?"),)), '"a"') for n in range(prompts)]
    plan = VerificationPlan((VerifierUse(verifier, config),), item_timeout_seconds=deadline)
    lockstep = Lockstep(prompts_per_step=prompts, min_members=1, max_steps=1)
    with AdminClient(target) as admin:
        admin.create_prompt_set("s", entries)
        admin.create_pool("p", PoolSpec("s", 4, plan, lockstep))


def group(prompt_id: str, texts: Sequence[str], *, session: int) -> Group:
    version = PolicyVersion(session, 0)
    return Group(
        prompt_id=prompt_id,
        rollouts=tuple(Rollout(text, 1, -1.0) for text in texts),
        tokenizer_fingerprint="0" * 64,
        policy_start=version,
        policy_end=version,
    )


def joint_batch(target: str, texts: Sequence[Sequence[str]], *, meanwhile: Callable[[], None]) -> JointBatch:
    """Publishes four texts for each prompt of the first step and returns what came of it."""
    with connect(target) as exchange, exchange.join("p", agent="a") as agent:
        for step in agent.steps(timeout_seconds=SECONDS):
            agent.publish(
                [
                    group(prompt.prompt_id, answers, session=agent.session)
                    for prompt, answers in zip(step.prompts, texts, strict=True)
                ]
            )
            meanwhile()
            return step.joint_batch(timeout_seconds=SECONDS)
    raise AssertionError("no step opened")


def verdicts(batch: JointBatch) -> list[object]:
    return [verdict for entry in batch.groups for verdict in entry.verdicts]


def test_hostile_rollouts_get_their_outcome_and_the_others_their_score(start_worker: StartWorker) -> None:
    with running_broker() as broker:
        create_pool(broker.target, verifier="hostile", prompts=3, deadline=0.5)
        worker = start_worker(broker.target, "--verifier", "sample_verifiers:hostile", "--slots", "2")
        texts = [["ok", "spin", "ok", "exit"], ["ok"] * 4, ["system exit", "ok", "kill the zygote", "ok"]]

        batch = joint_batch(broker.target, texts, meanwhile=lambda: None)

        def error(reason: VerdictReason) -> Unscored:
            return Unscored(UnscoredKind.VERIFIER_ERROR, reason)

        late = Unscored(UnscoredKind.TIMEOUT, VerdictReason.ITEM_DEADLINE)
        crashed, raised = error(VerdictReason.CRASHED), error(VerdictReason.RAISED)
        assert verdicts(batch) == [
            *(GOOD, late, GOOD, crashed),
            *[GOOD] * 4,
            *(raised, GOOD, crashed, GOOD),
        ]
        assert {entry.verifier.verifier for entry in batch.groups if entry.verifier} == {"hostile"}
        worker.terminate()
        assert worker.wait(SECONDS) == 0


def test_a_configuration_the_verifier_refuses_is_an_outcome_of_every_rollout(
    start_worker: StartWorker,
) -> None:
    with running_broker() as broker:
        create_pool(broker.target, verifier="same_length", prompts=1, config='{"no": 1}')
        start_worker(broker.target, "--verifier", "sample_verifiers:same_length")

        batch = joint_batch(broker.target, [["a"] * 4], meanwhile=lambda: None)

        refused = Unscored(UnscoredKind.VERIFIER_ERROR, VerdictReason.VERIFIER_UNAVAILABLE)
        assert verdicts(batch) == [refused] * 4


def test_what_a_killed_worker_had_in_hand_goes_to_another(
    start_worker: StartWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    monkeypatch.setenv("SAMPLE_GATE", str(gate))
    with running_broker(limits=Limits(lease_timeout_seconds=1.0)) as broker:
        create_pool(broker.target, verifier="gated", prompts=2, deadline=SECONDS)
        first = start_worker(broker.target, "--verifier", "sample_verifiers:gated")

        def kill_and_replace() -> None:
            with open(gate, "w") as held:  # opens once a child of the first worker waits there
                first.kill()
                _await_no_reader(held.fileno())  # the child has died with its worker
            start_worker(broker.target, "--verifier", "sample_verifiers:gated")
            with open(gate, "w") as through:
                through.write("1.0")

        batch = joint_batch(broker.target, [["wait", "b", "b", "b"], ["b"] * 4], meanwhile=kill_and_replace)

        assert batch.outcome is StepOutcome.COMPLETE
        assert verdicts(batch) == [GOOD, *[Scored(0.5)] * 7]


def test_a_worker_told_to_stop_does_not_wait_for_what_hangs(
    start_worker: StartWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    monkeypatch.setenv("SAMPLE_GATE", str(gate))
    with running_broker(limits=Limits(lease_timeout_seconds=1.0)) as broker:
        create_pool(broker.target, verifier="gated", prompts=1, deadline=600.0)
        first = start_worker(broker.target, "--verifier", "sample_verifiers:gated")

        def stop_and_replace() -> None:
            with open(gate, "w") as held:
                first.terminate()
                assert first.wait(SECONDS) == 0
                _await_no_reader(held.fileno())
            start_worker(broker.target, "--verifier", "sample_verifiers:gated")
            with open(gate, "w") as through:
                through.write("1.0")

        batch = joint_batch(broker.target, [["wait", "b", "b", "b"]], meanwhile=stop_and_replace)

        assert verdicts(batch) == [GOOD, *[Scored(0.5)] * 3]


def test_a_worker_outlives_its_broker(start_worker: StartWorker, tmp_path: Path) -> None:
    with BrokerProcess(tmp_path / "data", workers=0) as broker:
        create_pool(broker.target, verifier="same_length", prompts=1)
        worker = start_worker(broker.target, "--verifier", "sample_verifiers:same_length")
        assert worker.stderr is not None
        assert any("Registered" in line for line in worker.stderr)

        broker.kill()
        broker.start()
        batch = joint_batch(broker.target, [["a", "b", "cc", "a"]], meanwhile=lambda: None)

        assert verdicts(batch) == [GOOD, GOOD, Scored(0.0), GOOD]
        worker.send_signal(signal.SIGINT)
        assert worker.wait(SECONDS) == 0


def test_the_workers_that_a_broker_spawns_verify_by_themselves() -> None:
    with running_broker(workers=1, verifiers=["exact_match"]) as broker:
        create_pool(broker.target, verifier="exact_match", prompts=2)

        batch = joint_batch(broker.target, [["a", " a\n", "A", ""]] * 2, meanwhile=lambda: None)

        assert verdicts(batch) == [GOOD, GOOD, Scored(0.0), Scored(0.0)] * 2


def test_a_worker_that_a_broker_spawned_ends_with_its_pipe(start_worker: StartWorker) -> None:
    with running_broker() as broker:
        worker = start_worker(broker.target, "--verifier", "sample_verifiers:equal", "--until-stdin-closes")
        assert worker.stderr is not None
        assert worker.stdin is not None
        assert any("Registered" in line for line in worker.stderr)

        worker.stdin.close()

        assert worker.wait(SECONDS) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--verifier", "nobody"], "error: No verifier is registered as 'nobody'. Registered: "),
        (
            ["--verifier", "sample_verifiers:DEEDS"],
            "error: sample_verifiers:DEEDS is a dict, not a verifier. ",
        ),
        (["--verifier", "sample_verifiers:equal", "--once"], "error: "),
    ],
)
def test_what_stops_a_worker_from_starting_is_one_sentence(
    start_worker: StartWorker, arguments: list[str], sentence: str
) -> None:
    worker = start_worker("127.0.0.1:1", *arguments)

    _, errors = worker.communicate(timeout=SECONDS)

    assert worker.returncode == 1
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(sentence)
