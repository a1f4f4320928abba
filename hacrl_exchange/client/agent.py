"""One agent's life in one pool: steps in, groups out, joint batches back."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from types import TracebackType

import grpc

from hacrl_exchange._pb import exchange_service_pb2 as pb
from hacrl_exchange._pb import rollout_pb2, step_pb2
from hacrl_exchange.client.batch import JointBatch, Part, await_manifest, joint_batch
from hacrl_exchange.client.journal import Journal
from hacrl_exchange.client.publishing import Publisher, PublishReport
from hacrl_exchange.client.retry import Patience
from hacrl_exchange.client.step import Step
from hacrl_exchange.client.views import PoolInfo, ServerLimits
from hacrl_exchange.client.wire import Wire
from hacrl_exchange.codec import (
    LogprobDtype,
    decode_group,
    duration_to_proto,
    encode_group,
    group_name,
    parse_group_name,
    pool_name,
)
from hacrl_exchange.errors import (
    ExchangeError,
    InvalidRequestError,
    NotJoinedError,
    PoolEndedError,
    SessionSupersededError,
    SlotTakenError,
    StepClosedError,
    StepRetiredError,
    UnreachableError,
)
from hacrl_exchange.types import Group, PoolSpec, Receipt, Slot

_log = logging.getLogger("hacrl.client")
_LEAVE_SECONDS = 10.0
_OWN_KINDS = (
    rollout_pb2.PART_KIND_TEXT,
    rollout_pb2.PART_KIND_TOKENS,
    rollout_pb2.PART_KIND_LOGPROBS,
    rollout_pb2.PART_KIND_META,
)


class Agent:
    """A member of a pool. Made by `Exchange.join`; use as a context manager, from one thread at a time.

    Leaving the `with` block normally leaves the pool. On an exception it stays a member, so that the next
    process of this agent can take over where this one failed.
    """

    def __init__(
        self,
        wire: Wire,
        joined: pb.JoinPoolResponse,
        *,
        name: str,
        pool: PoolInfo,
        limits: ServerLimits,
        resume_after: int | None,
        journal: Journal | None,
    ) -> None:
        self.name: str = name
        """The agent's id in the pool."""
        self.session: int = joined.member.session
        """Number of this life; to be stated in `PolicyVersion`."""
        self.pool: str = pool.name
        """The pool's id."""
        self.spec: PoolSpec = pool.spec
        """What the pool is: group size, limits, verifiers."""
        self._wire = wire
        self._caller = pb.Caller(agent=name, session=self.session)
        self._publisher = Publisher(wire, pool=pool.name, caller=self._caller, limits=limits)
        self._journal = journal
        self._resume_after = resume_after
        self._joined_last_step = joined.last_step
        open_steps = [step.number for step in joined.open_steps]
        self._after = min(open_steps, default=joined.last_step + 1) - 1
        if resume_after is not None:
            self._after = resume_after
        self._current: Step | None = None
        self._handed_out: deque[int] = deque()
        """Steps that are not acknowledged yet, in order."""
        self._finished: set[int] = set()

    def __repr__(self) -> str:
        step = self._current.number if self._current else "none"
        return f"<Agent {self.name} in pool {self.pool} [session {self.session}, step {step}]>"

    def __enter__(self) -> Agent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._leave_quietly()
        finally:
            if self._journal is not None:
                self._journal.close()
                self._journal = None

    def steps(self, *, timeout_seconds: float | None = None) -> Iterator[Step]:
        """Yields the steps that this agent takes part in, one after the other; ends when the pool does.

        Going on to the next step acknowledges those before it. Where steps overlap, a step counts as done
        once its joint batch was fetched, and acknowledging waits for the oldest that was not. A
        `timeout_seconds` bounds the wait for each step; without it the wait lasts until enough members are
        there.

        Raises:
            TimeoutError: no step came in time.
            SessionSupersededError: a newer process of this agent joined; this one must stop.
            NotJoinedError: the broker does not know this session, e.g. its data was lost.
            UnreachableError: the broker was away for longer than patience lasts.
        """
        while True:
            self._ack_finished()
            try:
                message = self._await_step(timeout_seconds)
            except PoolEndedError:
                return
            self._after = message.number
            step = Step(message, source=self)
            # Without resume_after, steps that closed before this life began are the past.
            if self._resume_after is None and step.closed and step.number <= self._joined_last_step:
                continue
            self._current = step
            self._handed_out.append(step.number)
            if step.closed or self.spec.lockstep.max_open_steps == 1:
                self._finished.add(step.number)
            yield step

    def publish(
        self, groups: Iterable[Group], *, step: Step | None = None, logprob_dtype: LogprobDtype = "f16"
    ) -> PublishReport:
        """Publishes groups of a step, by default the one that `steps()` yielded last; durable on return.

        Encodes in this thread while calls are under way, so an iterator that makes the groups works well.
        Repeats itself while the broker is away. Nothing is published twice: where the broker holds a group of
        this agent already, that one stays and counts (`PublishReport.kept`, `step.committed`). Groups that
        come too late are listed, not raised. Log-probs travel as f16 unless `logprob_dtype` is "f32".

        Raises:
            ExchangeError: the first group that is malformed or refused, with notes on the others; all other
                groups were published before it is raised.
            SessionSupersededError: a newer process of this agent joined.
            UnreachableError: the broker was away for longer than patience lasts; publish again later.
            OSError: the journal cannot be written.
        """
        target = step or self._current
        if target is None:
            raise InvalidRequestError("There is no step to publish in: take one from steps() first.")
        run = _Run(target, self, logprob_dtype=logprob_dtype)
        try:
            for message, outcome in self._publisher.publish(run.encoded(groups)):
                run.take(message, outcome)
            if run.taken:
                for message, outcome in self._publisher.publish(run.fetch_stored()):
                    run.take_stored(message, outcome)
        finally:
            if self._journal is not None:
                self._journal.append(run.receipts)
        run.raise_refused()
        wire_bytes, call_seconds = self._publisher.take_costs()
        return PublishReport(
            tuple(run.receipts),
            kept=tuple(run.kept),
            late=tuple(run.late),
            wire_bytes=wire_bytes,
            call_seconds=call_seconds,
        )

    def leave(self) -> None:
        """Leaves the pool: open slots are forfeited, and no step waits for this agent any more.

        Raises:
            ExchangeError: as any call; UnreachableError already after ten seconds.
        """
        request = pb.LeavePoolRequest(pool=pool_name(self.pool), caller=self._caller)
        patience = self._wire.patience(_LEAVE_SECONDS)
        self._wire.call(
            self._wire.exchange.LeavePool, request, timeout_seconds=_LEAVE_SECONDS, patience=patience
        )

    def stored_groups(self, step: int) -> dict[str, Group]:
        """This agent's own groups of a step that the broker holds, by prompt id.

        Raises:
            ExchangeError: as any call.
        """
        return {
            parse_group_name(message.name)[1].prompt_id: decode_group(message)
            for message in self._own_messages(step)
        }

    def _own_messages(self, step: int) -> list[rollout_pb2.Group]:
        """The same, as they travel."""
        request = pb.StreamOwnGroupsRequest(
            pool=pool_name(self.pool), caller=self._caller, step=step, part_kinds=_OWN_KINDS
        )
        patience = self._wire.patience()
        while True:
            try:
                with closing(self._wire.stream(self._wire.exchange.StreamOwnGroups, request)) as messages:
                    return [group for message in messages for group in message.groups]
            except (grpc.RpcError, ValueError) as error:
                self._wire.pause_after(error, patience)

    def fetch_batch(
        self, step: Step, *, parts: tuple[Part, ...], timeout_seconds: float | None
    ) -> JointBatch:
        """`Step.joint_batch`."""
        manifest = await_manifest(
            self._wire,
            pool=self.pool,
            step=step.number,
            caller=self._caller,
            timeout_seconds=timeout_seconds,
        )
        batch = joint_batch(
            self._wire,
            manifest,
            pool=self.pool,
            caller=self._caller,
            prompts=step.prompts,
            parts=parts,
            capability_window=self.spec.capability_window,
        )
        if step.number in self._handed_out:
            self._finished.add(step.number)
        return batch

    def _await_step(self, timeout_seconds: float | None) -> step_pb2.Step:
        def ask(wait: float, attempt_seconds: float, patience: Patience) -> step_pb2.Step | None:
            request = pb.AwaitStepRequest(
                pool=pool_name(self.pool),
                caller=self._caller,
                after_step=self._after,
                wait=duration_to_proto(wait),
            )
            response = self._wire.call(
                self._wire.exchange.AwaitStep, request, timeout_seconds=attempt_seconds, patience=patience
            )
            if response.HasField("step"):
                return response.step
            self._after = max(self._after, response.after_step)
            return None

        what = f"A step of pool {self.pool} for agent {self.name}"
        return self._wire.wait_for(ask, timeout_seconds=timeout_seconds, what=what)

    def _ack_finished(self) -> None:
        """Acknowledges the steps that are done, up to the oldest that is not."""
        step = 0
        while self._handed_out and self._handed_out[0] in self._finished:
            step = self._handed_out.popleft()
            self._finished.discard(step)
        if not step:
            return
        request = pb.AckStepRequest(pool=pool_name(self.pool), caller=self._caller, step=step)
        try:
            self._wire.call(self._wire.exchange.AckStep, request)
        except InvalidRequestError as error:
            # An older step without this agent is still open. Acks are cumulative: the next one covers this.
            _log.info("step %d cannot be acknowledged yet: %s", step, error)

    def _leave_quietly(self) -> None:
        """A pool that cannot be left must not spoil a run that went well: the publish deadline frees it."""
        try:
            self.leave()
        except (UnreachableError, SessionSupersededError, NotJoinedError) as error:
            _log.warning("agent %s could not leave pool %s: %s", self.name, self.pool, error)


class _Run:
    """What one `publish` has come to so far."""

    def __init__(self, step: Step, agent: Agent, *, logprob_dtype: LogprobDtype) -> None:
        self._step = step
        self._agent = agent
        self._logprob_dtype: LogprobDtype = logprob_dtype
        self._groups: dict[str, Group] = {}
        self._positions: dict[str, int] = {}
        self.receipts: list[Receipt] = []
        self.kept: list[str] = []
        self.late: list[str] = []
        self.taken: dict[str, ExchangeError] = {}
        self.refused: list[tuple[str, ExchangeError]] = []

    def encoded(self, groups: Iterable[Group]) -> Iterator[rollout_pb2.Group]:
        """Groups as they travel, without those that are committed and those that cannot be encoded."""
        for position, group in enumerate(groups):
            self._positions.setdefault(group.prompt_id, position)
            if self._step.is_committed(group.prompt_id):
                self.kept.append(group.prompt_id)
                continue
            slot = Slot(step=self._step.number, prompt_id=group.prompt_id, agent=self._agent.name)
            name = group_name(self._agent.pool, slot)
            try:
                message = encode_group(group, name=name, logprob_dtype=self._logprob_dtype)
            except ExchangeError as error:
                self.refused.append((group.prompt_id, error))
                continue
            self._groups.setdefault(group.prompt_id, group)
            yield message

    def take(self, message: rollout_pb2.Group, outcome: Receipt | ExchangeError) -> None:
        """Notes what became of a group."""
        prompt_id = parse_group_name(message.name)[1].prompt_id
        match outcome:
            case Receipt():
                self.receipts.append(outcome)
                self._step.note_committed(prompt_id, self._groups[prompt_id])
            case SlotTakenError():
                self.taken[prompt_id] = outcome
            case StepClosedError() | StepRetiredError():
                self.late.append(prompt_id)
            case _:
                self.refused.append((prompt_id, outcome))

    def fetch_stored(self) -> Sequence[rollout_pb2.Group]:
        """The stored groups of the taken slots; published again, they answer their first receipts."""
        messages = [
            message
            for message in self._agent._own_messages(self._step.number)
            if parse_group_name(message.name)[1].prompt_id in self.taken
        ]
        for message in messages:
            prompt_id = parse_group_name(message.name)[1].prompt_id
            self.kept.append(prompt_id)
            self._step.note_committed(prompt_id, decode_group(message))
            message.ClearField("part_kinds")
            del self.taken[prompt_id]
        self.refused.extend(self.taken.items())
        return messages

    def take_stored(self, message: rollout_pb2.Group, outcome: Receipt | ExchangeError) -> None:
        """Notes the receipt of a stored group."""
        if isinstance(outcome, Receipt):
            self.receipts.append(outcome)
        else:
            self.refused.append((parse_group_name(message.name)[1].prompt_id, outcome))

    def raise_refused(self) -> None:
        """Raises the refusal of the group given first, if any was refused."""
        if not self.refused:
            return
        self.refused.sort(key=lambda refusal: self._positions[refusal[0]])
        prompt_id, first = self.refused[0]
        first.add_note(f"This is about the group for prompt {prompt_id} of step {self._step.number}.")
        for other_id, other in self.refused[1:]:
            first.add_note(f"Also refused, for prompt {other_id}: {other}")
        raise first
