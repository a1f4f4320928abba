"""What the demo says at its end: report.json for programs, a summary for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hacrl_agents.demo.processes import DemoError
from hacrl_agents.demo.runs import Run
from hacrl_agents.demo.settings import HELD_OUT_PROMPTS, DemoSettings
from hacrl_agents.policy import load_policy

_TOTALS = ("accepted", "scored", "unscored", "pending")


def build_report(
    settings: DemoSettings, runs: Sequence[Run], *, audit: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Returns the report. Accuracies are of greedy answers to held-out prompts, in [0, 1]."""
    controls = {run.name: run for run in runs if run.alone}
    joint = [run for run in runs if not run.alone]
    return {
        "objective": settings.objective,
        "steps": settings.steps,
        "seconds": round(seconds, 1),
        "settings": asdict(settings),
        "held_out_prompts": HELD_OUT_PROMPTS,
        "agents": [_agent(run, controls[run.name]) for run in joint],
        "audit": {total: audit[total] for total in _TOTALS},
        "audit_ok": audit["ok"],
        "problems": audit["problems"],
        "receipts": {"given": audit["receipts"], "found": audit["receipts_found"]},
        "outcomes": audit["outcomes"],
    }


def _agent(run: Run, control: Run) -> dict[str, Any]:
    policy = load_policy(str(run.model))
    spec = policy.spec(run.name)
    steps = run.steps()
    return {
        "name": run.name,
        "architecture": spec.architecture,
        "parameters": spec.parameters,
        "tokenizer_fingerprint": spec.tokenizer_fingerprint,
        "pid": run.process.pid,
        "restarts": run.process.restarts,
        "accuracy_before": _accuracy(run, first=True),
        "accuracy_after": _accuracy(run, first=False),
        "accuracy_alone": _accuracy(control, first=False),
        "own_rollouts": sum(_rollouts(step, run.name) for step in steps),
        "own_rollouts_alone": sum(_rollouts(step, run.name) for step in control.steps()),
        "peer_rollouts_used": sum(step["peer_rollouts_used"] for step in steps),
        "mean_cross_ratio": mean_cross_ratio(steps),
        "curve": run.curve(),
        "curve_alone": control.curve(),
    }


def mean_cross_ratio(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the mean of s over all foreign samples of the steps; None if there were none."""
    weights = [step["ratios"].get("cross_samples", 0.0) for step in steps]
    total = sum(weights)
    if not total:
        return None
    ratios = [step["ratios"].get("cross_ratio", 0.0) for step in steps]
    return float(sum(ratio * weight for ratio, weight in zip(ratios, weights, strict=True)) / total)


def _rollouts(step: Mapping[str, Any], name: str) -> int:
    source = step["sources"].get(name)
    return 0 if source is None else int(source["rollouts"])


def _accuracy(run: Run, *, first: bool) -> float:
    curve = run.curve()
    if not curve:
        raise DemoError(
            f"{run.label} measured no held-out accuracy: see {run.folder.parent.parent / 'logs'}."
        )
    return curve[0 if first else -1][1]


def print_summary(
    report: Mapping[str, Any], runs: Sequence[Run], *, settings: DemoSettings, out: Path, console: Console
) -> None:
    """Prints what was learned, what was shared and what it cost."""
    table = Table(
        title=f"Held-out accuracy on {HELD_OUT_PROMPTS} prompts that nobody trained on",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("agent", no_wrap=True)
    for title in (
        "before",
        f"together\n{settings.objective}",
        "alone\ngspo",
        "points\ngained",
        "own\nrollouts",
        "peers'\nused",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for agent in report["agents"]:
        architecture = agent["architecture"].removesuffix("ForCausalLM")
        table.add_row(
            f"{agent['name']} [dim]{architecture}, {agent['parameters'] / 1000:.0f}k[/dim]",
            f"{agent['accuracy_before']:.1%}",
            f"[bold]{agent['accuracy_after']:.1%}[/bold]",
            f"{agent['accuracy_alone']:.1%}",
            f"{100 * (agent['accuracy_after'] - agent['accuracy_before']):+.1f}",
            f"{agent['own_rollouts']:,}",
            f"{agent['peer_rollouts_used']:,}",
        )
    console.print()
    console.print(table)
    audit, receipts = report["audit"], report["receipts"]
    console.print(
        f"Alone means: the same start and as many own rollouts, without the pool.\n"
        f"Published by all: {audit['accepted']:,} rollouts = {audit['scored']:,} scored + "
        f"{audit['unscored']:,} unscored + {audit['pending']:,} pending; {receipts['found']:,} of "
        f"{receipts['given']:,} receipts found in the log; "
        f"the audit {'holds' if report['audit_ok'] else 'FAILS'}.\n"
        f"It took {report['seconds']:.0f} s: {_seconds(runs, 'sample_seconds'):.0f} s of sampling, "
        f"{_seconds(runs, 'train_seconds'):.0f} s of training and {_seconds(runs, 'publish_seconds'):.1f} s "
        f"of publishing over {len(runs)} processes.",
        highlight=False,
    )
    chosen = ", ".join(f"{name} {value}" for name, value in asdict(settings).items())
    console.print(f"Settings: {chosen}.", highlight=False, style="dim")
    console.print(f"Wrote {out / 'report.json'} and {out / 'learning.png'}.", highlight=False)


def _seconds(runs: Sequence[Run], field: str) -> float:
    return float(sum(step[field] for run in runs for step in run.steps()))
