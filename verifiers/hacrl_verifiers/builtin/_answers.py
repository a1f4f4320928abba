"""Finding the final answer in a response, in time linear in its length."""

from __future__ import annotations

from hacrl_verifiers.api import Json

_BOXES = ("\\boxed", "\\fbox")


def last_tagged(text: str, tag: str) -> str | None:
    """What the last complete <tag>...</tag> holds, stripped; None if there is none."""
    end = text.rfind(f"</{tag}>")
    if end < 0:
        return None
    start = text.rfind(f"<{tag}>", 0, end)
    return None if start < 0 else text[start + len(tag) + 2 : end].strip()


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} or \fbox{...} holds, braces balanced; None if there is none or it is cut.

    The form without braces, "\boxed 5", holds what follows up to the next "$" or line end.
    """
    start, command = max((text.rfind(box), box) for box in _BOXES)
    if start < 0:
        return None
    rest = text[start + len(command) :]
    if rest.startswith("{"):
        return _braced(rest)
    if rest.startswith(" "):
        return rest.partition("$")[0].partition("\n")[0].strip() or None
    return None


def reference_text(reference: Json) -> str:
    """The expected answer as text: a text, a number, or the "answer" of a mapping.

    Raises:
        ValueError: the reference is none of these.
    """
    if isinstance(reference, dict) and "answer" in reference:
        reference = reference["answer"]
    if isinstance(reference, str):
        return reference
    if isinstance(reference, int | float) and not isinstance(reference, bool):
        return str(reference)
    raise ValueError(
        f'The reference must be a text, a number or have an "answer", not {type(reference).__name__}.'
    )


def _braced(text: str) -> str | None:
    depth = 0
    for position, character in enumerate(text):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[1:position]
    return None
