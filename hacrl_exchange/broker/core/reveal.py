"""Who sees which groups of a closed step."""

from __future__ import annotations

from dataclasses import dataclass

from hacrl_exchange.broker.core.records import StepClosed
from hacrl_exchange.types import RevealRule

LOCAL_PRINCIPAL = "local"


@dataclass(frozen=True, slots=True)
class Visibility:
    """Indices into StepClosed.entries that a reader gets, ascending, and why it does not get the others."""

    entries: tuple[int, ...]
    unrevealed_count: int
    withheld_count: int


def visible(closed: StepClosed, *, principal: str, agent: str = "", rule: RevealRule) -> Visibility:
    """What a caller sees of a closed step. `agent` "" is a principal that reads without taking part.

    Three rules, in this order:

    1. Own groups are always seen. Own are those of all agents of the principal. On a broker without keys
       everybody is the principal `local`, who cannot stand for one party: there a calling agent has only its
       own groups, and a reader without agent has all.
    2. Groups of a withheld agent are seen by that agent alone, or by its principal reading without agent:
       making one's wrong answers time out must not pay, and a second agent of the same owner is a buyer too.
    3. GIVE_TO_GET: another's group is seen where one of the own agents on the roster has an accepted group
       for the same prompt. The other own agents are no obstacle: closing forfeited their empty slots. OPEN:
       all of them are seen.

    The caller was checked before: the agent, if given, is the principal's.
    """
    if agent and principal == LOCAL_PRINCIPAL:
        own = {index for index, entry in enumerate(closed.roster) if entry.agent == agent}
    else:
        own = {index for index, entry in enumerate(closed.roster) if entry.principal == principal}
    answered = {entry.prompt_index for entry in closed.entries if entry.roster_index in own}
    seen: list[int] = []
    unrevealed_count = withheld_count = 0
    for index, entry in enumerate(closed.entries):
        author = closed.roster[entry.roster_index]
        is_own = entry.roster_index in own
        if author.withheld and not (is_own and agent in ("", author.agent)):
            withheld_count += 1
        elif is_own or rule is RevealRule.OPEN or entry.prompt_index in answered:
            seen.append(index)
        else:
            unrevealed_count += 1
    return Visibility(tuple(seen), unrevealed_count, withheld_count)
