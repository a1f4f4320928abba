"""The trainer: one agent in one pool, step by step.

Per step: sample what is missing, recompute own log-probs, publish, wait for the joint batch, update, save.
Everything that decides what is learned stands in `lessons` and `updates`; here is only the order of things.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hacrl_agents.checkpoint import TrainerState, latest_checkpoint, save_checkpoint
from hacrl_agents.exchange import Agent, JointBatch, Step
from hacrl_agents.lessons import Lesson, build_lesson
from hacrl_agents.metrics import StepReport
from hacrl_agents.objectives import OBJECTIVES
from hacrl_agents.policy import Policy
from hacrl_agents.rollouts import OwnLogProbs, make_own_groups
from hacrl_agents.settings import TrainerSettings
from hacrl_agents.tokens import encode_prompt
from hacrl_agents.updates import UpdateReport, make_optimizer, run_updates
from hacrl_exchange.types import PolicyVersion, PoolSpec

Clock = Callable[[], float]


class Trainer:
    """Trains one policy in one pool. `state`, `policy` and `optimizer` are what a checkpoint holds."""

    def __init__(
        self,
        policy: Policy,
        settings: TrainerSettings,
        *,
        state: TrainerState,
        checkpoints: Path | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Starts at `state`; restore the optimizer afterwards if that is a checkpoint's.

        Args:
            policy: the model with the weights of `state`.
            settings: see TrainerSettings.
            state: a new run's or a checkpoint's.
            checkpoints: where to write them; None writes none.
            clock: for the durations of reports.
        """
        self.policy = policy
        self.settings = settings
        self.state = state
        self.optimizer = make_optimizer(
            policy,
            learning_rate=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self._checkpoints = checkpoints
        self._clock = clock

    def run(
        self,
        agent: Agent,
        *,
        on_step: Callable[[StepReport], None] = lambda report: None,
        on_phase: Callable[[int, str], None] = lambda step, phase: None,
    ) -> TrainerState:
        """Trains until the pool ends or `settings.steps` are done, and returns where it stands.

        Args:
            agent: the membership; join with `resume_after=state.step`.
            on_step: called with the report of every step.
            on_phase: called with the step's number and what is being done now.

        Raises:
            ExchangeError: what the exchange refuses. Publishing late is none: it costs the step alone.
            AgentError: if a prompt doesn't fit or a gradient is not finite.
        """
        if not self.is_done:
            for step in agent.steps():
                self._save_start(step)
                on_step(self.train_step(agent, step, on_phase=on_phase))
                if self.is_done:
                    break
        return self.state

    def train_step(
        self,
        agent: Agent,
        step: Step,
        *,
        on_phase: Callable[[int, str], None] = lambda step, phase: None,
    ) -> StepReport:
        """Takes part in one step, learns from it, writes a checkpoint if one is due, and reports."""
        started = self._clock()
        on_phase(step.number, "sampling")
        prompt_ids = {
            prompt.prompt_id: encode_prompt(self.policy.tokenizer, prompt) for prompt in step.prompts
        }
        groups = make_own_groups(
            self.policy,
            step.prompts,
            prompt_ids=prompt_ids,
            committed=step.committed,
            closed=step.closed,
            agent=agent.name,
            step=step.number,
            version=PolicyVersion(agent.session, self.state.updates),
            group_size=agent.spec.group_size,
            settings=_within(agent.spec, self.settings),
        )
        sampled = self._clock()
        on_phase(step.number, "publishing")
        late = len(agent.publish(groups.missing).late) if groups.missing else 0
        published = self._clock()
        on_phase(step.number, "waiting for verdicts and peers")
        batch = step.joint_batch(parts=("text", "tokens"))
        received = self._clock()
        on_phase(step.number, "training")
        lesson, updated, rate = self._learn(agent, step, batch, prompt_ids, groups.own)
        trained = self._clock()
        self._save_if_due()
        return _report(
            batch,
            learner=agent.name,
            state=self.state,
            settings=self.settings,
            lesson=lesson,
            updated=updated,
            own=groups.own,
            late=late,
            learning_rate=rate,
            seconds=(sampled - started, published - sampled, received - published, trained - received),
            checkpoint_seconds=self._clock() - trained,
        )

    def _learn(
        self,
        agent: Agent,
        step: Step,
        batch: JointBatch,
        prompt_ids: dict[str, tuple[int, ...]],
        own: OwnLogProbs,
    ) -> tuple[Lesson, UpdateReport | None, float]:
        """Makes the updates of a step and moves the state past it."""
        lesson = build_lesson(
            batch,
            policy=self.policy,
            learner=agent.name,
            updates=self.state.updates,
            prompt_ids=prompt_ids,
            spec=agent.spec,
            settings=self.settings,
            stored=step.committed,
            own=own,
        )
        if (not batch.quorum_met and self.settings.on_degraded == "skip") or not lesson.plan:
            self.state = replace(self.state, step=batch.step)
            return lesson, None, 0.0
        rate = self._learning_rate()
        updated = run_updates(
            self.policy,
            self.optimizer,
            lesson.plan,
            objective=OBJECTIVES[self.settings.objective],
            config=lesson.config,
            learning_rate=rate,
            micro_batch=self.settings.micro_batch,
            max_grad_norm=self.settings.max_grad_norm,
        )
        self.state = replace(
            self.state,
            step=batch.step,
            steps_trained=self.state.steps_trained + 1,
            updates=self.state.updates + updated.updates,
        )
        return lesson, updated, rate

    def _learning_rate(self) -> float:
        """Returns the learning rate of the coming step: rising linearly over the warm-up, then constant."""
        warmup = self.settings.warmup_steps
        share = (self.state.steps_trained + 1) / warmup if warmup else 1.0
        return self.settings.learning_rate * min(1.0, share)

    @property
    def is_done(self) -> bool:
        """All steps that the settings ask for are trained."""
        return 0 < self.settings.steps <= self.state.steps_trained

    def _save_start(self, step: Step) -> None:
        """Saves the start of a new run: killed in its first step, it resumes there, not after it."""
        if self._checkpoints is not None and latest_checkpoint(self._checkpoints) is None:
            self.state = replace(self.state, step=step.number - 1)
            save_checkpoint(self._checkpoints, self.policy, self.optimizer, state=self.state)

    def _save_if_due(self) -> None:
        due = self.state.step % self.settings.checkpoint_every == 0 or self.is_done
        if self._checkpoints is not None and due:
            save_checkpoint(self._checkpoints, self.policy, self.optimizer, state=self.state)


def _within(spec: PoolSpec, settings: TrainerSettings) -> TrainerSettings:
    """Returns the settings with the pool's token limit, if that is lower."""
    return replace(settings, max_tokens=min(settings.max_tokens, spec.max_tokens or settings.max_tokens))


def _report(
    batch: JointBatch,
    *,
    learner: str,
    state: TrainerState,
    settings: TrainerSettings,
    lesson: Lesson,
    updated: UpdateReport | None,
    own: OwnLogProbs,
    late: int,
    learning_rate: float,
    seconds: tuple[float, float, float, float],
    checkpoint_seconds: float,
) -> StepReport:
    mine = lesson.sources.get(learner)
    tokens = sum(len(values) for values in own.log_probs)
    log_prob = sum(float(values.double().sum()) for values in own.log_probs)
    sample_seconds, publish_seconds, wait_seconds, train_seconds = seconds
    return StepReport(
        step=batch.step,
        steps_trained=state.steps_trained,
        outcome=batch.outcome.name,
        quorum_met=batch.quorum_met,
        trained=updated is not None,
        objective=settings.objective,
        updates=state.updates,
        learning_rate=learning_rate,
        success_rate=mine.successes / mine.scored if mine is not None and mine.scored else None,
        response_tokens=tokens / len(own.log_probs) if own.log_probs else 0.0,
        entropy_proxy=-log_prob / tokens if tokens else 0.0,
        capabilities=dict(batch.capabilities),
        sources=lesson.sources,
        advantages=lesson.advantages,
        stale_own=lesson.stale_own,
        unrevealed=batch.unrevealed_count,
        withheld=batch.withheld_count,
        late=late,
        losses=updated.losses if updated is not None else (),
        gradient_norms=updated.gradient_norms if updated is not None else (),
        ratios=updated.ratios if updated is not None else {},
        peer_rollouts_used=(
            sum(counts.trained for agent, counts in lesson.sources.items() if agent != learner)
            if updated is not None
            else 0
        ),
        sample_seconds=sample_seconds,
        publish_seconds=publish_seconds,
        wait_seconds=wait_seconds,
        train_seconds=train_seconds,
        checkpoint_seconds=checkpoint_seconds,
    )
