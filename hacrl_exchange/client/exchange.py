"""The way in: a connection to a broker, its pools, and joining one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from hacrl_exchange._pb import exchange_service_pb2 as pb
from hacrl_exchange._pb import step_pb2
from hacrl_exchange.client.agent import Agent
from hacrl_exchange.client.batch import ALL_BUT_META, JointBatch, Part, await_manifest, joint_batch
from hacrl_exchange.client.journal import Journal
from hacrl_exchange.client.retry import Patience
from hacrl_exchange.client.views import (
    MemberInfo,
    PoolInfo,
    PoolStatus,
    ServerInfo,
    member_info,
    pool_info,
    pool_status,
    server_info,
)
from hacrl_exchange.client.wire import Wire
from hacrl_exchange.codec import model_spec_to_proto, pool_name
from hacrl_exchange.errors import StepNotFoundError, UnreachableError
from hacrl_exchange.types import ModelSpec

_PAGE_SIZE = 1000
_FOLLOW_SECONDS = 1.0


def connect(
    target: str, *, timeout_seconds: float = 30.0, identity: str = "", patience_seconds: float = 300.0
) -> Exchange:
    """Connects to a broker at "host:port" and asks what it speaks.

    A broker that is not up yet is waited for, `timeout_seconds` long. Later outages are borne for
    `patience_seconds` each. `identity` is a free name for the broker's logs.

    Raises:
        UnreachableError: nobody answered there.
        ExchangeError: the broker refused.
    """
    wire = Wire(target, identity=identity, patience_seconds=patience_seconds)
    try:
        info = _server_info(wire, timeout_seconds)
    except BaseException:
        wire.close()
        raise
    return Exchange(wire, info=info)


def _server_info(wire: Wire, timeout_seconds: float) -> ServerInfo:
    patience = Patience(timeout_seconds, target=wire.target)
    try:
        response = wire.call(
            wire.exchange.GetServerInfo,
            pb.GetServerInfoRequest(),
            timeout_seconds=timeout_seconds,
            patience=patience,
        )
    except UnreachableError as error:
        raise UnreachableError(
            f"No broker answered at {wire.target} within {timeout_seconds:g} s. "
            "Check the address, and that `hacrl broker` runs there.",
            target=wire.target,
        ) from error
    return server_info(response)


class Exchange:
    """A connection to a broker. Made by `connect`; use as a context manager. Threads may share it.

    Do not carry it over a fork: gRPC's threads do not survive one. Connect after forking.
    """

    def __init__(self, wire: Wire, *, info: ServerInfo) -> None:
        self._wire = wire
        self.info: ServerInfo = info
        """What the broker speaks and allows."""

    def __repr__(self) -> str:
        return f"<Exchange at {self._wire.target}>"

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection. Calls under way in other threads raise UnreachableError."""
        self._wire.close()

    def join(
        self,
        pool: str,
        *,
        agent: str,
        model: ModelSpec | None = None,
        resume_after: int | None = None,
        journal: str | os.PathLike[str] | None = None,
    ) -> Agent:
        """Starts a session of an agent in a pool; an older session of the same agent ends at once.

        Without `resume_after` the agent sees the steps from now on, open ones included if it is on their
        roster. With the number of a step (of the checkpoint that was restored; 0 for the start) it first gets
        every retained step after that again, closed ones to replay, then the live ones. `journal` is a file
        that keeps every receipt for `hacrl audit`.

        Raises:
            PoolNotFoundError: there is no such pool.
            AgentTakenError: another principal owns the agent's name.
            InvalidRequestError: the agent's name is malformed.
            UnreachableError: the broker was away for longer than patience lasts.
            OSError: the journal cannot be written.
        """
        request = pb.JoinPoolRequest(
            pool=pool_name(pool),
            agent=agent,
            instance=str(uuid.uuid4()),
            model=model_spec_to_proto(model or ModelSpec()),
        )
        opened = None if journal is None else Journal(Path(journal))
        try:
            joined = self._wire.call(self._wire.exchange.JoinPool, request)
            return Agent(
                self._wire,
                joined,
                name=agent,
                pool=pool_info(joined.pool),
                limits=self.info.limits,
                resume_after=resume_after,
                journal=opened,
            )
        except BaseException:
            if opened is not None:
                opened.close()
            raise

    def pool(self, name: str) -> PoolStatus:
        """Where a pool stands.

        Raises:
            PoolNotFoundError, UnreachableError: as their names say.
        """
        return pool_status(
            self._wire.call(self._wire.exchange.GetPool, pb.GetPoolRequest(name=pool_name(name)))
        )

    def pools(self) -> tuple[PoolInfo, ...]:
        """Every pool, by name.

        Raises:
            UnreachableError: no answer.
        """
        found: list[PoolInfo] = []
        token = ""
        while True:
            request = pb.ListPoolsRequest(page_size=_PAGE_SIZE, page_token=token)
            response = self._wire.call(self._wire.exchange.ListPools, request)
            found.extend(pool_info(pool) for pool in response.pools)
            token = response.next_page_token
            if not token:
                return tuple(found)

    def members(self, pool: str) -> tuple[MemberInfo, ...]:
        """The agents of a pool, by name.

        Raises:
            PoolNotFoundError, UnreachableError: as their names say.
        """
        found: list[MemberInfo] = []
        token = ""
        while True:
            request = pb.ListMembersRequest(parent=pool_name(pool), page_size=_PAGE_SIZE, page_token=token)
            response = self._wire.call(self._wire.exchange.ListMembers, request)
            found.extend(member_info(member) for member in response.members)
            token = response.next_page_token
            if not token:
                return tuple(found)

    def replay(
        self,
        pool: str,
        step: int,
        *,
        parts: tuple[Part, ...] = ALL_BUT_META,
        timeout_seconds: float | None = None,
    ) -> JointBatch:
        """The joint batch of a step, for a reader: no membership, no session, no acknowledgement.

        Waits if the step is still open. The pool's reveal rule holds for readers too. Prompts have ids only.

        Raises:
            StepNotFoundError, StepRetiredError, PoolNotFoundError: as their names say.
            TimeoutError: the step did not close in time.
            ExchangeError: as `Step.joint_batch`.
        """
        manifest = self._manifest(pool, step, timeout_seconds=timeout_seconds)
        return self._batch(pool, manifest, parts, window=self.pool(pool).spec.capability_window)

    def follow(
        self, pool: str, start_step: int = 1, *, parts: tuple[Part, ...] = ALL_BUT_META
    ) -> Iterator[JointBatch]:
        """Yields the joint batches of a pool from a step on, as steps close; ends when the pool does.

        Raises:
            StepRetiredError: the step to begin or go on with is no longer kept.
            ExchangeError: as `replay`.
        """
        window = self.pool(pool).spec.capability_window
        # While one step is fetched and decoded, the broker already looks for the next.
        ahead = ThreadPoolExecutor(1, thread_name_prefix="hacrl-follow")
        try:
            step = start_step
            coming = ahead.submit(self._manifest, pool, step)
            while True:
                try:
                    manifest = coming.result()
                except StepNotFoundError:
                    status = self.pool(pool)
                    if 0 < status.spec.lockstep.max_steps < step:
                        return
                    if status.last_step < step:
                        self._wire.pause(_FOLLOW_SECONDS)
                    coming = ahead.submit(self._manifest, pool, step)
                    continue
                step += 1
                coming = ahead.submit(self._manifest, pool, step)
                yield self._batch(pool, manifest, parts, window=window)
        finally:
            ahead.shutdown(wait=False, cancel_futures=True)  # a poll under way ends by itself, or on close

    def _manifest(self, pool: str, step: int, *, timeout_seconds: float | None = None) -> step_pb2.Manifest:
        return await_manifest(self._wire, pool=pool, step=step, caller=None, timeout_seconds=timeout_seconds)

    def _batch(
        self, pool: str, manifest: step_pb2.Manifest, parts: tuple[Part, ...], *, window: int
    ) -> JointBatch:
        return joint_batch(
            self._wire,
            manifest,
            pool=pool,
            caller=None,
            prompts=(),
            parts=parts,
            capability_window=window,
        )
