"""What the author of a verifier reads: the decorator, the item, and what a result means.

A verifier is one function, or a class when a batch is cheaper than its items one by one:

    @verifier(name="exact", version="1", config={"case_sensitive": True})
    def exact(response: str, reference: Json, *, config: Mapping[str, Json]) -> float: ...

    @verifier(name="judge", version="1")
    class Judge:
        def setup(self, config: Mapping[str, Json]) -> None: ...              # optional, once per process
        def verify(self, items: Sequence[Item]) -> Sequence[Result]: ...      # one result per item, in order

A result is a number (the score), a mapping with "score" and named components, None (the response is outside
the verifier's domain: NOT_APPLICABLE), or an explicit `Scored` or `Unscored`. True and False are 1.0 and 0.0.
A verifier that cannot judge raises: the outcome is then VERIFIER_ERROR, never a score. Nothing here starts a
process; isolation.py runs verifiers in children that can be killed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

from hacrl_exchange.types import Prompt, Scored, Unscored, UnscoredKind, Verdict, VerdictReason

__all__ = [
    "ConfigError",
    "Item",
    "Json",
    "Prompt",
    "Result",
    "Scored",
    "Unscored",
    "UnscoredKind",
    "VerdictReason",
    "Verifier",
    "config_digest",
    "verifier",
]

# A decoded JSON value. Its shape is between the author of the prompts and the author of the verifier.
Json: TypeAlias = Any

Result: TypeAlias = float | Mapping[str, float] | Verdict | None

_KEYWORDS = ("prompt", "config", "item")


class ConfigError(Exception):
    """A pool's configuration does not fit the verifier. The text says which key and why."""


@dataclass(frozen=True, slots=True)
class Item:
    """One response to judge.

    `reference` is the prompt's private reference, decoded from JSON; each item gets its own copy.
    `token_ids` are the source's, and None unless the verifier declares `needs_tokens`.
    """

    response: str
    reference: Json
    prompt: Prompt
    token_ids: Sequence[int] | None = None


class BatchCheck(Protocol):
    """An instance of a batch verifier. `setup(config)` is called first if the class has one."""

    def verify(self, items: Sequence[Item]) -> Sequence[Result]:
        """Judges the items: one result per item, in order."""


@dataclass(frozen=True)
class Verifier:
    """A declared verifier. Exactly one of `check` and `batch` is set.

    `config` holds every key that a pool may set, with its default; a value of another type is refused.
    `keywords` names what the function asks for beside response and reference.
    """

    name: str
    version: str
    full_score: float = 1.0
    config: Mapping[str, Json] = field(default_factory=dict)
    needs_tokens: bool = False
    batch_size: int = 64
    check: Callable[..., Result] | None = None
    batch: Callable[[], BatchCheck] | None = None
    keywords: frozenset[str] = frozenset()

    def __call__(self, response: str, reference: Json = None, **config: Json) -> Result:
        """Judges one response in this process, for tests; `config` overrides defaults.

        Raises:
            ConfigError: the configuration does not fit.
        """
        settings = self.settings(json.dumps(config))
        item = Item(response, reference, Prompt("", ()))
        if self.check is not None:
            given = {"prompt": item.prompt, "config": settings, "item": item}
            return self.check(response, reference, **{key: given[key] for key in self.keywords})
        return self.prepared(settings).verify([item])[0]

    def settings(self, config_json: str) -> dict[str, Json]:
        """The configuration a pool's JSON text means: defaults overlaid with what it sets.

        Raises:
            ConfigError: not a JSON object, an unknown key, or a value of another type than the default's.
        """
        given = _json_object(config_json, name=self.name)
        for key, value in given.items():
            if key not in self.config:
                known = ", ".join(sorted(self.config)) or "none"
                raise ConfigError(f"{self.name} has no setting {key!r}. It has: {known}.")
            if not _same_type(value, self.config[key]):
                expected = type(self.config[key]).__name__
                raise ConfigError(f"{self.name} wants {key} as {expected}, not {json.dumps(value)[:100]}.")
        return {**self.config, **given}

    def prepared(self, settings: Mapping[str, Json]) -> BatchCheck:
        """A batch instance that has been set up."""
        assert self.batch is not None, "only batch verifiers are prepared"
        instance = self.batch()
        setup: Callable[[Mapping[str, Json]], None] | None = getattr(instance, "setup", None)
        if setup is not None:
            setup(settings)
        return instance


def verifier(
    *,
    name: str,
    version: str,
    full_score: float = 1.0,
    config: Mapping[str, Json] | None = None,
    needs_tokens: bool = False,
    batch_size: int = 64,
) -> Callable[[Callable[..., Any]], Verifier]:
    """Declares a verifier: decorates a function, or a class with `verify(items)`.

    A function takes the response and the reference, and by keyword those of `prompt`, `config` and `item`
    that it names. `version` must change whenever a score may change.

    Raises:
        TypeError: what is decorated cannot be a verifier; the text says why.
    """

    def declare(target: Callable[..., Any]) -> Verifier:
        declared = Verifier(name, version, full_score, dict(config or {}), needs_tokens, batch_size)
        if inspect.isclass(target):
            if not callable(getattr(target, "verify", None)):
                raise TypeError(f"The batch verifier {name} needs a method verify(self, items).")
            return _with(declared, batch=target)
        return _with(declared, check=target, keywords=_keywords(target, name=name))

    return declare


@lru_cache(maxsize=256)
def config_digest(config_json: str) -> bytes:
    """sha256 of the canonical form (sorted keys, no spaces, UTF-8) of a configuration as the pool states it.

    A text that is not JSON is hashed as it is: its verdicts say VERIFIER_UNAVAILABLE anyway.
    """
    try:
        parsed = json.loads(config_json or "{}")
        text = json.dumps(parsed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except ValueError:
        text = config_json
    return hashlib.sha256(text.encode()).digest()


def _keywords(function: Callable[..., Any], *, name: str) -> frozenset[str]:
    if inspect.iscoroutinefunction(function):
        raise TypeError(
            f"The verifier {name} is async. Write a plain function: each runs in its own process."
        )
    parameters = list(inspect.signature(function).parameters.values())
    named = [p for p in parameters[2:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p.name for p in named if p.default is p.empty and p.name not in _KEYWORDS]
    if len(parameters) < 2 or required:
        raise TypeError(
            f"The verifier {name} must be check(response, reference), with any of the keywords "
            f"{', '.join(_KEYWORDS)}" + (f"; it also requires {', '.join(required)}." if required else ".")
        )
    return frozenset(p.name for p in named if p.name in _KEYWORDS)


def _with(declared: Verifier, **changes: Any) -> Verifier:
    return Verifier(**{**declared.__dict__, **changes})


def _json_object(text: str, *, name: str) -> dict[str, Json]:
    try:
        parsed = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"The configuration for {name} is not JSON: {error}.") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"The configuration for {name} must be a JSON object, not {type(parsed).__name__}.")
    return parsed


def _same_type(value: Json, default: Json) -> bool:
    if default is None:
        return True
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default))
