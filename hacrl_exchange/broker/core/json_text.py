"""JSON that others send: read strictly, and never at the price of the process."""

from __future__ import annotations

import json


def strict_json(text: str) -> object:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON (NaN and infinities are not), or is nested too deeply to read.
    """
    try:
        value: object = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")
