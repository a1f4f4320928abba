"""One agent's process from start to end: load or resume, join, train, evaluate, leave."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from hacrl_agents.checkpoint import TrainerState, latest_checkpoint, read_state, restore
from hacrl_agents.errors import CheckpointError
from hacrl_agents.evaluation import accuracy, load_scorer, read_held_out
from hacrl_agents.metrics import StepLines, StepReport
from hacrl_agents.policy import load_policy
from hacrl_agents.progress import Progress
from hacrl_agents.settings import TrainerSettings
from hacrl_agents.trainer import Trainer
from hacrl_exchange.client import connect


@dataclass(frozen=True, kw_only=True)
class AgentOptions:
    """What the command line says, beside the trainer's settings."""

    broker: str
    pool: str
    name: str
    model: str
    out: Path
    settings: TrainerSettings
    journal: Path | None = None
    device: str = "cpu"
    threads: int = 1
    eval_file: Path | None = None
    eval_scorer: str = "hacrl_agents.evaluation:exact_match"
    eval_every: int = 0
    """Trained steps between evaluations; 0: only before and after."""


def run_agent(options: AgentOptions, *, console: Console) -> TrainerState:
    """Runs one agent until its pool ends or its steps are done, and returns where it stands.

    A folder with a checkpoint is gone on with; `options.model` then is only the name that peers see.

    Raises:
        AgentError: see hacrl_agents.errors.
        ExchangeError: what the exchange refuses, or that it cannot be reached.
        OSError: the folder or the journal cannot be written.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.settings.seed)
    progress = Progress(console, name=options.name)
    resumed = latest_checkpoint(options.out / "checkpoints") is not None
    trainer = open_trainer(options)
    state = trainer.state
    if resumed:
        progress.say(f"going on after step {state.step} with the checkpoint in {options.out}")
    evaluation = _Evaluation(options, progress, resume_after=state.step)
    evaluation.run_if_due(trainer)
    if options.journal is not None:
        options.journal.parent.mkdir(parents=True, exist_ok=True)
    metrics = StepLines(options.out / "metrics.jsonl", resume_after=state.step)

    def on_step(report: StepReport) -> None:
        metrics.append(report.as_line())
        progress.on_step(report)
        evaluation.run_if_due(trainer)

    if not trainer.is_done:
        _take_part(trainer, options, resumed=resumed, on_step=on_step, progress=progress)
    evaluation.run(trainer)
    state = trainer.state
    progress.say(
        f"trained {state.steps_trained} steps with {state.updates} updates; results are in {options.out}"
    )
    return state


def _take_part(
    trainer: Trainer,
    options: AgentOptions,
    *,
    resumed: bool,
    on_step: Callable[[StepReport], None],
    progress: Progress,
) -> None:
    """Joins, trains, leaves."""
    with (
        progress.running(),
        connect(options.broker) as exchange,
        exchange.join(
            options.pool,
            agent=options.name,
            model=trainer.policy.spec(options.model),
            resume_after=trainer.state.step if resumed else None,
            journal=options.journal,
        ) as agent,
    ):
        trainer.run(agent, on_step=on_step, on_phase=progress.on_phase)


def open_trainer(options: AgentOptions) -> Trainer:
    """Returns a trainer at the newest checkpoint, or at the start.

    Raises:
        ModelLoadError: if the model cannot be loaded.
        CheckpointError: if the folder's checkpoint is damaged, or of another agent or pool.
    """
    checkpoints = options.out / "checkpoints"
    latest = latest_checkpoint(checkpoints)
    state = TrainerState(pool=options.pool, agent=options.name) if latest is None else read_state(latest)
    if (state.pool, state.agent) != (options.pool, options.name):
        raise CheckpointError(
            f"The folder {options.out} holds agent {state.agent} of pool {state.pool}, not {options.name} of "
            f"{options.pool}: use another --out."
        )
    policy = load_policy(options.model if latest is None else latest, device=options.device)
    trainer = Trainer(policy, options.settings, state=state, checkpoints=checkpoints)
    if latest is not None:
        restore(latest, policy, trainer.optimizer)
    return trainer


class _Evaluation:
    """Measures held-out accuracy before, after and in between, if there is a file of prompts."""

    def __init__(self, options: AgentOptions, progress: Progress, *, resume_after: int) -> None:
        self._held_out = read_held_out(options.eval_file) if options.eval_file is not None else None
        self._every = options.eval_every
        self._scorer = load_scorer(options.eval_scorer)
        self._max_tokens = options.settings.max_tokens
        self._progress = progress
        if self._held_out is not None:
            self._lines = StepLines(options.out / "evaluations.jsonl", resume_after=resume_after)

    def run_if_due(self, trainer: Trainer) -> None:
        """Measures at the start of a run and every so many trained steps."""
        trained = trainer.state.steps_trained
        if trained == 0 or (self._every and trained % self._every == 0):
            self.run(trainer)

    def run(self, trainer: Trainer) -> None:
        """Measures, unless it was done at this step."""
        state = trainer.state
        if self._held_out is None or state.step in self._lines.steps:
            return
        started = time.perf_counter()
        value = accuracy(trainer.policy, self._held_out, max_tokens=self._max_tokens, scorer=self._scorer)
        self._lines.append(
            {
                "step": state.step,
                "steps_trained": state.steps_trained,
                "updates": state.updates,
                "accuracy": value,
                "prompts": len(self._held_out),
                "seconds": time.perf_counter() - started,
            }
        )
        self._progress.say(f"held-out accuracy after step {state.step}: {value:.1%} of {len(self._held_out)}")
