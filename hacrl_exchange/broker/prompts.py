"""Prompt sets: immutable, in the catalog stream, held in memory while the broker runs."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from hacrl_exchange._pb import prompt_pb2, records_pb2
from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.broker.log import CATALOG, Entry, Log
from hacrl_exchange.errors import (
    CorruptLogError,
    InvalidPromptSetError,
    LogFailedError,
    PromptSetExistsError,
    PromptSetNotFoundError,
)


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


class PromptStore:
    """All prompt sets of a broker. `load` reads them once; `create` makes one durable."""

    def __init__(self, log: Log, *, limits: Limits) -> None:
        self._log = log
        self._limits = limits
        self._sets: dict[str, PromptSet] = {}
        self._position = 0
        self._lock = asyncio.Lock()

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
        checked = {entry.prompt.prompt_id: entry for entry in self._checked(entries)}
        body = records_pb2.PromptSetBody(entries=list(checked.values())).SerializeToString(deterministic=True)
        digest = hashlib.sha256(body).digest()
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

    def _checked(self, entries: Sequence[prompt_pb2.PromptEntry]) -> Sequence[prompt_pb2.PromptEntry]:
        seen: set[str] = set()
        if not entries:
            raise InvalidPromptSetError("A prompt set needs at least one prompt; nothing was stored.")
        for index, entry in enumerate(entries):
            where = f"Prompt {index} ({entry.prompt.prompt_id!r})"
            if not 1 <= len(entry.prompt.prompt_id.encode()) <= 128:
                raise InvalidPromptSetError(
                    f"{where} needs an id of 1 to 128 bytes; nothing was stored.", index=index
                )
            if entry.prompt.prompt_id in seen:
                raise InvalidPromptSetError(f"{where} repeats an id; ids are unique in a set.", index=index)
            seen.add(entry.prompt.prompt_id)
            if not entry.prompt.messages:
                raise InvalidPromptSetError(f"{where} has no message; nothing was stored.", index=index)
            if any(not 1 <= len(message.role.encode()) <= 32 for message in entry.prompt.messages):
                raise InvalidPromptSetError(
                    f"{where} has a message without a role of 1 to 32 bytes.", index=index
                )
            if entry.ByteSize() > self._limits.max_prompt_size:
                raise InvalidPromptSetError(
                    f"{where} is {entry.ByteSize()} bytes; the limit is {self._limits.max_prompt_size}.",
                    index=index,
                )
            try:
                json.loads(entry.reference_json or "null")
            except ValueError as error:
                raise InvalidPromptSetError(
                    f"The reference of {where} is not JSON: {error}.", index=index
                ) from error
        return entries
