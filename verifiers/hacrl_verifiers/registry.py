"""Finds verifiers by name: installed ones by entry point, others by "package.module:attribute"."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from hacrl_verifiers.api import Verifier

GROUP = "hacrl.verifiers"


class LoadError(Exception):
    """A verifier cannot be loaded. The text says which and why."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What could be loaded, and a sentence for each name that could not."""

    verifiers: tuple[Verifier, ...]
    failures: tuple[tuple[str, str], ...]


def installed() -> dict[str, EntryPoint]:
    """The registered verifiers by name, without importing any."""
    return {point.name: point for point in entry_points(group=GROUP)}


def load(spec: str) -> Verifier:
    """Imports one verifier by registered name or by "package.module:attribute".

    Raises:
        LoadError: unknown, does not import, or is not a verifier.
    """
    try:
        found = _resolve(spec)
    except LoadError:
        raise
    except Exception as error:  # importing runs an author's code: anything can come out of it
        raise LoadError(f"{spec} does not import: {type(error).__name__}: {error}") from error
    if not isinstance(found, Verifier):
        raise LoadError(f"{spec} is a {type(found).__name__}, not a verifier. Decorate it with @verifier.")
    return found


def load_all(specs: Sequence[str]) -> Loaded:
    """Loads the verifiers asked for; none asked for means every registered one."""
    verifiers: dict[str, Verifier] = {}
    failures: list[tuple[str, str]] = []
    for spec in specs or sorted(installed()):
        try:
            found = load(spec)
        except LoadError as error:
            failures.append((spec, str(error)))
            continue
        if found.name in verifiers:
            failures.append(
                (spec, f"{spec} has the name {found.name!r}, which another verifier has already.")
            )
            continue
        verifiers[found.name] = found
    return Loaded(tuple(verifiers.values()), tuple(failures))


def _resolve(spec: str) -> object:
    if ":" in spec:
        module, _, attribute = spec.partition(":")
        found: object = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        return found
    points = installed()
    if spec not in points:
        known = ", ".join(sorted(points)) or "none"
        raise LoadError(
            f"No verifier is registered as {spec!r}. Registered: {known}. "
            "An unregistered one is named package.module:attribute."
        )
    return points[spec].load()
