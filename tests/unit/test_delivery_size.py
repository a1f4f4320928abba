"""Delivery messages are cut by what they hold, verdicts included."""

from __future__ import annotations

import pytest

from hacrl_exchange._pb import exchange_service_pb2, records_pb2, rollout_pb2, verdict_pb2
from hacrl_exchange.broker.core.records import GroupAccepted
from hacrl_exchange.broker.history import GroupAt
from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.broker.services import delivery


def largest_verdicts(rollouts: int) -> records_pb2.VerdictsRecorded:
    limits = Limits()
    names = [f"{index:0{limits.max_component_name_size}}" for index in range(limits.max_components)]
    verdict = verdict_pb2.Verdict(scored=verdict_pb2.Scored(score=1.0, components=dict.fromkeys(names, 1.0)))
    name = "v" * limits.max_name_size
    identity = verdict_pb2.VerifierIdentity(verifier=name, version=name, config_digest=bytes(32))
    return records_pb2.VerdictsRecorded(verifier=identity, verdicts=[verdict] * rollouts)


def group_at(rollouts: int) -> GroupAt:
    envelope = rollout_pb2.Envelope(rollouts=[rollout_pb2.RolloutInfo(token_count=1)] * rollouts)
    return GroupAt(
        1,
        GroupAccepted(
            step=1,
            prompt_index=0,
            roster_index=0,
            session=1,
            digest=bytes(32),
            rollout_count=rollouts,
            envelope=envelope.SerializeToString(),
        ),
    )


@pytest.mark.parametrize("rollouts", [1, 8, 256])
def test_the_size_that_a_group_is_packed_by_covers_its_verdicts(rollouts: int) -> None:
    recorded, at = largest_verdicts(rollouts), group_at(rollouts)
    choice = delivery._pick(at, (), extra_size=delivery._verdict_size(recorded))
    message = exchange_service_pb2.StreamGroupsResponse()
    delivered = message.groups.add(entry=1)
    delivered.group.envelope.CopyFrom(choice.envelope)
    delivered.group.name = "n" * 300
    delivered.verdict.verifier.CopyFrom(recorded.verifier)
    delivered.verdict.verdicts.extend(recorded.verdicts)
    assert message.ByteSize() <= choice.size


def test_the_largest_verdicts_leave_room_for_the_largest_group() -> None:
    limits = Limits()
    assert largest_verdicts(256).ByteSize() < 1 << 20
    assert (1 << 20) + limits.max_group_stored_size + (128 << 10) + (64 << 10) < limits.max_message_size
