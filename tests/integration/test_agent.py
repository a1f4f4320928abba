"""Whole agents against a real broker: the trainer through the SDK, and the command as a process."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hacrl_agents.hacpo import HacpoConfig
from hacrl_agents.metrics import StepReport
from hacrl_agents.running import AgentOptions, open_trainer
from hacrl_agents.settings import TrainerSettings
from hacrl_agents.trainer import Trainer
from hacrl_exchange.client import AdminClient, OfferedVerifier, VerdictReport, WorkerClient, connect
from hacrl_exchange.testing import running_broker
from hacrl_exchange.types import (
    Lockstep,
    Message,
    PoolSpec,
    Prompt,
    PromptEntry,
    Scored,
    VerificationPlan,
    VerifierIdentity,
    VerifierUse,
)

pytestmark = pytest.mark.slow
STEPS = 3
SETTINGS = TrainerSettings(
    hacpo=HacpoConfig(self_clip_low=0.05, self_clip_high=0.05),
    max_tokens=12,
    minibatch_prompts=2,
    micro_batch=8,
    learning_rate=1e-3,
)
SHAPE = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
COIN = VerifierIdentity("coin", "1", b"\x00" * 32)


def coin(text: str) -> Scored:
    """Scores by a hash, so that random models earn mixed rewards."""
    return Scored(float(hashlib.sha256(text.encode()).digest()[0] % 2))


@contextmanager
def judging(target: str) -> Iterator[None]:
    """A worker in a thread."""
    ended = threading.Event()

    def work() -> None:
        with WorkerClient(target) as client:
            worker = client.register("coin", offered=[OfferedVerifier("coin", "1")]).worker
            while not ended.is_set():
                lease = client.acquire(worker, max_groups=16, wait_seconds=0.2)
                if lease is None:
                    continue
                reports = [
                    VerdictReport(
                        group.name, group.generation, COIN, tuple(coin(each.text) for each in group.rollouts)
                    )
                    for group in lease.groups
                ]
                client.report(worker, lease=lease.lease, reports=reports)

    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(work)
        try:
            yield
        finally:
            ended.set()
            working.result(timeout=20)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with running_broker() as broker, judging(broker.target):
        with AdminClient(broker.target) as admin:
            entries = [PromptEntry(Prompt(f"p{i}", (Message("user", f"{i} + 1"),))) for i in range(12)]
            admin.create_prompt_set("sums", entries)
        yield broker.target


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Two random models of different architecture and tokenizer, in folders."""
    qwen, llama = "0123456789+=;. ", ". ;=+9876543210"
    torch.manual_seed(3)
    return {
        "a": saved(Qwen3ForCausalLM(Qwen3Config(head_dim=8, **SHAPE)), [*qwen], tmp_path / "model-a"),
        "b": saved(LlamaForCausalLM(LlamaConfig(**SHAPE)), ["1+", "10", *llama], tmp_path / "model-b"),
    }


def saved(model: PreTrainedModel, pieces: list[str], folder: Path) -> Path:
    vocabulary = {piece: index for index, piece in enumerate(["<pad>", "<end>", "<unknown>", *pieces])}
    longest_first = sorted(pieces, key=len, reverse=True)
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = Split(Regex("|".join(map(re.escape, longest_first))), behavior="isolated")
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def create_pool(target: str, name: str, *, min_members: int = 2, max_steps: int = STEPS) -> None:
    plan = VerificationPlan((VerifierUse("coin"),))
    lockstep = Lockstep(prompts_per_step=4, min_members=min_members, max_steps=max_steps)
    with AdminClient(target) as admin:
        admin.create_pool(name, PoolSpec("sums", 4, plan, lockstep, seed=1))


def open_at(target: str, pool: str, name: str, model: Path, out: Path) -> Trainer:
    """A trainer at its checkpoint or start. Loading models is not for several threads at once."""
    return open_trainer(
        AgentOptions(broker=target, pool=pool, name=name, model=str(model), out=out, settings=SETTINGS)
    )


def take_part(
    trainer: Trainer,
    target: str,
    *,
    resume_after: int | None = None,
    on_phase: Callable[[int, str], None] = lambda step, phase: None,
) -> list[StepReport]:
    """Joins and trains until the pool ends."""
    reports: list[StepReport] = []
    state = trainer.state
    with (
        connect(target) as exchange,
        exchange.join(state.pool, agent=state.agent, resume_after=resume_after) as agent,
    ):
        trainer.run(agent, on_step=reports.append, on_phase=on_phase)
    return reports


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return dict(trainer.policy.model.state_dict())


def test_strangers_learn_from_each_other_and_a_crash_changes_nothing(
    target: str, models: dict[str, Path], tmp_path: Path
) -> None:
    for pool in ("whole", "cut"):
        create_pool(target, pool)

    def crash(step: int, phase: str) -> None:
        if step == 2 and phase.startswith("waiting"):
            raise ConnectionAbortedError("as if killed between publishing and the joint batch")

    def opened(pool: str, name: str) -> Trainer:
        return open_at(target, pool, name, models[name], tmp_path / pool / name)

    whole_a, whole_b, cut_a, cut_b = (opened(pool, name) for pool in ("whole", "cut") for name in "ab")
    with ThreadPoolExecutor(4) as threads:
        others = [threads.submit(take_part, trainer, target) for trainer in (whole_a, whole_b, cut_b)]
        with pytest.raises(ConnectionAbortedError):
            take_part(cut_a, target, on_phase=crash)
        resumed = opened("cut", "a")
        after = take_part(resumed, target, resume_after=resumed.state.step)
        reports, *_ = [other.result(timeout=60) for other in others]

    assert [report.step for report in reports] == [1, 2, 3]
    assert [report.step for report in after] == [2, 3]
    assert all(report.peer_rollouts_used > 0 for report in reports)
    assert resumed.state == replace(whole_a.state, pool="cut")
    for one, other in ((resumed, whole_a), (cut_b, whole_b)):
        assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def test_the_command_trains_alone_in_a_pool_of_one_and_goes_on_where_it_ended(
    target: str, models: dict[str, Path], tmp_path: Path
) -> None:
    create_pool(target, "alone", min_members=1, max_steps=5)
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text('{"prompt": "1 + 1", "reference": "2"}\n', encoding="utf-8")

    def run(steps: int) -> list[str]:
        command = [sys.executable, "-m", "hacrl_exchange.cli", "agent", "--broker", target, "--pool", "alone"]
        command += ["--name", "a", "--model", str(models["a"]), "--objective", "gspo", "--max-tokens", "12"]
        command += ["--minibatch-prompts", "2", "--steps", str(steps), "--eval-file", str(held_out)]
        command += ["--out", str(tmp_path / "out"), "--journal", str(tmp_path / "journals" / "a.jsonl")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    first, second = run(2), run(3)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()

    # By leaving after step 2 the agent gave up step 3, which was open already.
    assert [(line["step"], line["trained"]) for line in map(json.loads, lines)] == [
        (1, True),
        (2, True),
        (3, False),
        (4, True),
    ]
    assert first[-1].startswith("trained 2 steps with 4 updates; ")
    assert second[0].startswith("going on after step 2 ")
    assert second[-1].startswith("trained 3 steps with 6 updates; ")
    assert len((tmp_path / "journals" / "a.jsonl").read_text().splitlines()) == 12
    assert len((tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()) == 3


def test_a_pool_that_does_not_exist_is_one_sentence_and_exit_code_1(
    target: str, models: dict[str, Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "hacrl_exchange.cli", "agent", "--broker", target, "--pool", "nowhere"]
    command += ["--name", "a", "--model", str(models["a"]), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith("hacrl agent: ")
    assert "nowhere" in done.stderr
    assert len(done.stderr.splitlines()) == 1
