"""From what a verifier returned to a verdict, and the verdict's form on the pipe to the supervisor.

Both ends check: the child because authors err, the supervisor because a child may have been taken over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

from hacrl_exchange.types import Scored, Unscored, UnscoredKind, Verdict, VerdictReason

MAX_COMPONENTS = 32
MAX_COMPONENT_NAME_BYTES = 64
MAX_DETAIL_BYTES = 2048

_REASONS = {
    UnscoredKind.NOT_APPLICABLE: VerdictReason.NOT_APPLICABLE,
    UnscoredKind.VERIFIER_ERROR: VerdictReason.RAISED,
    UnscoredKind.TIMEOUT: VerdictReason.ITEM_DEADLINE,
    UnscoredKind.UNSUPPORTED: VerdictReason.VERIFIER_UNAVAILABLE,
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and what only operators see of it: at most 2 KiB, may contain the reference."""

    verdict: Verdict
    detail: str = ""


class BadResultError(Exception):
    """A verifier returned something that is not a result. The text says what."""


def judge(result: object) -> Verdict:
    """The verdict that a verifier's result means.

    Raises:
        BadResultError: not a result: NaN, a text, a mapping without "score", too many components ...
    """
    if result is None:
        return Unscored(UnscoredKind.NOT_APPLICABLE, VerdictReason.NOT_APPLICABLE)
    if isinstance(result, Real):
        return Scored(_finite(result, name="score"))
    if isinstance(result, Mapping):
        return _from_mapping(result)
    if isinstance(result, Scored):
        return Scored(_finite(result.score, name="score"), _components(result.components))
    if isinstance(result, Unscored):
        return Unscored(result.kind, _REASONS[result.kind])
    raise BadResultError(f"The verifier returned a {type(result).__name__}, which is not a result.")


def failed(reason: VerdictReason, detail: str = "") -> Judgement:
    """A VERIFIER_ERROR."""
    return Judgement(Unscored(UnscoredKind.VERIFIER_ERROR, reason), clipped(detail))


def clipped(text: str) -> str:
    """The text cut to 2 KiB of UTF-8; lone surrogates become '?'."""
    return text[:MAX_DETAIL_BYTES].encode(errors="replace")[:MAX_DETAIL_BYTES].decode(errors="ignore")


def to_wire(judgement: Judgement) -> float | list[object]:
    """A bare score, [score, components], or [kind, reason, detail]."""
    verdict = judgement.verdict
    if isinstance(verdict, Scored):
        return [verdict.score, dict(verdict.components)] if verdict.components else verdict.score
    return [verdict.kind.value, verdict.reason.value, judgement.detail]


def from_wire(message: object) -> Judgement:
    """The inverse of `to_wire`, believing nothing.

    Raises:
        BadResultError: not a judgement.
    """
    try:
        match message:
            case float():
                return Judgement(Scored(_finite(message, name="score")))
            case [float() as score, dict() as components]:
                return Judgement(Scored(_finite(score, name="score"), _components(components)))
            case [str() as kind, int() as reason, str() as detail]:
                return Judgement(Unscored(UnscoredKind(kind), VerdictReason(reason)), clipped(detail))
    except ValueError as error:
        raise BadResultError(str(error)) from error
    raise BadResultError(f"The child sent a {type(message).__name__} that is not a judgement.")


def _from_mapping(result: Mapping[object, object]) -> Scored:
    if len(result) > MAX_COMPONENTS + 1:
        raise BadResultError(f"The verifier returned {len(result)} values; {MAX_COMPONENTS + 1} are allowed.")
    if "score" not in result:
        raise BadResultError('The verifier returned a mapping without "score".')
    components = {key: value for key, value in result.items() if key != "score"}
    return Scored(_finite(result["score"], name="score"), _components(components))


def _components(components: Mapping[object, object] | Mapping[str, float]) -> dict[str, float]:
    if len(components) > MAX_COMPONENTS:
        raise BadResultError(
            f"The verifier returned {len(components)} components; {MAX_COMPONENTS} are allowed."
        )
    checked = {}
    for key, value in components.items():
        if not isinstance(key, str) or not 1 <= len(key.encode(errors="replace")) <= MAX_COMPONENT_NAME_BYTES:
            raise BadResultError(f"A component's name must be 1 to {MAX_COMPONENT_NAME_BYTES} bytes of text.")
        checked[key] = _finite(value, name="component")
    return checked


def _finite(value: object, *, name: str) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    if not isinstance(value, Real):
        raise BadResultError(
            f"The verifier returned a {name} that is a {type(value).__name__}, not a number."
        )
    try:
        number = float(value)
    except (OverflowError, ValueError, TypeError) as error:
        raise BadResultError(f"The verifier returned a {name} that is not a float: {error}.") from error
    if not math.isfinite(number):
        raise BadResultError(f"The verifier returned a {name} that is {number}.")
    return number
