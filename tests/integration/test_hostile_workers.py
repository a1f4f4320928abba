"""What workers send costs the broker little, is refused with a reason, and harms nobody's groups."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

from hacrl_exchange import codec
from hacrl_exchange._pb import verdict_pb2
from hacrl_exchange._pb import verification_service_pb2 as pb
from hacrl_exchange.broker import desk as desk_module
from hacrl_exchange.broker import local_workers
from hacrl_exchange.broker.desk import VerificationDesk
from hacrl_exchange.broker.history import History
from hacrl_exchange.broker.interceptors import Identities
from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.broker.local_workers import LocalWorkers, WorkerOptions
from hacrl_exchange.errors import InvalidRequestError, InvalidVerdictError, OverloadedError
from hacrl_exchange.status import from_rpc_error, from_status
from hacrl_exchange.testing import running_broker
from rawdesk import Desk


def scored(**components: float) -> verdict_pb2.Verdict:
    return verdict_pb2.Verdict(scored=verdict_pb2.Scored(score=1.0, components=components))


def report_of(
    leased: pb.LeasedGroup, verdicts: Iterable[verdict_pb2.Verdict], **names: str
) -> pb.VerdictReport:
    identity = {"verifier": "exact_match", "version": "1", **names}
    return pb.VerdictReport(
        group=leased.group,
        generation=1,
        verifier=verdict_pb2.VerifierIdentity(config_digest=bytes(32), **identity),
        verdicts=verdicts,
    )


def two_groups(desk: Desk) -> None:
    desk.create_pool()
    desk.join("a")
    desk.await_step("a")
    desk.publish("a", desk.encoded("a", "q0"), desk.encoded("a", "q1"))


def refusal(call: Callable[[], Any]) -> Exception:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc_error(caught.value)


def test_a_report_is_measured_before_it_is_read_and_its_texts_are_bounded(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_groups(desk)
    worker = desk.register_worker()
    lease = desk.acquire(worker, most=1)
    leased = lease.groups[0]
    unknown = verdict_pb2.Verdict(
        not_applicable=verdict_pb2.NotApplicable(),
        reason=999,  # type: ignore[arg-type]  # a newer worker's
    )
    bad = (
        report_of(leased, [scored()] * 1000),
        report_of(leased, [unknown] * 2),
        report_of(leased, [scored()] * 2, version="v" * 129),
        report_of(leased, [scored()] * 2, verifier="v" * 129),
        report_of(leased, [scored(**{"n" * 65: 1.0})] * 2),
        report_of(leased, [scored(**{f"n{index}": 1.0 for index in range(33)})] * 2),
    )

    def never(_: verdict_pb2.Verdict) -> None:
        raise AssertionError("a verdict was converted")

    with monkeypatch.context() as patch:
        patch.setattr(codec, "verdict_from_proto", never)
        answer = desk.verification.ReportVerdicts(
            pb.ReportVerdictsRequest(worker=worker, lease=lease.lease, reports=bad), timeout=10
        )
    assert [type(from_status(result.error)) for result in answer.results] == [InvalidVerdictError] * len(bad)
    largest = report_of(
        leased, [scored(**{f"{index:064}": 1.0 for index in range(32)})] * 2, version="v" * 128
    )
    answer = desk.verification.ReportVerdicts(
        pb.ReportVerdictsRequest(worker=worker, lease=lease.lease, reports=[largest]), timeout=10
    )
    assert not answer.results[0].error.code


def test_a_call_carries_no_more_reports_than_a_lease_has_groups(desk: Desk) -> None:
    worker = desk.register_worker()
    request = pb.ReportVerdictsRequest(worker=worker, lease="l", reports=[pb.VerdictReport()] * 65)
    found = refusal(lambda: desk.verification.ReportVerdicts(request, timeout=10))
    assert str(found) == "A call carries at most 64 reports, as a lease does groups; split it."


def test_workers_and_what_they_offer_are_bounded() -> None:
    with (
        running_broker(limits=Limits(max_workers=2)) as broker,
        grpc.insecure_channel(broker.target) as channel,
    ):
        desk = Desk(channel)
        many = pb.RegisterWorkerRequest(
            identity="w", verifiers=[pb.OfferedVerifier(verifier="v", version="1")] * 65
        )
        found = refusal(lambda: desk.verification.RegisterWorker(many, timeout=10))
        assert isinstance(found, InvalidRequestError)
        desk.register_worker()
        desk.register_worker()
        assert isinstance(refusal(desk.register_worker), OverloadedError)


def test_a_request_that_is_no_message_is_refused_as_invalid_without_a_traceback(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    def send(data: bytes, *, method: str = "VerificationService/RegisterWorker") -> Exception:
        call: Any = desk.channel.unary_unary(f"/hacrl.exchange.v1.{method}")
        return refusal(lambda: call(data, timeout=10))

    not_utf8 = b"\x0a\x02\xff\xfe"
    for data in (b"\xff\xff\xff", not_utf8):
        found = send(data)
        assert isinstance(found, InvalidRequestError)
        assert "is not a message of" in str(found)
    stream: Any = desk.channel.stream_unary("/hacrl.exchange.v1.AdminService/CreatePromptSet")
    assert isinstance(refusal(lambda: stream(iter([not_utf8]), timeout=10)), InvalidRequestError)
    down: Any = desk.channel.unary_stream("/hacrl.exchange.v1.ExchangeService/StreamGroups")
    assert isinstance(refusal(lambda: list(down(not_utf8, timeout=10))), InvalidRequestError)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_lease_that_nobody_received_returns_whole_and_at_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_groups(desk)
    real = History.bodies

    async def hang(*_: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(History, "bodies", hang)
    worker = desk.register_worker()
    with pytest.raises(grpc.RpcError) as caught:
        desk.verification.AcquireLease(pb.AcquireLeaseRequest(worker=worker, max_groups=9), timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    monkeypatch.setattr(History, "bodies", real)
    lease = desk.acquire(worker, wait=5.0)
    assert len(lease.groups) == 2


async def test_the_desk_outlives_a_bug(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(desk_module, "_PAUSE_SECONDS", 0.0)
    done = asyncio.Event()
    rounds = 0

    class Buggy(VerificationDesk):
        async def _look_after(self) -> None:
            nonlocal rounds
            rounds += 1
            if rounds == 1:
                raise RuntimeError("a bug")
            done.set()
            await asyncio.Event().wait()

    desk = Buggy(limits=Limits(), pools=None)  # type: ignore[arg-type]  # not asked
    desk.start()
    await asyncio.wait_for(done.wait(), 5)
    await desk.stop()
    assert [record.exc_info is not None for record in caplog.records] == [True]


async def test_a_worker_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local_workers, "_BUG_PAUSE_SECONDS", 0.0)
    done = asyncio.Event()
    tries = 0

    class Unlucky(LocalWorkers):
        async def _spawn(self, name: str) -> asyncio.subprocess.Process:
            nonlocal tries
            tries += 1
            if tries == 1:
                raise OSError("too many open files")
            done.set()
            return await asyncio.create_subprocess_exec("sleep", "60")

    options = WorkerOptions(1, 1, ())
    workers = Unlucky("unix:x", Identities(), options=options, on_exit=lambda name: None)
    workers.start()
    await asyncio.wait_for(done.wait(), 5)
    await workers.stop()
