"""kill -9 of the broker, of a worker and of an agent in the middle of a run: nothing is lost, nothing counted
twice, and the models come out as if nothing had happened. And a third agent that joins while it runs.

The run is small: two untrained models of different architecture and tokenizer, six steps. tests/chaos does it
to the whole demo.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import digits
from hacrl_agents.demo.models import DESIGNS
from hacrl_exchange.broker.audit import audit
from hacrl_exchange.client import connect
from hacrl_exchange.types import StepOutcome
from processes import children, kill, wait_until
from smallrun import GROUP_SIZE, PROMPTS, STEPS, SmallRun, write_models


@pytest.fixture(scope="module", autouse=True)
def _verifier_on_path() -> Iterator[None]:
    """Lets worker processes import the test's verifier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(digits.__file__).parent))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two untrained models."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[SmallRun]:
    """The same run without kills."""
    run = SmallRun(tmp_path_factory.mktemp("undisturbed"), models)
    try:
        run.finish()
        yield run
    finally:
        run.close()


@pytest.mark.slow
def test_kills_of_broker_worker_and_agent_change_nothing(
    tmp_path: Path, models: Path, undisturbed: SmallRun
) -> None:
    run = SmallRun(tmp_path, models)
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


@pytest.mark.slow
def test_a_third_agent_joins_a_running_pool_and_takes_part_from_the_next_step(
    tmp_path: Path, models: Path
) -> None:
    run = SmallRun(tmp_path, models, steps=0)
    try:
        run.wait_for_step(1)
        third = run.start_agent("third", models / DESIGNS[1].name, "--steps", "3")
        run.agents.append(third)
        wait_until(lambda: not third.is_running(), seconds=90, what="the third agent done")
        metrics = (tmp_path / "third" / "metrics.jsonl").read_text().splitlines()
        trained = [json.loads(line) for line in metrics]
        first = trained[0]["step"]
        with connect(run.broker.target) as exchange:
            batches = [exchange.replay("p", step) for step in range(first - 1, first + 3)]
    finally:
        run.close()

    names = [design.name for design in DESIGNS]
    assert [line["step"] for line in trained] == [first, first + 1, first + 2]
    assert [[entry.agent for entry in batch.roster] for batch in batches] == [
        names,
        *[[*names, "third"]] * 3,
    ]
    assert all(batch.outcome is StepOutcome.COMPLETE for batch in batches)
    assert set(trained[-1]["sources"]) == {*names, "third"}
