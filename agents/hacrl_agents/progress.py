"""What a person sees of a running agent: a line per step, and on a terminal what it is doing now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from hacrl_agents.metrics import StepReport


class Progress:
    """Prints reports. Use `running()` around the training so that the live line is taken away at its end."""

    def __init__(self, console: Console, *, name: str) -> None:
        self._console = console
        self._name = name
        self._status: Status | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Shows the live line on a terminal; elsewhere nothing."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(f"{escape(self._name)} is waiting for a step") as status:
            self._status = status
            try:
                yield
            finally:
                self._status = None

    def say(self, text: str) -> None:
        """Prints one line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_phase(self, step: int, phase: str) -> None:
        """Shows what the agent is doing."""
        if self._status is not None:
            self._status.update(f"{escape(self._name)}, step {step}: {escape(phase)}")

    def on_step(self, report: StepReport) -> None:
        """Prints the line of a step."""
        self.say(describe(report, name=self._name))


def describe(report: StepReport, *, name: str) -> str:
    """Returns one step in one line."""
    mine = report.sources.get(name)
    rate = "no score" if report.success_rate is None else f"{report.success_rate:.1%} solved"
    parts = [f"step {report.step:>4}", f"own {rate}" + (f" of {mine.scored}" if mine is not None else "")]
    if report.trained:
        parts.append(f"{report.peer_rollouts_used} of peers")
        if "cross_ratio" in report.ratios:
            parts.append(f"ratio {report.ratios['cross_ratio']:.3f}")
        parts.append(f"{len(report.losses)} updates, gradient {max(report.gradient_norms):.2g}")
    else:
        parts.append(
            "not trained: no quorum" if not report.quorum_met else "not trained: nothing to learn from"
        )
    skipped: dict[str, int] = {}
    for counts in report.sources.values():
        for reason, count in (counts.skipped or {}).items():
            skipped[reason] = skipped.get(reason, 0) + count
    parts += [f"{count} left out ({reason})" for reason, count in skipped.items()]
    unscored = sum(counts.rollouts - counts.scored for counts in report.sources.values())
    if unscored:
        parts.append(f"{unscored} unscored")
    work = report.sample_seconds + report.publish_seconds + report.train_seconds + report.checkpoint_seconds
    parts.append(f"{work:.1f} s work, {report.wait_seconds:.1f} s waiting")
    return " | ".join(parts)
