"""The benchmark's text, its short form, and the largest joint batch of the paper."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import zstandard

from hacrl_exchange.cli.bench.corpus import TOKENIZER_FINGERPRINT, VOCABULARY_SIZE, Language, Shape
from hacrl_exchange.cli.bench.figures import percentile, rate
from hacrl_exchange.client import (
    AdminClient,
    Agent,
    Exchange,
    OfferedVerifier,
    VerdictReport,
    WorkerClient,
    connect,
)
from hacrl_exchange.testing import running_broker
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
    VerificationPlan,
    VerifierIdentity,
    VerifierUse,
)

_VERIFIER = VerifierIdentity("one", "1", bytes(32))


@pytest.fixture(scope="module")
def language() -> Language:
    """The benchmark's language; making its lexicon takes most of a second."""
    return Language()


@pytest.mark.slow
def test_texts_are_english_like_and_the_best_zstd_cannot_press_them_below_1_2_bytes_a_token(
    language: Language,
) -> None:
    groups = list(language.groups(16, seed=1))
    texts = [rollout.text for group in groups for rollout in group]
    tokens = 16 * Shape().tokens_per_group
    joined = "\n".join(texts).encode()

    assert 3.5 < len(joined) / tokens < 4.5
    assert len(zstandard.ZstdCompressor(level=19).compress(joined)) / tokens > 1.2


@pytest.mark.slow
def test_a_rollouts_ids_are_the_pieces_of_its_text(language: Language) -> None:
    assert len(language.pieces) == len(set(language.pieces)) == VOCABULARY_SIZE == 32_768
    for group in language.groups(2, seed=1, shape=Shape(rollouts=2, tokens=50)):
        for rollout in group:
            ids = np.asarray(rollout.token_ids)
            logprobs = np.asarray(rollout.logprobs)
            assert "".join(language.pieces[token] for token in ids.tolist()) == rollout.text
            assert len(ids) == len(logprobs) == rollout.token_count == 50
            assert (logprobs <= 0).all()
            assert rollout.logprob_sum == pytest.approx(float(logprobs.sum(dtype=np.float64)))


@pytest.mark.slow
def test_every_group_is_different_and_a_seed_gives_the_same_ones_again(language: Language) -> None:
    shape = Shape(rollouts=2, tokens=20)
    first = [group[0].text for group in language.groups(50, seed=1, shape=shape)]
    again = [group[0].text for group in language.groups(50, seed=1, shape=shape)]
    other = [group[0].text for group in language.groups(50, seed=2, shape=shape)]

    assert first == again
    assert len(set(first + other)) == 100


def test_a_rate_counts_from_the_first_beginning_to_the_last_end() -> None:
    assert rate([{"began": 1.0, "ended": 2.0}, {"began": 1.5, "ended": 3.0}], 100) == 50.0


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


@pytest.mark.slow
def test_the_short_form_prints_exactly_the_figures_and_loses_no_receipt() -> None:
    command = [sys.executable, "-m", "hacrl_exchange.cli", "bench", "exchange", "--groups", "64", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=110)

    assert (run.returncode, run.stderr) == (0, "")
    figures = json.loads(run.stdout)
    assert list(figures) == [
        "publish_rollouts_per_s",
        "consume_rollouts_per_s",
        "concurrent_rollouts_per_s",
        "wire_bytes_per_token",
        "wire_bytes_per_token_text",
        "commit_p99_ms",
        "receipts",
        "recovered",
    ]
    assert figures["recovered"] == figures["receipts"] == 3 * 64
    assert 4.5 < figures["wire_bytes_per_token"] <= 5.2
    assert 1.2 < figures["wire_bytes_per_token_text"] <= 2.0


# --- a joint batch of the paper's size -------------------------------------------------------------


def _verify_all(target: str, groups: int) -> None:
    with WorkerClient(target) as client:
        worker = client.register("one", offered=[OfferedVerifier("one", "1")]).worker
        while groups:
            lease = client.acquire(worker, max_groups=64, wait_seconds=5)
            assert lease is not None
            reports = [
                VerdictReport(group.name, group.generation, _VERIFIER, (Scored(1.0),) * group.rollout_count)
                for group in lease.groups
            ]
            assert client.report(worker, lease=lease.lease, reports=reports) == (None,) * len(reports)
            groups -= len(reports)


def _publish(agent: Agent, groups: list[tuple[Rollout, ...]]) -> None:
    step = next(agent.steps(timeout_seconds=30))
    version = PolicyVersion(agent.session, 0)
    agent.publish(
        Group(prompt.prompt_id, rollouts, TOKENIZER_FINGERPRINT, version, version)
        for prompt, rollouts in zip(step.prompts, groups, strict=True)
    )


def _create_pool(target: str, *, prompts: int, agents: int, rollouts: int) -> None:
    with AdminClient(target) as admin:
        entries = [PromptEntry(Prompt(f"{n:03d}", (Message("user", "Tell."),))) for n in range(prompts)]
        admin.create_prompt_set("paper", entries)
        plan = VerificationPlan((VerifierUse("one"),))
        lockstep = Lockstep(prompts_per_step=prompts, min_members=agents, max_steps=1)
        admin.create_pool("paper", PoolSpec("paper", rollouts, plan, lockstep))


def _join_all(exchange: Exchange, agents: int) -> list[Agent]:
    return [exchange.join("paper", agent=f"agent-{number}") for number in range(agents)]


@pytest.mark.slow
def test_a_paper_size_joint_batch_arrives_whole(language: Language) -> None:
    """128 prompts, 4 agents, 8 rollouts of 4,096 tokens: 16.8 million tokens, some 86 MB on the wire.

    The numbers are repeated among prompts, which spares making them; every group differs all the same.
    """
    prompts, agents, shape = 128, 4, Shape(rollouts=8, tokens=4096)
    made = list(language.groups(agents * 4, seed=3, shape=shape))
    with running_broker() as broker, connect(broker.target) as exchange:
        _create_pool(broker.target, prompts=prompts, agents=agents, rollouts=shape.rollouts)
        for number, agent in enumerate(_join_all(exchange, agents)):
            mine = made[4 * number : 4 * number + 4]
            _publish(agent, [_renumbered(mine[n % 4], n) for n in range(prompts)])
        _verify_all(broker.target, prompts * agents)
        batch = exchange.replay("paper", 1, timeout_seconds=60)

    assert (batch.outcome, batch.quorum_met) == (StepOutcome.COMPLETE, True)
    assert len(batch.groups) == prompts * agents
    assert len({group.digest for group in batch.groups}) == prompts * agents
    assert sum(r.token_count for g in batch.groups for r in g.group.rollouts) == 128 * 4 * 8 * 4096
    for index, group in enumerate(batch.groups):
        number = int(group.agent.removeprefix("agent-"))
        sent = _renumbered(made[4 * number + (index // agents) % 4], index // agents)
        assert [rollout.text for rollout in group.group.rollouts] == [rollout.text for rollout in sent]
        assert np.array_equal(np.asarray(group.group.rollouts[-1].token_ids), np.asarray(sent[-1].token_ids))


def _renumbered(rollouts: tuple[Rollout, ...], number: int) -> tuple[Rollout, ...]:
    """The same rollouts, the first with another beginning."""
    first = rollouts[0]
    text = f" {number:03d}{first.text}"
    return (
        Rollout(
            text, first.token_count, first.logprob_sum, token_ids=first.token_ids, logprobs=first.logprobs
        ),
        *rollouts[1:],
    )
