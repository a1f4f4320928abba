"""Which commands exist, what they do in a sentence, and where their code is. Imports none of them.

A command is "module:attribute": a function with typer annotations, or a `typer.Typer` with commands below.
Other distributions register theirs under the entry point group `hacrl.commands`.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

GROUP = "hacrl.commands"

_BUILT_IN: Mapping[str, str] = {
    "broker": "hacrl_exchange.cli.broker:broker",
    "pool": "hacrl_exchange.cli.pool:pool",
    "prompts": "hacrl_exchange.cli.prompts:prompts",
    "audit": "hacrl_exchange.cli.audit:audit",
    "bench": "hacrl_exchange.cli.bench:bench",
}
_EXTRA = re.compile(r"^\s*([A-Za-z0-9._-]+).*;.*\bextra\s*==\s*['\"]([^'\"]+)['\"]")


@dataclass(frozen=True, slots=True)
class CommandPlace:
    """Where a command's code is, and the distribution that brings it ("" for our own)."""

    name: str
    target: str
    distribution: str = ""

    @property
    def module(self) -> str:
        """The module to import."""
        return self.target.partition(":")[0]

    @property
    def attribute(self) -> str:
        """What to take from it."""
        return self.target.partition(":")[2]


def places() -> dict[str, CommandPlace]:
    """Every command by name: ours first, then the registered ones by name. Ours can't be replaced."""
    found = {name: CommandPlace(name, target) for name, target in _BUILT_IN.items()}
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        distribution = entry.dist.name if entry.dist is not None else ""
        found.setdefault(entry.name, CommandPlace(entry.name, entry.value, distribution))
    return found


def summary(place: CommandPlace) -> str:
    """The first sentence of a command's docstring, read from its source without importing it."""
    try:
        spec = importlib.util.find_spec(place.module)
        if spec is None or spec.origin is None:
            return ""
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (ImportError, OSError, SyntaxError, ValueError):
        return ""
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == place.attribute]
    text = ast.get_docstring(nodes[0] if nodes else tree) or ""
    return text.partition("\n\n")[0].replace("\n", " ").strip()


def extra_of(module: str, *, distribution: str) -> str | None:
    """The extra of a distribution that installs an import package, or None.

    Distribution and import names are taken to agree but for "-", "_" and ".".
    """
    wanted = _normal(module.partition(".")[0])
    try:
        requirements = metadata.requires(distribution or "hacrl-exchange") or []
    except metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        match = _EXTRA.match(requirement)
        if match is not None and _normal(match[1]) == wanted:
            return match[2]
    return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
