"""The audit: recounts a data folder from records, bodies and the clients' own receipts.

It only reads, works beside a running broker, and holds no more than the open steps and a few megabytes of
bodies. Conservation is accepted = scored + unscored + pending, each counted on its own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from hacrl_exchange._pb import records_pb2, rollout_pb2
from hacrl_exchange.broker.audit_fold import PoolCount
from hacrl_exchange.broker.audit_journals import check_journals
from hacrl_exchange.broker.core.records import GroupAccepted, Record, StepsRetired, record_key
from hacrl_exchange.broker.log import CATALOG, StoredEntry
from hacrl_exchange.broker.record_codec import decode_record
from hacrl_exchange.broker.segments import segment_path
from hacrl_exchange.broker.sqlite_log import SqliteReader, open_for_reading
from hacrl_exchange.broker.sqlite_schema import SEGMENTS_NAME
from hacrl_exchange.codec import group_digest
from hacrl_exchange.errors import CorruptLogError, ExchangeError, StepRetiredError

_CHUNK_BYTES = 8 * 1024 * 1024
_CHUNK_RECORDS = 256
_MAX_PROBLEMS = 1000

Progress = Callable[[int, int], None]
"""Told records done and records in all."""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit found. Counts of rollouts unless they say otherwise.

    `outcomes`: rollouts by "scored", or "kind/reason" of those without a score. `uncommitted_bytes`: at the
    ends of segments, from writes under way or cut short by a kill; the next start collects them.
    `problems`: sentences, at most 1000 of `problem_count`.
    """

    totals: Mapping[str, int]
    pools: Mapping[str, Mapping[str, int]]
    outcomes: Mapping[str, int]
    record_count: int
    group_count: int
    body_bytes: int
    retired_group_count: int
    uncommitted_bytes: int
    receipt_count: int
    receipts_found: int
    problem_count: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Nothing is lost, doubled or damaged."""
        return self.problem_count == 0


def audit(folder: Path, journals: Sequence[Path] = (), *, progress: Progress | None = None) -> AuditReport:
    """Recounts the data folder of a broker, running or stopped, and looks every journal's receipts up in it.

    Raises:
        LogFailedError: there is no readable data folder.
        DatabaseTooNewError: a newer version wrote it.
    """
    reader = open_for_reading(folder)
    try:
        return _Audit(folder, reader, progress or (lambda done, total: None)).run(journals)
    finally:
        reader.close()


class _Audit:
    """One run: what was counted so far."""

    def __init__(self, folder: Path, reader: SqliteReader, progress: Progress) -> None:
        self._folder = folder
        self._reader = reader
        self._progress = progress
        self._problems: list[str] = []
        self._problem_count = 0
        self._groups = 0
        self._body_bytes = 0
        self._records = 0
        self._total = 0
        self._retired = 0
        self._uncommitted = 0

    def run(self, journals: Sequence[Path]) -> AuditReport:
        extents = {stream: self._reader.extent(stream) for stream in self._reader.streams()}
        self._total = sum(position for position, _ in extents.values())
        totals: Counter[str] = Counter(accepted=0, scored=0, unscored=0, pending=0)
        outcomes: Counter[str] = Counter()
        pools: dict[str, Mapping[str, int]] = {}
        for stream, (last, ends) in extents.items():
            if stream == CATALOG:
                self._catalog(last, ends)
                continue
            count = self._pool(stream, last, ends)
            pools[stream] = {
                "accepted": count.accepted,
                "scored": count.scored,
                "unscored": count.unscored,
                "pending": count.pending,
            }
            totals.update(pools[stream])
            outcomes.update(count.outcomes)
        receipts, found = check_journals(self._reader, journals, problem=self._problem)
        return AuditReport(
            totals=dict(totals),
            pools=pools,
            outcomes=dict(sorted(outcomes.items())),
            record_count=self._records,
            group_count=self._groups,
            body_bytes=self._body_bytes,
            retired_group_count=self._retired,
            uncommitted_bytes=self._uncommitted,
            receipt_count=receipts,
            receipts_found=found,
            problem_count=self._problem_count,
            problems=tuple(self._problems),
        )

    # --- streams -------------------------------------------------------------------------------

    def _pool(self, stream: str, last: int, ends: Mapping[int, int]) -> PoolCount:
        count = PoolCount(stream, problem=self._problem)
        space = _Space(self._folder / SEGMENTS_NAME / stream, ends)
        snapshot = self._reader.load_snapshot(stream)
        missing: Counter[int] = Counter()
        for chunk in self._chunks(stream, last):
            records = [(entry, self._decoded(stream, entry)) for entry in chunk]
            self._place(stream, space, chunk)
            self._bodies(stream, records, missing)
            for entry, record in records:
                if record is not None:
                    count.add(entry.position, record)
                if snapshot is not None and entry.position == snapshot[0]:
                    self._compare(stream, snapshot[1], count)
        if count.accepted != count.scored + count.unscored + count.pending:
            self._problem(
                f"Pool {stream}: {count.accepted} rollouts were accepted, but {count.scored} scored, "
                f"{count.unscored} unscored and {count.pending} pending."
            )
        retired_through = max(count.retired_through, self._retired_since(stream, last) if missing else 0)
        for step, groups in sorted(missing.items()):
            self._retired += groups
            if step > retired_through:
                self._problem(f"Pool {stream}: bodies of {groups} groups of step {step} are gone unretired.")
        self._end_space(stream, space)
        return count

    def _catalog(self, last: int, ends: Mapping[int, int]) -> None:
        space = _Space(self._folder / SEGMENTS_NAME / CATALOG, ends)
        for chunk in self._chunks(CATALOG, last):
            self._place(CATALOG, space, chunk)
            for entry in chunk:
                try:
                    created = records_pb2.Record.FromString(entry.payload).prompt_set_created
                    ((body,),) = self._reader.read_bodies(CATALOG, [(entry.position, (0,))])
                    entries = records_pb2.PromptSetBody.FromString(body).entries
                except (DecodeError, ExchangeError) as error:
                    self._problem(f"Record {entry.position} of the catalog cannot be read: {error}")
                    continue
                self._body_bytes += len(body)
                digest = hashlib.sha256(body).digest()
                if digest != created.digest or len(entries) != created.prompt_count:
                    self._problem(f"Prompt set {created.prompt_set} is not what its record says.")
        self._end_space(CATALOG, space)

    def _chunks(self, stream: str, last: int) -> Iterator[list[StoredEntry]]:
        """The records up to a position, as many at once as fit into memory."""
        chunk: list[StoredEntry] = []
        size = 0
        expected = 1
        for entry in self._reader.read(stream):
            if entry.position > last:
                break
            if entry.position != expected:
                self._problem(f"Stream {stream} jumps from record {expected - 1} to {entry.position}.")
            expected = entry.position + 1
            chunk.append(entry)
            size += sum(entry.body_sizes)
            if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_RECORDS:
                yield chunk
                self._done(len(chunk))
                chunk, size = [], 0
        if expected <= last:
            self._problem(f"Stream {stream} ends at record {expected - 1}, not at {last}.")
        if chunk:
            yield chunk
            self._done(len(chunk))

    def _done(self, records: int) -> None:
        self._records += records
        self._progress(self._records, self._total)

    def _decoded(self, stream: str, entry: StoredEntry) -> Record | None:
        try:
            record = decode_record(entry.payload)
        except CorruptLogError as error:
            self._problem(f"Record {entry.position} of {stream}: {error}")
            return None
        if record_key(record.body) != entry.key:
            self._problem(f"Record {entry.position} of {stream} is filed under {entry.key!r}.")
        return record

    # --- bodies --------------------------------------------------------------------------------

    def _bodies(
        self, stream: str, records: Sequence[tuple[StoredEntry, Record | None]], missing: Counter[int]
    ) -> None:
        """Checks the bodies of a chunk's groups; `missing` counts those that are not there, by step."""
        groups = [(entry, r.body) for entry, r in records if r and isinstance(r.body, GroupAccepted)]
        try:
            found: list[tuple[bytes, ...] | None] = list(
                self._reader.read_bodies(stream, [_all_bodies(entry) for entry, _ in groups])
            )
        except ExchangeError:  # one by one, to learn which
            found = [self._bodies_of(stream, entry, body, missing) for entry, body in groups]
        for (entry, body), parts in zip(groups, found, strict=True):
            self._groups += 1
            if parts is not None:
                self._body_bytes += sum(map(len, parts))
            self._check_group(f"Record {entry.position} of {stream}", body, parts)

    def _bodies_of(
        self, stream: str, entry: StoredEntry, body: GroupAccepted, missing: Counter[int]
    ) -> tuple[bytes, ...] | None:
        try:
            return self._reader.read_bodies(stream, [_all_bodies(entry)])[0]
        except StepRetiredError:
            missing[body.step] += 1
        except ExchangeError as error:
            self._problem(f"Record {entry.position} of {stream}: {error}")
        return None

    def _check_group(self, where: str, body: GroupAccepted, parts: tuple[bytes, ...] | None) -> None:
        try:
            envelope = rollout_pb2.Envelope.FromString(body.envelope)
            digest = group_digest(envelope)
        except (DecodeError, ExchangeError) as error:
            self._problem(f"{where} has an envelope that cannot be read: {error}")
            return
        if digest != body.digest:
            self._problem(f"{where} has a digest that its envelope does not give.")
        if len(envelope.rollouts) != body.rollout_count:
            self._problem(f"{where} counts {body.rollout_count} rollouts, its envelope has others.")
        if parts is None:
            return
        if len(parts) != len(envelope.parts):
            self._problem(f"{where} has {len(parts)} bodies for the {len(envelope.parts)} of its envelope.")
        for info, part in zip(envelope.parts, parts, strict=False):
            if info.stored_size != len(part) or info.sha256 != hashlib.sha256(part).digest():
                kind = rollout_pb2.PartKind.Name(info.kind)
                self._problem(f"{where} has a body ({kind}) that is not the one its envelope digests.")

    def _retired_since(self, stream: str, last: int) -> int:
        """Retirement may go on while we read; its record comes before the bodies go."""
        later = (decode_record(entry.payload).body for entry in self._reader.read(stream, after=last))
        return max((body.through_step for body in later if isinstance(body, StepsRetired)), default=0)

    # --- space and snapshots -------------------------------------------------------------------

    def _place(self, stream: str, space: _Space, chunk: Sequence[StoredEntry]) -> None:
        bodied = [entry for entry in chunk if entry.body_sizes]
        places = self._reader.places(stream, [entry.position for entry in bodied])
        for entry in bodied:
            at = places.get(entry.position)
            if at is None or not space.take(at.segment, at.offset, sum(entry.body_sizes)):
                self._problem(f"Record {entry.position} of {stream} leaves or overlaps bytes of a segment.")

    def _end_space(self, stream: str, space: _Space) -> None:
        for number, end in sorted(space.ends.items()):
            used = space.used.get(number, 0)
            if used != end:
                self._problem(
                    f"Segment {number} of {stream}: {end - used} of {end} bytes belong to no record."
                )
            path = segment_path(space.folder, number)
            size = path.stat().st_size if path.exists() else 0
            if size < end and number in self._reader.extent(stream)[1]:
                self._problem(f"Segment {number} of {stream} has {size} bytes on disk, {end} were committed.")
            if number == max(space.ends):
                self._uncommitted += max(size - end, 0)

    def _compare(self, stream: str, payload: bytes, count: PoolCount) -> None:
        """The broker's own sums, as its snapshot has them, against ours at the same position."""
        try:
            snapshot = records_pb2.PoolSnapshot.FromString(payload)
        except DecodeError as error:
            self._problem(f"Pool {stream}: its snapshot cannot be read: {error}")
            return
        theirs = (snapshot.accepted_count, snapshot.scored_count, snapshot.unscored_count)
        ours = (count.accepted, count.scored, count.unscored)
        if theirs != ours:
            self._problem(f"Pool {stream}: its snapshot counts {theirs}, its records make {ours}.")

    def _problem(self, what: str) -> None:
        self._problem_count += 1
        if len(self._problems) < _MAX_PROBLEMS:
            self._problems.append(what)


@dataclass(slots=True)
class _Space:
    """How far the segments of a stream are used by the records seen so far."""

    folder: Path
    ends: Mapping[int, int]
    used: dict[int, int]

    def __init__(self, folder: Path, ends: Mapping[int, int]) -> None:
        self.folder = folder
        self.ends = ends
        self.used = {}

    def take(self, segment: int, offset: int, size: int) -> bool:
        """Bytes of the next record; False if they do not follow those before."""
        follows = offset == self.used.get(segment, 0)
        self.used[segment] = max(self.used.get(segment, 0), offset + size)
        return follows


def _all_bodies(entry: StoredEntry) -> tuple[int, Sequence[int]]:
    return entry.position, range(len(entry.body_sizes))
