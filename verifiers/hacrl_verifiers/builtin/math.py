"""Mathematical equality by math-verify: numbers, expressions, sets, intervals, matrices.

Its own timeouts use signal.alarm and are off: the worker kills what hangs. Its own errors are on: a
comparison that breaks is VERIFIER_ERROR, not a wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from math_verify import parse
from math_verify import verify as equal

from hacrl_verifiers.api import Json, verifier
from hacrl_verifiers.builtin._answers import reference_text


@verifier(name="math", version="1", config={"float_rounding": 6})
def math(response: str, reference: Json, *, config: Mapping[str, Json]) -> float:
    """1 if the response's final answer equals the reference, else 0; no answer found is a real 0.

    The reference is a text (LaTeX or plain) or a number. One that does not parse raises: its prompt is bad.
    """
    expected = _parsed_reference(reference_text(reference))
    answer = parse(response, parsing_timeout=None, raise_on_error=True)
    if not answer:
        return 0.0
    rounding = config["float_rounding"]
    same = equal(expected, answer, float_rounding=rounding, timeout_seconds=None, raise_on_error=True)
    return 1.0 if same else 0.0


@lru_cache(maxsize=256)
def _parsed_reference(text: str) -> list[Any]:
    # A bare answer is found surely only in an anchor; a whole solution brings its own.
    anchored = text if "\\boxed" in text or "$" in text else f"\\boxed{{{text}}}"
    parsed: list[Any] = parse(anchored, parsing_timeout=None, raise_on_error=True)
    if not parsed:
        raise ValueError(f"The reference {text[:200]!r} holds nothing that math-verify can parse.")
    return parsed
