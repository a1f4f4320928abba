"""The clients' side of an audit: every receipt in a journal must be in the log, as it was given.

A journal has a JSON object per line: pool, step, prompt_id, agent, session, digest (hex), rollouts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from hacrl_exchange.broker.core.records import GroupAccepted, StepOpened
from hacrl_exchange.broker.record_codec import decode_record
from hacrl_exchange.broker.sqlite_log import SqliteReader
from hacrl_exchange.errors import CorruptLogError
from hacrl_exchange.types import Receipt, Slot

_CACHED_STEPS = 8

Stored = dict[tuple[str, str], GroupAccepted]
"""Groups of a step by prompt id and agent."""


def check_journals(
    reader: SqliteReader, journals: Sequence[Path], *, problem: Callable[[str], None]
) -> tuple[int, int]:
    """Looks up every receipt; how many there are, and how many are in the log as they say."""
    known = set(reader.streams())

    @lru_cache(maxsize=_CACHED_STEPS)
    def groups(pool: str, step: int) -> Stored:
        return _groups_of(reader, pool, step) if pool in known else {}

    count = found = 0
    for journal in journals:
        for number, receipt in _receipts(journal, problem):
            count += 1
            where = f"Receipt {number} of {journal.name} (pool {receipt.pool}, {receipt.slot})"
            group = groups(receipt.pool, receipt.slot.step).get((receipt.slot.prompt_id, receipt.slot.agent))
            if group is None:
                groups.cache_clear()  # a running broker may have written it since
                again = groups(receipt.pool, receipt.slot.step)
                group = again.get((receipt.slot.prompt_id, receipt.slot.agent))
            if group is None:
                problem(f"{where} is for a group that is not in the log.")
            elif group.digest != receipt.digest:
                problem(f"{where} is for another group than the log has in that slot.")
            elif (group.session, group.rollout_count) != (receipt.session, receipt.rollout_count):
                problem(f"{where} states another session or number of rollouts than the log.")
            else:
                found += 1
    return count, found


def _groups_of(reader: SqliteReader, pool: str, step: int) -> Stored:
    opened = reader.find(pool, f"o/{step:010d}")
    if not opened:
        return {}
    try:
        body = decode_record(opened[0].payload).body
        groups = [decode_record(entry.payload).body for entry in reader.find(pool, f"g/{step:010d}/")]
    except CorruptLogError:  # the fold of the pool reports the record itself
        return {}
    if not isinstance(body, StepOpened):
        return {}
    return {
        (body.prompt_ids[group.prompt_index], body.roster[group.roster_index]): group
        for group in groups
        if isinstance(group, GroupAccepted)
        and group.prompt_index < len(body.prompt_ids)
        and group.roster_index < len(body.roster)
    }


def _receipts(journal: Path, problem: Callable[[str], None]) -> Iterator[tuple[int, Receipt]]:
    """Line numbers and receipts. A last line without its end was cut short by a kill, before anybody could
    count on it."""
    try:
        with journal.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield number, _receipt(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:
                    problem(f"Line {number} of {journal.name} is no receipt ({error}).")
    except FileNotFoundError:
        problem(f"There is no journal {journal}; name the file that the agent wrote.")
    except OSError as error:
        problem(f"The journal {journal} cannot be read: {error.strerror}.")


def _receipt(fields: dict[str, object]) -> Receipt:
    slot = Slot(int(str(fields["step"])), str(fields["prompt_id"]), str(fields["agent"]))
    return Receipt(
        pool=str(fields["pool"]),
        slot=slot,
        digest=bytes.fromhex(str(fields["digest"])),
        session=int(str(fields["session"])),
        rollout_count=int(str(fields["rollouts"])),
    )
