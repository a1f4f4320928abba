"""The audit finds each kind of loss, doubling and damage, and nothing in a sound log."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import pytest

from hacrl_exchange._pb import prompt_pb2, records_pb2
from hacrl_exchange.broker.audit import AuditReport, audit
from hacrl_exchange.broker.core.records import (
    ExpiredGroup,
    GroupAccepted,
    ManifestEntry,
    MemberJoined,
    PoolCreated,
    PublishingEnded,
    Record,
    RecordBody,
    StepClosed,
    StepOpened,
    StepsRetired,
    VerdictsRecorded,
    record_key,
)
from hacrl_exchange.broker.log import CATALOG, Entry
from hacrl_exchange.broker.record_codec import encode_record
from hacrl_exchange.broker.sqlite_log import open_sqlite_log
from hacrl_exchange.codec import encode_group, group_digest, group_name
from hacrl_exchange.errors import LogFailedError
from hacrl_exchange.types import (
    Group,
    Lockstep,
    ModelSpec,
    PolicyVersion,
    PoolSpec,
    Rollout,
    RosterEntry,
    RosterState,
    Scored,
    Slot,
    StepCounts,
    StepOutcome,
    Unscored,
    UnscoredKind,
    VerdictReason,
    VerificationPlan,
    VerifierUse,
)

AGENTS = ("ann", "bob")
PROMPTS = ("p0", "p1")
SPEC = PoolSpec("set", 2, VerificationPlan((VerifierUse("math"),)), Lockstep(2))
TIMEOUT = Unscored(UnscoredKind.TIMEOUT, VerdictReason.ITEM_DEADLINE)

Bodies: TypeAlias = tuple[bytes, ...]


def group(step: int, prompt: int, member: int, *, text: str = "") -> tuple[GroupAccepted, Bodies]:
    rollouts = tuple(Rollout(f"{text} {step} {prompt} {member} {i}", 3, -1.5 - i) for i in range(2))
    version = PolicyVersion(1, 0)
    made = Group(PROMPTS[prompt], rollouts, "f" * 64, version, version)
    wire = encode_group(made, name=group_name("math", Slot(step, PROMPTS[prompt], AGENTS[member])))
    digest = group_digest(wire.envelope)
    body = GroupAccepted(step, prompt, member, 1, digest, 2, wire.envelope.SerializeToString())
    return body, tuple(wire.parts)


def verdicts(step: int, prompt: int, member: int) -> VerdictsRecorded:
    outcomes = (Scored(float(member)), TIMEOUT if prompt else Scored(1.0))
    scored = 2 - prompt
    return VerdictsRecorded(step, prompt, member, 1, None, "w", outcomes, (), scored + member - 1, scored)


def counts(step: int, member: int, *, judged: Sequence[int] = (0, 1)) -> tuple[StepCounts, ...]:
    made = [verdicts(step, prompt, member) for prompt in judged]
    success, scored = sum(v.success_count for v in made), sum(v.scored_count for v in made)
    return (StepCounts(step, success, scored, 4),)


@dataclass
class Story:
    """Records of a pool in order, to be tampered with and written."""

    records: list[tuple[RecordBody, Bodies]] = field(default_factory=list)

    def find(self, kind: type, number: int = 0) -> int:
        return [i for i, (body, _) in enumerate(self.records) if isinstance(body, kind)][number]

    def change(self, kind: type, number: int = 0, **fields: object) -> None:
        index = self.find(kind, number)
        body, bodies = self.records[index]
        self.records[index] = (replace(body, **fields), bodies)  # type: ignore[arg-type]  # tests plant nonsense

    def repeat(self, kind: type, number: int = 0) -> None:
        index = self.find(kind, number)
        self.records.insert(index, self.records[index])

    def drop(self, kind: type, number: int = 0) -> None:
        del self.records[self.find(kind, number)]

    def write(self, folder: Path) -> None:
        log = open_sqlite_log(folder)
        prompts = [prompt_pb2.PromptEntry(prompt=prompt_pb2.Prompt(prompt_id=name)) for name in PROMPTS]
        body = records_pb2.PromptSetBody(entries=prompts).SerializeToString()
        created = records_pb2.PromptSetCreated(prompt_set="set", digest=sha256(body), prompt_count=2)
        payload = records_pb2.Record(prompt_set_created=created).SerializeToString()
        log.append(CATALOG, Entry(payload, "p/set", (body,)), expected_position=0).result()
        for position, (record, bodies) in enumerate(self.records):
            payload = encode_record(Record(1000 + position, record))
            entry = Entry(payload, record_key(record), bodies)
            log.append("math", entry, expected_position=position).result()
        log.close()


def sha256(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


def story() -> Story:
    """Step 1 closed with everything judged; step 2 with one group expired; step 3 open, half judged."""
    told = Story([(PoolCreated("math", SPEC, 2), ())])
    told.records += [(MemberJoined(name, "local", 1, "i", ModelSpec()), ()) for name in AGENTS]
    for step in (1, 2, 3):
        told.records.append((StepOpened(step, 0, PROMPTS, AGENTS), ()))
        slots = [(prompt, member) for prompt in (0, 1) for member in (0, 1)]
        groups = {slot: group(step, *slot) for slot in slots}
        told.records += groups.values()
        if step == 3:
            told.records.append((verdicts(3, 0, 0), ()))
            break
        complete = (RosterState.COMPLETE,) * 2
        told.records.append((PublishingEnded(step, complete), ()))
        judged = slots if step == 1 else slots[:3]
        told.records += [(verdicts(step, *slot), ()) for slot in judged]
        roster = tuple(
            RosterEntry(
                name,
                "local",
                RosterState.COMPLETE,
                counts(step, member, judged=[p for p, m in judged if m == member]),
            )
            for member, name in enumerate(AGENTS)
        )
        entries = tuple(ManifestEntry(*slot, groups[slot][0].digest, 1) for slot in slots)
        expired = () if step == 1 else (ExpiredGroup(1, 1, UnscoredKind.UNSUPPORTED),)
        told.records.append((StepClosed(step, StepOutcome.COMPLETE, True, roster, entries, expired), ()))
    return told


def receipt(step: int, prompt: int, member: int, **fields: object) -> str:
    line = {
        "pool": "math",
        "step": step,
        "prompt_id": PROMPTS[prompt],
        "agent": AGENTS[member],
        "session": 1,
        "digest": group(step, prompt, member)[0].digest.hex(),
        "rollouts": 2,
    }
    return json.dumps(line | fields) + "\n"


def audited(told: Story, folder: Path) -> AuditReport:
    told.write(folder)
    return audit(folder, [])


def test_a_sound_log_is_recounted_without_a_problem(tmp_path: Path) -> None:
    journal = tmp_path / "ann.jsonl"
    journal.write_text(
        "".join(receipt(step, prompt, 0) for step in (1, 2, 3) for prompt in (0, 1)) + '{"torn'
    )
    story().write(tmp_path / "data")
    seen: list[tuple[int, int]] = []
    report = audit(tmp_path / "data", [journal], progress=lambda done, total: seen.append((done, total)))

    assert report.problems == ()
    assert report.ok
    assert report.totals == {"accepted": 24, "scored": 13, "unscored": 5, "pending": 6}
    assert report.pools == {"math": report.totals}
    assert report.outcomes == {"scored": 13, "timeout/item_deadline": 3, "unsupported/no_worker": 2}
    assert (report.group_count, report.receipt_count, report.receipts_found) == (12, 6, 6)
    assert seen[-1] == (report.record_count, report.record_count)
    assert report.body_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*.seg"))


def test_it_reads_beside_a_running_broker(tmp_path: Path) -> None:
    story().write(tmp_path)
    log = open_sqlite_log(tmp_path)
    log.append(
        "math",
        Entry(encode_record(Record(5000, StepsRetired(1)))),
        expected_position=log.last_position("math"),
    )
    assert audit(tmp_path, []).ok
    log.close()


Tamper: TypeAlias = Callable[[Story], None]

PLANTED: list[tuple[str, Tamper, str]] = [
    (
        "a slot holds two groups",
        lambda told: told.repeat(GroupAccepted),
        "Pool math: slot (step 1, prompt 0, member 0) holds two groups.",
    ),
    (
        "verdicts without a group",
        lambda told: told.change(VerdictsRecorded, 0, prompt_index=7),
        "Pool math: slot (step 1, prompt 7, member 0) was judged, but holds no group of an open step.",
    ),
    (
        "verdicts twice in a generation",
        lambda told: told.repeat(VerdictsRecorded),
        "Pool math: slot (step 1, prompt 0, member 0) was judged twice in generation 1.",
    ),
    (
        "a group accepted after closing",
        lambda told: told.records.append(told.records[told.find(GroupAccepted)]),
        "Pool math: slot (step 1, prompt 0, member 0) was accepted while its step was not open.",
    ),
    (
        "a manifest with another digest",
        lambda told: told.change(
            StepClosed,
            0,
            entries=(ManifestEntry(0, 0, b"x" * 32, 1), *_closed(told).entries[1:]),
        ),
        "Pool math: slot (step 1, prompt 0, member 0) has another digest in the manifest than in its record.",
    ),
    (
        "a manifest that pins what nobody judged",
        lambda told: told.change(
            StepClosed,
            0,
            entries=(replace(_closed(told).entries[0], generation=2), *_closed(told).entries[1:]),
        ),
        "Pool math: slot (step 1, prompt 0, member 0) pins generation 2, which has no verdicts.",
    ),
    (
        "a manifest without an accepted group",
        lambda told: told.change(StepClosed, 0, entries=_closed(told).entries[1:]),
        "Pool math: slot (step 1, prompt 0, member 0) was accepted, but is not in the manifest.",
    ),
    (
        "a manifest with a group that never was",
        lambda told: told.drop(GroupAccepted, 3),
        "Pool math: slot (step 1, prompt 1, member 1) is in the manifest, but holds no group.",
    ),
    (
        "a closed step with a group nobody judged",
        lambda told: told.drop(VerdictsRecorded),
        "Pool math: slot (step 1, prompt 0, member 0) has no outcome, but its step is closed.",
    ),
    (
        "a group both judged and expired",
        lambda told: told.change(StepClosed, 0, expired=(ExpiredGroup(0, 0, UnscoredKind.TIMEOUT),)),
        "Pool math: slot (step 1, prompt 0, member 0) was judged and yet expired.",
    ),
    (
        "one verdict too few",
        lambda told: told.change(
            VerdictsRecorded, 0, verdicts=(Scored(1.0),), success_count=1, scored_count=1
        ),
        "Pool math: slot (step 1, prompt 0, member 0) has 1 verdicts for 2 rollouts.",
    ),
    (
        "counts that are not the verdicts'",
        lambda told: told.change(VerdictsRecorded, 0, success_count=2),
        "Pool math: slot (step 1, prompt 0, member 0) states 2 successes of 2, its verdicts make 1 of 2.",
    ),
    (
        "a roster with invented counts",
        lambda told: told.change(
            StepClosed,
            0,
            roster=(
                replace(_closed(told).roster[0], counts=(StepCounts(1, 4, 4, 4),)),
                _closed(told).roster[1],
            ),
        ),
        "Pool math: the counts of ann in step 1 are not those of its verdicts.",
    ),
    (
        "a member called complete that is not",
        lambda told: told.drop(GroupAccepted, 3),
        "Pool math: step 1 calls bob COMPLETE, but it has 1 groups.",
    ),
    (
        "a digest that the envelope does not give",
        lambda told: told.change(GroupAccepted, 8, digest=b"y" * 32),
        "Record 26 of math has a digest that its envelope does not give.",
    ),
    (
        "a body that is another",
        lambda told: _swap_bodies(told),
        "Record 5 of math has a body (PART_KIND_TEXT) that is not the one its envelope digests.",
    ),
    (
        "a session that never was",
        lambda told: told.change(GroupAccepted, 0, session=2),
        "Pool math: slot (step 1, prompt 0, member 0) was published in session 2, which its agent never had.",
    ),
    (
        "a step out of order",
        lambda told: told.change(StepOpened, 2, step=5),
        "Pool math: step 5 opened after step 2.",
    ),
    (
        "a step closed twice",
        lambda told: told.repeat(StepClosed),
        "Pool math: step 1 closed while it was not open.",
    ),
]


def _closed(told: Story) -> StepClosed:
    body = told.records[told.find(StepClosed)][0]
    assert isinstance(body, StepClosed)
    return body


def _swap_bodies(told: Story) -> None:
    index = told.find(GroupAccepted)
    told.records[index] = (told.records[index][0], group(1, 0, 0, text="other")[1])


@pytest.mark.parametrize(
    ("tamper", "sentence"), [one[1:] for one in PLANTED], ids=[one[0] for one in PLANTED]
)
def test_a_planted_contradiction_is_found(tamper: Tamper, sentence: str, tmp_path: Path) -> None:
    told = story()
    tamper(told)
    report = audited(told, tmp_path)
    assert sentence in report.problems
    assert not report.ok


def damage(folder: Path, statement: str) -> None:
    connection = sqlite3.connect(folder / "records.db", isolation_level=None)
    assert connection.execute(statement).rowcount > 0
    connection.close()


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        ("DELETE FROM records WHERE key LIKE 'g/0000000003/00001/00001'", "Stream math jumps from record"),
        ("UPDATE records SET key = 'g/x' WHERE key LIKE 'g/0000000001/00000/00000'", "is filed under 'g/x'"),
        (
            "UPDATE records SET payload = x'ff' WHERE key LIKE 'o/0000000001'",
            "cannot be read: it is no Record",
        ),
        (
            "UPDATE records SET offset = offset + 1 WHERE key LIKE 'g/0000000001/00001/00001'",
            "leaves or overlaps",
        ),
        ("DELETE FROM segments WHERE stream = 2", "bodies of 4 groups of step 1 are gone unretired"),
        ("UPDATE segments SET end = end + 9", "9 of"),
    ],
)
def test_a_damaged_database_is_found(statement: str, sentence: str, tmp_path: Path) -> None:
    story().write(tmp_path)
    damage(tmp_path, statement)
    assert [problem for problem in audit(tmp_path, []).problems if sentence in problem]


def test_a_flipped_bit_and_a_lost_tail_are_found(tmp_path: Path) -> None:
    story().write(tmp_path)
    segment = tmp_path / "segments/math/00000001.seg"
    content = bytearray(segment.read_bytes())
    content[3] ^= 1
    segment.write_bytes(content[:-1])
    report = audit(tmp_path, [])
    assert any("Record 5 of math has a body (PART_KIND_TEXT) that is not" in one for one in report.problems)
    assert any(f"has {len(content) - 1} bytes on disk, {len(content)} were" in one for one in report.problems)
    assert any("Segment 1 of math ends at byte" in one for one in report.problems)
    assert report.problem_count == len(report.problems) == 3


def test_a_changed_prompt_set_is_found(tmp_path: Path) -> None:
    story().write(tmp_path)
    segment = tmp_path / "segments/_catalog/00000001.seg"
    segment.write_bytes(segment.read_bytes().replace(b"p1", b"p9"))
    assert audit(tmp_path, []).problems == ("Prompt set set is not what its record says.",)


def test_bytes_of_a_write_cut_short_are_counted_and_no_problem(tmp_path: Path) -> None:
    story().write(tmp_path)
    with (tmp_path / "segments/math/00000001.seg").open("ab") as tail:
        tail.write(b"half a group")
    report = audit(tmp_path, [])
    assert report.ok
    assert report.uncommitted_bytes == 12


def test_retired_bodies_are_no_problem(tmp_path: Path) -> None:
    told = story()
    told.records.append((StepsRetired(3), ()))
    told.write(tmp_path)
    log = open_sqlite_log(tmp_path)
    assert log.drop_bodies("math", through_position=len(told.records)) > 0
    log.close()
    report = audit(tmp_path, [])
    assert report.problems == ()
    assert (report.group_count, report.retired_group_count) == (12, 12)


def test_a_snapshot_with_other_sums_is_found(tmp_path: Path) -> None:
    story().write(tmp_path)
    log = open_sqlite_log(tmp_path)
    wrong = records_pb2.PoolSnapshot(accepted_count=24, scored_count=14, unscored_count=5)
    log.save_snapshot("math", log.last_position("math"), wrong.SerializeToString())
    log.close()
    assert audit(tmp_path, []).problems == (
        "Pool math: its snapshot counts (24, 14, 5), its records make (24, 13, 5).",
    )


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (receipt(9, 0, 0), "is for a group that is not in the log."),
        (receipt(1, 0, 0, pool="other"), "is for a group that is not in the log."),
        (receipt(1, 0, 0, digest="00" * 32), "is for another group than the log has in that slot."),
        (receipt(1, 0, 0, session=2), "states another session or number of rollouts than the log."),
        (receipt(1, 0, 0, rollouts=3), "states another session or number of rollouts than the log."),
        ("[]\n", "Line 2 of ann.jsonl is no receipt"),
        ('{"pool": "math"}\n', "Line 2 of ann.jsonl is no receipt ('step')."),
    ],
)
def test_a_receipt_that_the_log_does_not_honour_is_found(line: str, sentence: str, tmp_path: Path) -> None:
    story().write(tmp_path)
    journal = tmp_path / "ann.jsonl"
    journal.write_text(receipt(1, 0, 0) + line)
    report = audit(tmp_path, [journal])
    assert report.problem_count == 1
    assert sentence in report.problems[0]
    assert report.receipts_found == 1


def test_a_journal_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    story().write(tmp_path)
    missing = tmp_path / "none"

    assert audit(tmp_path, [missing]).problems == (
        f"There is no journal {missing}; name the file that the agent wrote.",
    )


def test_a_folder_without_a_log_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LogFailedError, match=r"is no data folder of a broker: there is no records\.db\.$"):
        audit(tmp_path, [])
