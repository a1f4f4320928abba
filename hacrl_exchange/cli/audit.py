"""`hacrl audit`: recounts what a broker's folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hacrl_exchange.cli.options import Folder, Json

if TYPE_CHECKING:
    from hacrl_exchange.broker.audit import AuditReport

_SHOWN_PROBLEMS = 20


def audit(
    folder: Folder = Path("hacrl-data"),
    journal: Annotated[
        list[Path] | None,
        typer.Option(
            "--journal",
            metavar="FILE",
            help="An agent's receipt journal: every receipt in it must be in the log. Repeatable.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Recount a broker's folder: accepted = scored + unscored + pending, every body, every receipt.

    Counts from the log, the bodies and the agents' own journals; believes no sum that the broker keeps. It
    only reads and may run beside a running broker. Exit code 1 if anything is lost, doubled or damaged.

    \b
      hacrl audit
      hacrl audit --folder /srv/exchange --journal lab-a.jsonl --journal lab-b.jsonl
    """
    from hacrl_exchange.cli.views import print_json

    report = _audit_with_progress(folder, journal or [])
    if json:
        print_json(_as_json(report))
    else:
        _print(report)
    if not report.ok:
        raise typer.Exit(1)


def _audit_with_progress(folder: Path, journals: list[Path]) -> AuditReport:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from hacrl_exchange.broker.audit import audit as recount

    columns = (TextColumn("recounting records"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        return recount(
            folder, journals, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )


def _as_json(report: AuditReport) -> dict[str, Any]:
    return {
        "ok": report.ok,
        **report.totals,
        "pools": {pool: dict(counts) for pool, counts in report.pools.items()},
        "outcomes": dict(report.outcomes),
        "records": report.record_count,
        "groups": report.group_count,
        "body_bytes": report.body_bytes,
        "retired_groups": report.retired_group_count,
        "uncommitted_bytes": report.uncommitted_bytes,
        "receipts": report.receipt_count,
        "receipts_found": report.receipts_found,
        "problem_count": report.problem_count,
        "problems": list(report.problems),
    }


def _print(report: AuditReport) -> None:
    from rich.console import Console

    from hacrl_exchange.cli.views import number_table

    console = Console(soft_wrap=True)
    table = number_table("pool", "accepted", "scored", "unscored", "pending")
    for pool, counts in report.pools.items():
        table.add_row(pool, *(f"{counts[key]:,}" for key in ("accepted", "scored", "unscored", "pending")))
    totals = (report.totals[key] for key in ("accepted", "scored", "unscored", "pending"))
    table.add_section()
    table.add_row("all pools", *(f"{count:,}" for count in totals))
    console.print(table)
    console.print(
        f"{report.record_count:,} records, {report.group_count:,} groups, "
        f"{report.body_bytes / 1e6:,.1f} MB of bodies; {report.retired_group_count:,} groups retired.",
        highlight=False,
    )
    for outcome, count in report.outcomes.items():
        console.print(f"  {outcome}: {count:,}", highlight=False)
    if report.receipt_count:
        found = f"{report.receipts_found:,} of {report.receipt_count:,}"
        console.print(f"Receipts of the journals found in the log: {found}.", highlight=False)
    if report.ok:
        console.print("[green]The audit holds.[/green]")
        return
    console.print(f"[red]The audit found {_problems(report.problem_count)}:[/red]")
    for problem in report.problems[:_SHOWN_PROBLEMS]:
        console.print(f"  {problem}", markup=False, highlight=False)
    if report.problem_count > _SHOWN_PROBLEMS:
        console.print("  ... `--json` lists more.", highlight=False)


def _problems(count: int) -> str:
    return f"{count:,} problem{'' if count == 1 else 's'}"
