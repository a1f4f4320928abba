"""A small run: a broker with a worker, and two untrained models of the demo as agents, all real processes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from hacrl_agents.checkpoint import latest_checkpoint
from hacrl_agents.demo.models import DESIGNS, build_agent
from hacrl_agents.demo.processes import Kept, exchange_command
from hacrl_agents.demo.task import make_split
from hacrl_exchange.client import AdminClient
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
from processes import wait_until

STEPS, PROMPTS, GROUP_SIZE = 6, 4, 4


def write_models(folder: Path) -> Path:
    """Two untrained models, in folders of their names."""
    for design in DESIGNS:
        model, tokenizer = build_agent(design, seed=0)
        model.save_pretrained(folder / design.name)
        tokenizer.save_pretrained(folder / design.name)
    return folder


def create_pool(target: str, *, steps: int) -> None:
    """Pool `p`; with 0 steps it never ends and its prompts come again."""
    problems = make_split(0, training=STEPS * PROMPTS, held_out=1).training
    entries = [
        PromptEntry(Prompt(problem.prompt_id, (Message("user", problem.question),)), problem.entry_json)
        for problem in problems
    ]
    with AdminClient(target) as admin:
        admin.create_prompt_set("sums", entries)
        plan = VerificationPlan((VerifierUse("digits:has_digit"),))
        lockstep = Lockstep(prompts_per_step=PROMPTS, max_steps=steps)
        admin.create_pool("p", PoolSpec("sums", GROUP_SIZE, plan, lockstep))


class SmallRun:
    """A broker with a worker, and two agents, as processes."""

    def __init__(self, folder: Path, models: Path, *, steps: int = STEPS) -> None:
        self.folder = folder
        self.broker = BrokerProcess(folder / "broker", workers=1, verifiers=["digits:has_digit"])
        self.broker.start()
        create_pool(self.broker.target, steps=steps)
        self.agents = [self.start_agent(design.name, models / design.name) for design in DESIGNS]

    def start_agent(self, name: str, model: Path, *more: str) -> Kept:
        """One more agent, by the one command; `more` are further options."""
        command = exchange_command(
            "agent",
            *("--broker", self.broker.target, "--pool", "p", "--name", name),
            *("--model", str(model), "--out", str(self.folder / name)),
            *("--journal", str(self.folder / f"{name}.jsonl"), "--max-tokens", "12"),
            *("--minibatch-prompts", "2", "--lr", "1e-3", "--own-clip", "0.05"),
            *more,
        )
        return Kept(name, command, log=self.folder / f"{name}.log")

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
