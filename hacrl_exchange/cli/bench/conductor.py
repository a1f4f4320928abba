"""Conducts the benchmark: starts the processes, runs the phases, kills the broker, recounts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from hacrl_exchange.broker.audit import audit
from hacrl_exchange.cli.bench.corpus import Language, Shape
from hacrl_exchange.cli.bench.figures import Circumstances, Figures, percentile, rate
from hacrl_exchange.cli.bench.processes import BenchFailedError, RoleProcess
from hacrl_exchange.cli.bench.roles import VERIFIER
from hacrl_exchange.client import AdminClient
from hacrl_exchange.testing import BrokerProcess
from hacrl_exchange.types import (
    Lockstep,
    Message,
    PoolSpec,
    Prompt,
    PromptEntry,
    RevealRule,
    VerificationPlan,
    VerifierUse,
)

_PATIENCE_SECONDS = 3600.0
_SAMPLE_GROUPS = 16

Show = Callable[[str, int], Callable[[int], None]]
"""Opens a progress bar: its title and total; the answer is told how much is done."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to do. `groups` per phase is a multiple of `step_prompts`, at most 64 steps."""

    groups: int
    step_prompts: int
    shape: Shape
    seed: int

    @property
    def rollouts(self) -> int:
        """Rollouts of a phase."""
        return self.groups * self.shape.rollouts

    @property
    def steps(self) -> int:
        """Steps of a phase."""
        return self.groups // self.step_prompts


@dataclass
class _Run:
    """The processes and what they have come to."""

    plan: Plan
    broker: BrokerProcess
    publisher: RoleProcess
    worker: RoleProcess
    consumer: RoleProcess
    show: Show
    folder: Path
    pools: dict[str, int] = field(default_factory=dict)
    journals: list[str] = field(default_factory=list)

    def pool(self, name: str, *, groups: int, open_steps: int) -> None:
        """Makes a pool of one agent, readable by everybody."""
        steps = max(1, groups // self.plan.step_prompts)
        spec = PoolSpec(
            prompt_set="bench",
            group_size=self.plan.shape.rollouts,
            plan=VerificationPlan((VerifierUse(VERIFIER),)),
            lockstep=Lockstep(
                prompts_per_step=min(groups, self.plan.step_prompts),
                min_members=1,
                publish_timeout_seconds=_PATIENCE_SECONDS,
                verify_timeout_seconds=_PATIENCE_SECONDS,
                max_open_steps=min(open_steps, 64),
                max_steps=steps,
            ),
            reveal=RevealRule.OPEN,
        )
        with AdminClient(self.broker.target) as admin:
            admin.create_pool(name, spec)
        self.pools[name] = steps

    def generate(self, *, groups: int, seed: int, text_only: bool = False) -> None:
        """Fills the publisher's memory, off the clock."""
        shape = self.plan.shape
        self.publisher.ask(
            "generate",
            progress=self.show("generate", groups * shape.rollouts),
            groups=groups,
            seed=seed,
            rollouts=shape.rollouts,
            tokens=shape.tokens,
            text_only=text_only,
        ).result()

    def publish(self, pool: str, title: str, rollouts: int) -> Future[dict[str, Any]]:
        """Starts publishing what was generated."""
        journal = str(self.folder / f"{pool}.jsonl")
        self.journals.append(journal)
        return self.publisher.ask(
            "publish",
            progress=self.show(title, rollouts),
            broker=self.broker.target,
            pool=pool,
            journal=journal,
        )

    def verify(self, title: str, rollouts: int) -> Future[dict[str, Any]]:
        """Starts verifying so many rollouts."""
        return self.worker.ask(
            "verify", progress=self.show(title, rollouts), broker=self.broker.target, rollouts=rollouts
        )

    def consume(self, pool: str, title: str) -> Future[dict[str, Any]]:
        """Starts reading a pool to its end."""
        return self.consumer.ask(
            "consume",
            progress=self.show(title, self.plan.rollouts),
            broker=self.broker.target,
            pool=pool,
            steps=self.pools[pool],
        )


def conduct(plan: Plan, *, folder: Path, show: Show) -> tuple[Figures, Circumstances]:
    """Runs every phase in an empty folder.

    Raises:
        BenchFailedError: a role failed, or what came out is not what went in.
        ExchangeError, OSError: the broker could not be started or used.
    """
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        run = _Run(
            plan=plan,
            broker=stack.enter_context(BrokerProcess(folder / "broker", workers=0)),
            publisher=stack.enter_context(RoleProcess("publisher")),
            worker=stack.enter_context(RoleProcess("worker")),
            consumer=stack.enter_context(RoleProcess("consumer")),
            show=show,
            folder=folder,
        )
        with AdminClient(run.broker.target) as admin:
            admin.create_prompt_set("bench", [_prompt(number) for number in range(plan.groups)])
        before = cpu_seconds(run.broker.pid)
        published, verified, consumed = _phased(run)
        broker_cpu = cpu_seconds(run.broker.pid) - before
        together = _concurrent(run)
        text = _text_alone(run)
        run.broker.kill()
        run.broker.start()
        recount = run.consumer.ask(
            "recount",
            progress=show("recount after kill -9", sum(run.pools.values()) * plan.step_prompts),
            broker=run.broker.target,
            pools=run.pools,
            journals=run.journals,
        ).result()
        report = audit(run.broker.folder, [Path(journal) for journal in run.journals])
    figures = Figures(
        publish_rollouts_per_s=rate([published], plan.rollouts),
        consume_rollouts_per_s=rate([consumed], plan.rollouts),
        concurrent_rollouts_per_s=rate(together, plan.rollouts),
        wire_bytes_per_token=published["wire_bytes"] / published["tokens"],
        wire_bytes_per_token_text=text["wire_bytes"] / text["tokens"],
        commit_p99_ms=1000 * percentile(published["call_seconds"], 0.99),
        receipts=recount["receipts"],
        # Both ways of counting must find a receipt: through the API, and in the log and the bodies.
        recovered=min(recount["recovered"], report.receipts_found),
    )
    around = Circumstances(
        groups=plan.groups,
        tokens_per_group=plan.shape.tokens_per_group,
        verify_rollouts_per_s=rate([verified], plan.rollouts),
        delivered_bytes_per_token=consumed["wire_bytes"] / consumed["tokens"],
        zstd19_bytes_per_token=zstd19_bytes_per_token(plan.shape),
        audit_problems=report.problem_count,
        load_average=load,
        cpu_ms_per_group={
            role: 1000 * seconds / plan.groups
            for role, seconds in (
                ("publisher", published["cpu_seconds"]),
                ("worker", verified["cpu_seconds"]),
                ("consumer", consumed["cpu_seconds"]),
                ("broker", broker_cpu),
            )
        },
    )
    return figures, around


def _phased(run: _Run) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Publish everything, then verify everything, then consume everything."""
    rollouts = run.plan.rollouts
    run.pool("phased", groups=run.plan.groups, open_steps=run.plan.steps)
    run.generate(groups=run.plan.groups, seed=run.plan.seed)
    published = run.publish("phased", "publish", rollouts).result()
    verified = run.verify("verify", rollouts).result()
    consumed = run.consume("phased", "consume").result()
    _check(published, consumed, rollouts)
    return published, verified, consumed


def _concurrent(run: _Run) -> list[dict[str, Any]]:
    """All three at once, on other groups."""
    rollouts = run.plan.rollouts
    run.pool("concurrent", groups=run.plan.groups, open_steps=8)
    run.generate(groups=run.plan.groups, seed=run.plan.seed + 1)
    consuming = run.consume("concurrent", "consume, all at once")
    verifying = run.verify("verify, all at once", rollouts)
    publishing = run.publish("concurrent", "publish, all at once", rollouts)
    published, verified, consumed = publishing.result(), verifying.result(), consuming.result()
    _check(published, consumed, rollouts)
    # The consumer and the worker were waiting before there was anything to do.
    return [published, {**verified, "began": published["began"]}, {**consumed, "began": published["began"]}]


def _text_alone(run: _Run) -> dict[str, Any]:
    """One step of groups that carry nothing but text and sums."""
    groups = min(run.plan.groups, run.plan.step_prompts)
    rollouts = groups * run.plan.shape.rollouts
    run.pool("text", groups=groups, open_steps=1)
    run.generate(groups=groups, seed=run.plan.seed + 2, text_only=True)
    publishing = run.publish("text", "publish text alone", rollouts)
    verifying = run.verify("verify text alone", rollouts)
    published = publishing.result()
    verifying.result()
    return published


def _check(published: dict[str, Any], consumed: dict[str, Any], rollouts: int) -> None:
    if not published["rollouts"] == consumed["rollouts"] == rollouts:
        raise BenchFailedError(
            f"{rollouts} rollouts were made, {published['rollouts']} receipts came back and "
            f"{consumed['rollouts']} scored rollouts were delivered; these must be equal."
        )


def _prompt(number: int) -> PromptEntry:
    return PromptEntry(Prompt(f"{number:05d}", (Message("user", f"Tell story {number}."),)))


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used so far; NaN where there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return math.nan
    user, system = stat.rpartition(")")[2].split()[11:13]  # after the name, which may hold anything
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def zstd19_bytes_per_token(shape: Shape, *, groups: int = _SAMPLE_GROUPS) -> float:
    """What the best zstd makes of some texts, all in one frame."""
    texts = [rollout.text for group in Language().groups(groups, seed=7, shape=shape) for rollout in group]
    pressed = zstandard.ZstdCompressor(level=19).compress("\n".join(texts).encode())
    return len(pressed) / (groups * shape.tokens_per_group)
