"""Resource names and their parts. Ids are percent-encoded, so a prompt id may hold any character.

A name has one spelling only: a name that is not what its parts spell is refused, so two spellings can never
stand for one slot.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

from hacrl_exchange.errors import InvalidRequestError
from hacrl_exchange.types import Slot

# What percent-encoding leaves as it is; most ids are that plain.
_PLAIN = re.compile(r"[A-Za-z0-9_.~-]+")


def pool_name(pool: str) -> str:
    """`pools/{pool}`."""
    return f"pools/{_encode(pool)}"


def parse_pool_name(name: str) -> str:
    """The pool of `pools/{pool}`.

    Raises:
        InvalidRequestError: the name has another form.
    """
    (pool,) = _ids(name, "pools")
    return pool


def prompt_set_name(prompt_set: str) -> str:
    """`promptSets/{prompt_set}`."""
    return f"promptSets/{_encode(prompt_set)}"


def parse_prompt_set_name(name: str) -> str:
    """The id of `promptSets/{prompt_set}`.

    Raises:
        InvalidRequestError: the name has another form.
    """
    (prompt_set,) = _ids(name, "promptSets")
    return prompt_set


def agent_name(pool: str, agent: str) -> str:
    """`pools/{pool}/agents/{agent}`."""
    return f"{pool_name(pool)}/agents/{_encode(agent)}"


def parse_agent_name(name: str) -> tuple[str, str]:
    """Pool and agent of `pools/{pool}/agents/{agent}`.

    Raises:
        InvalidRequestError: the name has another form.
    """
    pool, agent = _ids(name, "pools", "agents")
    return pool, agent


def step_name(pool: str, step: int) -> str:
    """`pools/{pool}/steps/{step}`."""
    return f"{pool_name(pool)}/steps/{step}"


def manifest_name(pool: str, step: int) -> str:
    """`pools/{pool}/steps/{step}/manifest`."""
    return f"{step_name(pool, step)}/manifest"


def group_name(pool: str, slot: Slot) -> str:
    """`pools/{pool}/steps/{step}/prompts/{prompt}/agents/{agent}`."""
    return f"{step_name(pool, slot.step)}/prompts/{_encode(slot.prompt_id)}/agents/{_encode(slot.agent)}"


def parse_group_name(name: str) -> tuple[str, Slot]:
    """Pool and slot of a group's name.

    Raises:
        InvalidRequestError: the name has another form.
    """
    pool, step, prompt_id, agent = _ids(name, "pools", "steps", "prompts", "agents")
    # At most 18 digits: an int64, and no quadratic int().
    if not (step.isascii() and step.isdigit() and len(step) <= 18 and step == str(int(step))):
        raise _malformed(name, "pools", "steps", "prompts", "agents")
    return pool, Slot(step=int(step), prompt_id=prompt_id, agent=agent)


def _encode(part: str) -> str:
    return part if _PLAIN.fullmatch(part) else quote(part, safe="")


def _ids(name: str, *collections: str) -> list[str]:
    pieces = name.split("/")
    if len(pieces) != 2 * len(collections) or tuple(pieces[::2]) != collections:
        raise _malformed(name, *collections)
    ids = []
    for piece in pieces[1::2]:
        if _PLAIN.fullmatch(piece):
            ids.append(piece)
            continue
        try:
            decoded = unquote(piece, errors="strict")
        except UnicodeDecodeError as error:
            raise _malformed(name, *collections) from error
        if not decoded or _encode(decoded) != piece:
            raise _malformed(name, *collections)
        ids.append(decoded)
    return ids


def _malformed(name: str, *collections: str) -> InvalidRequestError:
    form = "/".join(f"{collection}/{{{collection[:-1]}}}" for collection in collections)
    return InvalidRequestError(
        f"{name[:200]!r} is not a name of the form {form} with percent-encoded ids.", name=name[:200]
    )
