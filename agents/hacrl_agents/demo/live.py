"""What a person sees while the demo runs: a table that lives on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from hacrl_agents.demo.runs import Run
from hacrl_agents.demo.settings import DemoSettings

_LINE_EVERY_STEPS = 10
_BAR_WIDTH = 9


class Board:
    """Shows all runs. Use `shown()` around the time it lives."""

    def __init__(self, console: Console, *, settings: DemoSettings) -> None:
        self._console = console
        self._settings = settings
        self._live: Live | None = None
        self._told: dict[str, int] = {}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keeps the table on the terminal."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def update(self, runs: Sequence[Run]) -> None:
        """Shows where everybody stands now."""
        if self._live is not None:
            self._live.update(self._table(runs), refresh=True)
            return
        for run in runs:
            done = len(run.steps())
            if done >= self._told.get(run.label, 0) + _LINE_EVERY_STEPS:
                self._told[run.label] = done
                self._console.print(self._line(run), highlight=False)

    def _table(self, runs: Sequence[Run]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("agent", no_wrap=True)
        table.add_column("steps", width=_BAR_WIDTH)
        for title in ("", "solved", "held-out", "peers' used", "ratio"):
            table.add_column(title, justify="right", no_wrap=True)
        for run in runs:
            steps = run.steps()
            last = steps[-1] if steps else {}
            curve = run.curve()
            table.add_row(
                run.label,
                ProgressBar(total=self._settings.steps, completed=len(steps), width=_BAR_WIDTH),
                f"{len(steps)}/{self._settings.steps}",
                _percent(last.get("success_rate")),
                f"{curve[0][1]:.1%} -> {curve[-1][1]:.1%}" if curve else "",
                f"{sum(step['peer_rollouts_used'] for step in steps):,}" if not run.alone else "-",
                _ratio(last),
            )
        return table

    def _line(self, run: Run) -> str:
        steps, curve = run.steps(), run.curve()
        held_out = f", held-out {curve[0][1]:.1%} -> {curve[-1][1]:.1%}" if curve else ""
        peers = (
            "" if run.alone else f", {sum(step['peer_rollouts_used'] for step in steps):,} rollouts of peers"
        )
        solved = _percent(steps[-1]["success_rate"]) or "nothing scored"
        return f"{run.label}: {len(steps)}/{self._settings.steps} steps, solved {solved}{held_out}{peers}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _ratio(step: dict[str, object]) -> str:
    ratios = step.get("ratios")
    value = ratios.get("cross_ratio") if isinstance(ratios, dict) else None
    return "" if value is None else f"{value:.3f}"
