"""Prompt sets: immutable, in the catalog stream, held in memory while the broker runs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import heapq
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from hacrl_exchange._pb import prompt_pb2, records_pb2
from hacrl_exchange.broker.core.json_text import strict_json
from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.broker.log import CATALOG, Entry, Log
from hacrl_exchange.errors import (
    CorruptLogError,
    InvalidPromptSetError,
    LogFailedError,
    PromptSetExistsError,
    PromptSetNotFoundError,
)

_FRAMING = 8
"""Tags and lengths around a prompt, and around its id, in a message."""

_SLICE = 4096
"""Entries packed in one go; a set of more waits for the one before it."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A stored set: entries by prompt id, in the order they were given."""

    name: str
    digest: bytes
    entries: dict[str, prompt_pb2.PromptEntry]

    @property
    def prompt_ids(self) -> tuple[str, ...]:
        """Ids in order."""
        return tuple(self.entries)

    def prompt(self, prompt_id: str) -> prompt_pb2.Prompt:
        """The public part of a prompt."""
        return self.entries[prompt_id].prompt

    def step_size(self, prompt_count: int) -> int:
        """Bytes that a step of so many of the largest prompts takes in a message, each prompt's id once
        more for what is committed. Takes a while for a large set: run it in a thread.
        """
        sizes = (
            entry.prompt.ByteSize() + len(prompt_id.encode()) + _FRAMING
            for prompt_id, entry in self.entries.items()
        )
        return sum(heapq.nlargest(prompt_count, sizes))


class PromptStore:
    """All prompt sets of a broker. `load` reads them once; `create` makes one durable."""

    def __init__(self, log: Log, *, limits: Limits) -> None:
        self._log = log
        self._limits = limits
        self._sets: dict[str, PromptSet] = {}
        self._position = 0
        self._lock = asyncio.Lock()
        self._packing = asyncio.Lock()  # large sets, one at a time

    def load(self) -> None:
        """Reads the catalog. Blocks."""
        for stored in self._log.read(CATALOG):
            record = records_pb2.Record.FromString(stored.payload).prompt_set_created
            ((body,),) = self._log.read_bodies(CATALOG, [(stored.position, (0,))])
            if hashlib.sha256(body).digest() != record.digest:
                raise CorruptLogError(
                    f"Prompt set {record.prompt_set} does not have its digest; restore it from a copy.",
                    prompt_set=record.prompt_set,
                )
            entries = records_pb2.PromptSetBody.FromString(body).entries
            self._sets[record.prompt_set] = PromptSet(
                record.prompt_set, record.digest, {entry.prompt.prompt_id: entry for entry in entries}
            )
            self._position = stored.position

    def get(self, name: str) -> PromptSet:
        """A set by its bare id.

        Raises:
            PromptSetNotFoundError: there is none.
        """
        found = self._sets.get(name)
        if found is None:
            raise PromptSetNotFoundError(
                f"There is no prompt set {name}; `hacrl prompts list` names those that exist.",
                prompt_set=name,
            )
        return found

    def all(self) -> list[PromptSet]:
        """Every set, by name."""
        return [self._sets[name] for name in sorted(self._sets)]

    async def create(self, name: str, entries: Sequence[prompt_pb2.PromptEntry]) -> PromptSet:
        """Stores a set, durable when it returns; the same content again is the stored set. Not cancellable:
        shield it.

        Raises:
            InvalidPromptSetError: an entry is malformed.
            PromptSetExistsError: the name is taken by other content.
            LogFailedError: it could not be written.
        """
        async with self._packing if len(entries) > _SLICE else contextlib.nullcontext():
            checked, body, digest = await asyncio.to_thread(_packed, entries, limits=self._limits)
        async with self._lock:
            stored = self._sets.get(name)
            if stored is not None and stored.digest == digest:
                return stored
            if stored is not None:
                raise PromptSetExistsError(
                    f"Prompt set {name} exists with other content; sets are immutable, choose another name.",
                    prompt_set=name,
                )
            record = records_pb2.Record(
                prompt_set_created=records_pb2.PromptSetCreated(
                    prompt_set=name, digest=digest, prompt_count=len(checked)
                )
            )
            future: Future[None] = self._log.append(
                CATALOG,
                Entry(payload=record.SerializeToString(), key=f"p/{name}", bodies=(body,)),
                expected_position=self._position,
            )
            try:
                await asyncio.wrap_future(future)
            except LogFailedError:
                self._position = await asyncio.to_thread(self._log.recover, CATALOG)
                raise
            self._position += 1
            self._sets[name] = PromptSet(name, digest, checked)
            return self._sets[name]


def _packed(
    entries: Sequence[prompt_pb2.PromptEntry], *, limits: Limits
) -> tuple[dict[str, prompt_pb2.PromptEntry], bytes, bytes]:
    """Checks entries: by id, the set's body and its digest. Runs in a thread.

    The body is packed a slice at a time: one call for a million entries would hold the interpreter, and the
    event loop with it, for seconds. Slices joined are the same bytes, for that is how messages merge.

    Raises:
        InvalidPromptSetError: an entry is malformed.
    """
    checked = _checked(entries, limits=limits)
    body = b"".join(
        records_pb2.PromptSetBody(entries=entries[start : start + _SLICE]).SerializeToString(
            deterministic=True
        )
        for start in range(0, len(entries), _SLICE)
    )
    return checked, body, hashlib.sha256(body).digest()


def _checked(
    entries: Sequence[prompt_pb2.PromptEntry], *, limits: Limits
) -> dict[str, prompt_pb2.PromptEntry]:
    if not entries:
        raise InvalidPromptSetError("A prompt set needs at least one prompt; nothing was stored.")
    checked: dict[str, prompt_pb2.PromptEntry] = {}
    for index, entry in enumerate(entries):
        prompt_id = entry.prompt.prompt_id
        fault = f"repeats the id {prompt_id!r}" if prompt_id in checked else _fault(entry, limits=limits)
        if fault:
            raise InvalidPromptSetError(
                f"Prompt {index} ({prompt_id[:80]!r}) {fault}; nothing was stored.", index=index
            )
        checked[prompt_id] = entry
    return checked


def _fault(entry: prompt_pb2.PromptEntry, *, limits: Limits) -> str:
    """What is wrong with an entry, as the rest of a sentence; empty if nothing is."""
    if entry.ByteSize() > limits.max_prompt_size:
        return f"is {entry.ByteSize()} bytes, and the limit is {limits.max_prompt_size}"
    if not 1 <= len(entry.prompt.prompt_id.encode()) <= 128:
        return "needs an id of 1 to 128 bytes"
    if not entry.prompt.messages:
        return "has no message"
    if any(not 1 <= len(message.role.encode()) <= 32 for message in entry.prompt.messages):
        return "has a message without a role of 1 to 32 bytes"
    try:
        strict_json(entry.reference_json or "null")
    except ValueError as error:
        return f"has a reference that is not JSON: {error}"
    return ""
