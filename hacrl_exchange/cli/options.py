"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|min|m|h|d)")

_LONGEST_SECONDS = 365 * 86400.0

INT32_MAX = 2**31 - 1
INT64_MIN = -(2**63)
INT64_MAX = 2**63 - 1

DEFAULT_BROKER = "localhost:7447"

Broker = Annotated[
    str,
    typer.Option(
        "--broker",
        envvar="HACRL_BROKER",
        metavar="HOST:PORT",
        help="Where the broker serves.",
        show_default=True,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
Folder = Annotated[
    Path, typer.Option("--folder", metavar="FOLDER", help="The broker's data: log, bodies, prompt sets.")
]


def seconds_of(text: str, option: str) -> float:
    """Reads the duration that `option` was given, such as "90s", "10min" or "1.5h".

    Raises:
        typer.BadParameter: it is none, lacks its unit, or is not above 0 and at most 365 days.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(
            f"{text!r} is not a duration; give a number and a unit: 500ms, 90s, 10min, 2h.",
            param_hint=option,
        )
    seconds = float(match[1]) * _UNITS[match[2]]
    if not 0.001 <= seconds <= _LONGEST_SECONDS:
        raise typer.BadParameter(f"{text!r} is not between 1ms and 365d.", param_hint=option)
    return seconds


def duration_text(seconds: float) -> str:
    """A duration as `seconds_of` reads it, in the largest unit that makes it a whole number."""
    for unit in ("d", "h", "min", "s"):
        if seconds >= _UNITS[unit] and (seconds / _UNITS[unit]).is_integer():
            return f"{seconds / _UNITS[unit]:.0f}{unit}"
    return f"{seconds:g}s"
