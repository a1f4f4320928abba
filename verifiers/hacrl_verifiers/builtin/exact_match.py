"""The response, surrounding space aside, is the reference."""

from __future__ import annotations

from collections.abc import Mapping

from hacrl_verifiers.api import Json, verifier
from hacrl_verifiers.builtin._answers import reference_text


@verifier(name="exact_match", version="1", config={"case_sensitive": True})
def exact_match(response: str, reference: Json, *, config: Mapping[str, Json]) -> float:
    """1 if response and reference are equal after stripping, else 0. Reference: a text or a number."""
    got, expected = response.strip(), reference_text(reference).strip()
    if not config["case_sensitive"]:
        got, expected = got.casefold(), expected.casefold()
    return 1.0 if got == expected else 0.0
