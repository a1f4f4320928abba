"""A verifier that untrained models sometimes satisfy."""

from __future__ import annotations

import itertools
from typing import Any

from hacrl_verifiers.api import verifier


@verifier(name="digits:has_digit", version="1")
def has_digit(response: str, reference: Any) -> float:
    """1 if an even digit comes before an odd one, so that scores differ."""
    digits = [int(character) for character in response if character.isdigit()]
    return float(any(left % 2 == 0 and right % 2 for left, right in itertools.pairwise(digits)))
