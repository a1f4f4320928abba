"""A step as an agent sees it: what to answer, what is committed already, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from hacrl_exchange._pb import step_pb2
from hacrl_exchange.client.batch import ALL_BUT_META, JointBatch, Part
from hacrl_exchange.codec import duration_from_proto, enum_from_proto, prompt_from_proto
from hacrl_exchange.types import Group, Prompt, StepState


class _Source(Protocol):
    """What a step asks of its agent."""

    def stored_groups(self, step: int) -> dict[str, Group]:
        """This agent's groups of a step that the broker holds, by prompt id."""

    def fetch_batch(
        self, step: Step, *, parts: tuple[Part, ...], timeout_seconds: float | None
    ) -> JointBatch:
        """Waits for the end of the step and fetches its joint batch."""


class Step:
    """The prompts that all agents of the roster answer together. Made by `Agent.steps()`."""

    def __init__(self, message: step_pb2.Step, *, source: _Source) -> None:
        self.number: int = message.number
        """Counts from 1."""
        self.prompts: tuple[Prompt, ...] = tuple(prompt_from_proto(prompt) for prompt in message.prompts)
        """In the order of the manifest."""
        self.roster: tuple[str, ...] = tuple(message.roster)
        """The agents that take part."""
        self.closed: bool = enum_from_proto(StepState, message.state) is StepState.CLOSED
        """It was closed when it was handed out: a replay after a restart. Nothing more can be published."""
        self.publish_remaining_seconds: float = duration_from_proto(message.publish_remaining)
        """Time left to publish when it was handed out; 0 once publishing ended."""
        self._source = source
        self._committed_ids = set(message.committed_prompt_ids)
        self._stored: dict[str, Group] = {}
        self._fetched = False

    def __repr__(self) -> str:
        done = len(self._committed_ids)
        return f"<Step {self.number} [{done} of {len(self.prompts)} prompts committed]>"

    @property
    def committed(self) -> Mapping[str, Group]:
        """This agent's own groups that are durable in this step, by prompt id; of earlier lives too.

        Those of an earlier life are fetched on first use.

        Raises:
            ExchangeError: they cannot be fetched.
        """
        if not self._fetched and not self._committed_ids <= self._stored.keys():
            self._stored = {**self._source.stored_groups(self.number), **self._stored}
            self._fetched = True
            self._committed_ids |= self._stored.keys()
        return MappingProxyType(self._stored)

    @property
    def missing(self) -> tuple[Prompt, ...]:
        """The prompts that this agent has not answered yet, in order."""
        return tuple(prompt for prompt in self.prompts if prompt.prompt_id not in self._committed_ids)

    def is_committed(self, prompt_id: str) -> bool:
        """Says whether this agent's group for the prompt is durable. Fetches nothing."""
        return prompt_id in self._committed_ids

    def joint_batch(
        self, *, parts: tuple[Part, ...] = ALL_BUT_META, timeout_seconds: float | None = None
    ) -> JointBatch:
        """Waits until the step closes and returns everybody's verified groups.

        A broken connection resumes where it broke. A step always closes, so there is no limit by default.

        Raises:
            TimeoutError: `timeout_seconds` passed first.
            StepRetiredError: the pool no longer keeps the step.
            SessionSupersededError: a newer process of this agent joined.
            UnreachableError: the broker was away for longer than patience lasts.
            DigestMismatchError, CountMismatchError: what came is not what the manifest lists.
        """
        return self._source.fetch_batch(self, parts=parts, timeout_seconds=timeout_seconds)

    def note_committed(self, prompt_id: str, group: Group) -> None:
        """Remembers a group that became durable. For the agent that made this step."""
        self._committed_ids.add(prompt_id)
        self._stored[prompt_id] = group
