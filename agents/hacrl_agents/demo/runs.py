"""One agent of the demo as its files tell: what it measured, published and learned."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hacrl_agents.demo.processes import Kept


@dataclass(frozen=True)
class Run:
    """An agent in a pool: the shared one, or one of its own (`alone`: the control)."""

    name: str
    pool: str
    alone: bool
    folder: Path
    model: Path
    process: Kept

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.name} alone" if self.alone else self.name

    def steps(self) -> list[dict[str, Any]]:
        """The reports of its steps so far."""
        return _json_lines(self.folder / "metrics.jsonl")

    def curve(self) -> list[tuple[int, float]]:
        """Held-out accuracy by step, ascending; a repeat after a restart counts once."""
        found = {line["step"]: line["accuracy"] for line in _json_lines(self.folder / "evaluations.jsonl")}
        return sorted(found.items())


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # the line that is being written
    return found
