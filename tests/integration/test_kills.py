"""kill -9 of the broker, of a worker and of an agent in the middle of a run: nothing is lost, nothing counted
twice, and the models come out as if nothing had happened.

The run is small: two untrained models of different architecture and tokenizer, six steps. tests/chaos does it
to the whole demo.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import digits
from hacrl_agents.checkpoint import latest_checkpoint
from hacrl_agents.demo.models import DESIGNS, build_agent
from hacrl_agents.demo.processes import Kept, exchange_command
from hacrl_agents.demo.task import make_split
from hacrl_exchange.broker.audit import audit
from hacrl_exchange.client import AdminClient, connect
from hacrl_exchange.testing import BrokerProcess
from hacrl_exchange.types import (
    Lockstep,
    Message,
    PoolSpec,
    Prompt,
    PromptEntry,
    VerificationPlan,
    VerifierUse,
)
from processes import children, kill, wait_until

STEPS, PROMPTS, GROUP_SIZE = 6, 4, 4


@pytest.fixture(scope="module", autouse=True)
def _verifier_on_path() -> Iterator[None]:
    """Lets worker processes import the test's verifier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(digits.__file__).parent))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two untrained models."""
    folder = tmp_path_factory.mktemp("models")
    for design in DESIGNS:
        model, tokenizer = build_agent(design, seed=0)
        model.save_pretrained(folder / design.name)
        tokenizer.save_pretrained(folder / design.name)
    return folder


def create_pool(target: str) -> None:
    problems = make_split(0, training=STEPS * PROMPTS, held_out=1).training
    entries = [
        PromptEntry(Prompt(problem.prompt_id, (Message("user", problem.question),)), problem.entry_json)
        for problem in problems
    ]
    with AdminClient(target) as admin:
        admin.create_prompt_set("sums", entries)
        plan = VerificationPlan((VerifierUse("digits:has_digit"),))
        lockstep = Lockstep(prompts_per_step=PROMPTS, max_steps=STEPS)
        admin.create_pool("p", PoolSpec("sums", GROUP_SIZE, plan, lockstep))


class Run:
    """A broker with a worker, and two agents, as processes."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.folder = folder
        self.broker = BrokerProcess(folder / "broker", workers=1, verifiers=["digits:has_digit"])
        self.broker.start()
        create_pool(self.broker.target)
        self.agents = [
            Kept(
                design.name,
                exchange_command(
                    "agent",
                    *("--broker", self.broker.target, "--pool", "p", "--name", design.name),
                    *("--model", str(models / design.name), "--out", str(folder / design.name)),
                    *("--journal", str(folder / f"{design.name}.jsonl"), "--max-tokens", "12"),
                    *("--minibatch-prompts", "2", "--lr", "1e-3", "--own-clip", "0.05"),
                ),
                log=folder / f"{design.name}.log",
            )
            for design in DESIGNS
        ]

    def steps_done(self) -> int:
        """Steps that the first agent has trained."""
        metrics = self.folder / DESIGNS[0].name / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def wait_for_step(self, step: int) -> None:
        """Blocks until so many steps are trained."""
        wait_until(lambda: self.steps_done() >= step, seconds=60, what=f"step {step} trained")

    def finish(self) -> None:
        """Blocks until both agents ended well; restarts those that were killed."""
        wait_until(
            lambda: not any([agent.is_running() for agent in self.agents]), seconds=90, what="agents done"
        )

    def close(self) -> None:
        """Ends everything."""
        for agent in self.agents:
            agent.stop()
        self.broker.stop()

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Final weights of an agent."""
        checkpoint = latest_checkpoint(self.folder / name / "checkpoints")
        assert checkpoint is not None
        return load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Run]:
    """The same run without kills."""
    run = Run(tmp_path_factory.mktemp("undisturbed"), models)
    try:
        run.finish()
        yield run
    finally:
        run.close()


@pytest.mark.slow
def test_kills_of_broker_worker_and_agent_change_nothing(
    tmp_path: Path, models: Path, undisturbed: Run
) -> None:
    run = Run(tmp_path, models)
    try:
        run.wait_for_step(1)
        run.broker.kill()
        run.broker.start()
        run.wait_for_step(2)
        for worker in children(run.broker.pid):
            kill(worker)
        run.wait_for_step(3)
        kill(run.agents[0].pid)
        kill(run.agents[1].pid)
        run.finish()
        with connect(run.broker.target) as exchange:
            status = exchange.pool("p")
    finally:
        run.close()

    assert [agent.restarts for agent in run.agents] == [1, 1]
    report = audit(tmp_path / "broker", [tmp_path / f"{design.name}.jsonl" for design in DESIGNS])
    assert report.problems == ()
    rollouts = STEPS * PROMPTS * GROUP_SIZE * len(DESIGNS)
    assert report.totals == {"accepted": rollouts, "scored": rollouts, "unscored": 0, "pending": 0}
    assert report.receipts_found == report.receipt_count > 0
    assert (status.accepted_count, status.scored_count, status.pending_count) == (rollouts, rollouts, 0)
    for design in DESIGNS:
        metrics = (tmp_path / design.name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in metrics] == list(range(1, STEPS + 1))
        expected, found = undisturbed.weights(design.name), run.weights(design.name)
        assert all(torch.equal(expected[name], found[name]) for name in expected), design.name
