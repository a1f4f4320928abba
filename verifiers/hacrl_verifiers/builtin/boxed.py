r"""The paper's reward: the last \boxed{} holds the reference, compared as normalised LaTeX text.

The normalisation follows the rules known from the MATH benchmark: it undoes differences of typesetting, and
knows no mathematics ("1/2" is "\frac{1}{2}", but "2/4" is not).
"""

from __future__ import annotations

import re

from hacrl_verifiers.api import Json, verifier
from hacrl_verifiers.builtin._answers import last_boxed, reference_text

_DROPPED = ("\n", "\\!", "\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "\\%", "%")
_SAME = (("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"))
_BARE_SQRT = re.compile(r"\\sqrt(?![{\[])(\\?\w)")
_SHORT_NAME = re.compile(r"^.{0,2}=(?P<value>[^=]*)$", re.DOTALL)
_LEADING_POINT = re.compile(r"(?P<before>^|[ {])\.")
_WHOLE_QUOTIENT = re.compile(r"^(-?\d+)/(-?\d+)$")


@verifier(name="boxed", version="1")
def boxed(response: str, reference: Json) -> float:
    r"""1 if the last \boxed{} of the response normalises to the same as the reference, else 0.

    Without a box the score is a real 0. The reference is a text or number; if it is a whole solution, its own
    last \boxed{} counts.
    """
    answer = last_boxed(response)
    if answer is None:
        return 0.0
    expected = reference_text(reference)
    solution = last_boxed(expected)
    return 1.0 if normalised(answer) == normalised(expected if solution is None else solution) else 0.0


def normalised(text: str) -> str:
    """The canonical typesetting of a short LaTeX answer."""
    text = text.replace("\n", "").replace("\\!", "")
    for old, new in _SAME:
        text = text.replace(old, new)
    for dropped in _DROPPED:
        text = text.replace(dropped, "")
    text = _without_units(text)
    text = _LEADING_POINT.sub(r"\g<before>0.", text)
    if short := _SHORT_NAME.match(text.strip()):
        text = short["value"]
    text = _BARE_SQRT.sub(r"\\sqrt{\1}", text)
    text = _braced_fractions(text.replace(" ", ""))
    if text == "0.5":
        return "\\frac{1}{2}"
    return _WHOLE_QUOTIENT.sub(r"\\frac{\1}{\2}", text)


def _without_units(text: str) -> str:
    """Drops one trailing "\\text{ ...", which is how units are written."""
    value, unit, more = text.partition("\\text{ ")
    return value if unit and "\\text{ " not in more else text


def _braced_fractions(text: str) -> str:
    r"""\frac12 and \frac1{2} become \frac{1}{2}. Anything less regular stays as it is."""
    head, *parts = text.split("\\frac")
    fixed = [head]
    for part in parts:
        if len(part) >= 2 and part[0] != "{" and part[0] != "\\":
            rest = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            part = f"{{{part[0]}}}{rest}"
        fixed.append(part)
    return "\\frac".join(fixed)
