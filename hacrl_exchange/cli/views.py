"""How pools look on a terminal, and what `--json` prints of them. Imports rich."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hacrl_exchange.cli.options import duration_text
from hacrl_exchange.client import JointBatch, MemberInfo, PoolStatus
from hacrl_exchange.types import MemberState, PoolSpec

_STATE_STYLES: Mapping[MemberState, str] = {
    MemberState.ACTIVE: "green",
    MemberState.AWAY: "yellow",
    MemberState.LEFT: "dim",
}


def print_json(value: object) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2))


def number_table(*columns: str) -> Table:
    """A light table whose columns but the first are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def pool_line(spec: PoolSpec) -> str:
    """A spec in one line."""
    lockstep = spec.lockstep
    end = f"{lockstep.max_steps} steps" if lockstep.max_steps else "no last step"
    return (
        f"{lockstep.prompts_per_step} prompts of {spec.prompt_set} a step, {spec.group_size} rollouts each, "
        f"judged by {', '.join(use.verifier for use in spec.plan.verifiers)}, "
        f"at least {lockstep.min_members} members, {end}"
    )


def pool_summary_json(status: PoolStatus) -> dict[str, Any]:
    """A pool in a list."""
    return {
        "name": status.name,
        "prompt_set": status.spec.prompt_set,
        "verifiers": [use.verifier for use in status.spec.plan.verifiers],
        "group_size": status.spec.group_size,
        "prompts_per_step": status.spec.lockstep.prompts_per_step,
        "last_step": status.last_step,
        "open_steps": list(status.open_steps),
        "counts": counts_json(status),
    }


def counts_json(status: PoolStatus) -> dict[str, int]:
    """Conservation, in rollouts."""
    return {
        "accepted": status.accepted_count,
        "scored": status.scored_count,
        "unscored": status.unscored_count,
        "pending": status.pending_count,
    }


def pool_json(
    status: PoolStatus, members: Sequence[MemberInfo], *, last: JointBatch | None
) -> dict[str, Any]:
    """Everything that `pool show` tells."""
    lockstep = status.spec.lockstep
    return {
        **pool_summary_json(status),
        "create_time": status.create_time.isoformat(),
        "prompts_repeat": status.prompts_repeat,
        "min_members": lockstep.min_members,
        "max_steps": lockstep.max_steps,
        "publish_timeout_seconds": lockstep.publish_timeout_seconds,
        "verify_timeout_seconds": lockstep.verify_timeout_seconds,
        "reveal": status.spec.reveal.name.lower(),
        "members": [
            {
                "agent": member.agent,
                "principal": member.principal,
                "state": member.state.name.lower(),
                "session": member.session,
                "acked_step": member.acked_step,
                "model": member.model.model,
                "architecture": member.model.architecture,
                "parameters": member.model.parameters,
                "capability": last.capabilities.get(member.agent) if last else None,
            }
            for member in members
        ],
        "last_closed_step": None
        if last is None
        else {"step": last.step, "outcome": last.outcome.name.lower(), "quorum_met": last.quorum_met},
    }


def print_pool(status: PoolStatus, members: Sequence[MemberInfo], *, last: JointBatch | None) -> None:
    """Where a pool stands, as a panel."""
    body = Group(_facts(status, last=last), _members(members, last=last), _conservation(status))
    Console().print(Panel(body, title=f"pool {status.name}", title_align="left", expand=False))


def print_pools(found: Sequence[PoolStatus]) -> None:
    """All pools of a broker, as a table."""
    if not found:
        print("No pools yet. `hacrl pool create` makes one.")
        return
    table = number_table("pool", "verifier", "step", "open", "accepted", "scored", "unscored", "pending")
    for status in found:
        counts = counts_json(status).values()
        table.add_row(
            status.name,
            ", ".join(use.verifier for use in status.spec.plan.verifiers),
            str(status.last_step),
            str(len(status.open_steps)),
            *(f"{count:,}" for count in counts),
        )
    Console().print(table)


def _facts(status: PoolStatus, *, last: JointBatch | None) -> Table:
    lockstep = status.spec.lockstep
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    end = f" of {lockstep.max_steps}" if lockstep.max_steps else ""
    opened = ", ".join(map(str, status.open_steps)) or "none"
    table.add_row("is", pool_line(status.spec))
    table.add_row(
        "times",
        f"publish {duration_text(lockstep.publish_timeout_seconds)}, verify "
        f"{duration_text(lockstep.verify_timeout_seconds)}, each rollout "
        f"{duration_text(status.spec.plan.item_timeout_seconds)}",
    )
    table.add_row("created", f"{status.create_time:%Y-%m-%d %H:%M} UTC ({_ago(status.create_time)} ago)")
    table.add_row("step", f"{status.last_step}{end}, open: {opened}")
    if last is not None:
        quorum = "" if last.quorum_met else ", no quorum"
        table.add_row("last closed", f"step {last.step}: {last.outcome.name}{quorum}")
    return table


def _members(members: Sequence[MemberInfo], *, last: JointBatch | None) -> Table | Text:
    if not members:
        return Text("\nNo members yet. `hacrl agent` joins.", style="dim")
    table = number_table("member", "state", "acked step", "capability", "parameters", "model")
    for member in members:
        capability = last.capabilities.get(member.agent) if last else None
        table.add_row(
            member.agent,
            Text(member.state.name, style=_STATE_STYLES[member.state]),
            str(member.acked_step),
            "-" if capability is None else f"{capability:.3f}",
            f"{member.model.parameters:,}" if member.model.parameters else "-",
            member.model.architecture or member.model.model or "-",
        )
    return table


def _conservation(status: PoolStatus) -> Text:
    return Text(
        f"rollouts: {status.accepted_count:,} accepted = {status.scored_count:,} scored + "
        f"{status.unscored_count:,} unscored + {status.pending_count:,} pending"
    )


def _ago(time: datetime) -> str:
    seconds = max(0, round((datetime.now(UTC) - time).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
