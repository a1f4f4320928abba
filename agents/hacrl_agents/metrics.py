"""The record of a run: one JSON object per step, appended to metrics.jsonl."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hacrl_agents.advantages import AdvantageCounts
from hacrl_agents.lessons import SourceCounts


@dataclass(frozen=True)
class StepReport:
    """What happened in one step of one agent. Times are in seconds."""

    step: int
    steps_trained: int
    outcome: str
    quorum_met: bool
    trained: bool
    objective: str
    updates: int
    """Of the whole run so far."""
    learning_rate: float
    success_rate: float | None
    """Of the agent's own scored rollouts, at the pool's threshold."""
    response_tokens: float
    """Mean over own responses, end tokens included."""
    entropy_proxy: float
    """Minus the mean log-prob per own token."""
    capabilities: Mapping[str, float]
    sources: Mapping[str, SourceCounts]
    advantages: AdvantageCounts
    stale_own: int
    unrevealed: int
    withheld: int
    late: int
    """Own groups that came after publishing had ended."""
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    ratios: Mapping[str, float]
    peer_rollouts_used: int
    sample_seconds: float
    publish_seconds: float
    wait_seconds: float
    train_seconds: float
    checkpoint_seconds: float = 0.0

    def to_json(self) -> str:
        """Returns the report as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


class MetricsFile:
    """Appends reports to a file. Steps after the checkpoint that a run goes on from are dropped first."""

    def __init__(self, path: Path, *, resume_after: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= resume_after:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut short by a crash
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)

    def append(self, report: StepReport) -> None:
        """Adds one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{report.to_json()}\n")
