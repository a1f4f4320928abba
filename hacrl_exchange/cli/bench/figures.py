"""What the benchmark found, and how it prints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from hacrl_exchange.cli.views import number_table


@dataclass(frozen=True, slots=True)
class Figures:
    """The result. Rates are of rollouts; `receipts` and `recovered` count groups.

    `commit_p99_ms`: the 99th percentile of a PublishGroups call of about 1 MiB, from its sending to its
    receipts, while publishing alone; it holds the gate and the commit.
    """

    publish_rollouts_per_s: float
    consume_rollouts_per_s: float
    concurrent_rollouts_per_s: float
    wire_bytes_per_token: float
    wire_bytes_per_token_text: float
    commit_p99_ms: float
    receipts: int
    recovered: int


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What is told beside the figures."""

    groups: int
    tokens_per_group: int
    verify_rollouts_per_s: float
    delivered_bytes_per_token: float
    zstd19_bytes_per_token: float
    audit_problems: int
    load_average: float
    cpu_ms_per_group: Mapping[str, float]
    """CPU time of each role, all its threads, in the phase it has for itself; the broker's of all three."""


# Name of the figure, what it is, the requirement, and whether more is better.
_ROWS: Sequence[tuple[str, str, float | None, bool]] = (
    ("publish_rollouts_per_s", "rollouts published per second", 8_000, True),
    ("consume_rollouts_per_s", "rollouts consumed per second", 15_000, True),
    ("concurrent_rollouts_per_s", "all roles at once, rollouts per second", 6_000, True),
    ("wire_bytes_per_token", "wire bytes per token: text, ids, log-probs", 5.2, False),
    ("wire_bytes_per_token_text", "wire bytes per token: text alone", 2.0, False),
    ("commit_p99_ms", "publish call, sent to receipts, p99 in ms", None, False),
)


def rate(spans: Sequence[Mapping[str, Any]], rollouts: int) -> float:
    """Rollouts per second from the first beginning to the last end."""
    seconds = max(span["ended"] for span in spans) - min(span["began"] for span in spans)
    return rollouts / max(float(seconds), 1e-9)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed; NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def as_json(figures: Figures) -> str:
    """The figures alone, for programs."""
    return json.dumps({key: round(value, 4) for key, value in asdict(figures).items()})


def print_figures(figures: Figures, around: Circumstances) -> None:
    """A table with the requirements beside the figures."""
    console = Console()
    table = number_table("", "measured", "required", "")
    for name, title, required, more_is_better in _ROWS:
        value = getattr(figures, name)
        holds = required is None or (value >= required if more_is_better else value <= required)
        table.add_row(
            title,
            f"{value:,.0f}" if value >= 100 else f"{value:,.2f}",
            "" if required is None else f"{'>=' if more_is_better else '<='} {required:,g}",
            Text("" if required is None else "yes" if holds else "NO", style="green" if holds else "red"),
        )
    whole = figures.receipts == figures.recovered and not around.audit_problems
    table.add_row(
        "receipts found again after kill -9",
        f"{figures.recovered:,}",
        f"= {figures.receipts:,}",
        Text("yes" if whole else "NO", style="green" if whole else "red"),
    )
    console.print(table)
    console.print(
        f"{around.groups:,} groups a phase, {around.tokens_per_group:,} tokens each; "
        f"verified {around.verify_rollouts_per_s:,.0f} rollouts/s; "
        f"delivered {around.delivered_bytes_per_token:.2f} bytes a token; "
        f"zstd-19 presses the texts to {around.zstd19_bytes_per_token:.2f} bytes a token; "
        f"CPU ms a group: {_cpu(around.cpu_ms_per_group)}; "
        f"the audit found {around.audit_problems} problems; load average {around.load_average:.1f}.",
        highlight=False,
    )


def _cpu(milliseconds: Mapping[str, float]) -> str:
    return ", ".join(f"{role} {spent:.2f}" for role, spent in milliseconds.items())
