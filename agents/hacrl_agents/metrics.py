"""The record of a run: a report per step, and the files of JSON lines that keep such things."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def as_line(self) -> dict[str, Any]:
        """Returns the report as a JSON object."""
        return dataclasses.asdict(self)


class StepLines:
    """A file of JSON objects, each with a `step`; those after the step that a run resumes at are dropped."""

    def __init__(self, path: Path, *, resume_after: int) -> None:
        self._path = path
        self.steps: set[int] = set()
        """Steps that have a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    step = int(json.loads(line)["step"])
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut short by a crash
                if step <= resume_after:
                    kept.append(line)
                    self.steps.add(step)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, path)

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds one object."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line, sort_keys=True)}\n")
        self.steps.add(line["step"])
