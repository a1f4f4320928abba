"""What an operator calls: prompt sets, pools, workers."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from hacrl_exchange._pb import admin_service_pb2 as pb
from hacrl_exchange.client.views import (
    PoolInfo,
    PromptSetInfo,
    WorkerInfo,
    pool_info,
    prompt_set_info,
    worker_info,
)
from hacrl_exchange.client.wire import Wire
from hacrl_exchange.codec import pool_name, pool_spec_to_proto, prompt_entry_to_proto, prompt_set_name
from hacrl_exchange.types import PoolSpec, PromptEntry

_MESSAGE_SIZE = 1 << 20
_PAGE_SIZE = 1000
_INT32_MAX = 2**31 - 1


class AdminClient:
    """An operator's connection to a broker. A broker that is away is waited for, `timeout_seconds` long."""

    def __init__(self, target: str, *, timeout_seconds: float = 30.0) -> None:
        """Opens nothing yet."""
        self._wire = Wire(target, identity="admin", patience_seconds=timeout_seconds)

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        self._wire.close()

    def create_prompt_set(self, prompt_set: str, entries: Iterable[PromptEntry]) -> PromptSetInfo:
        """Stores an immutable prompt set, all or nothing. The same content again answers the stored set.

        Raises:
            PromptSetExistsError: the name is taken by other content.
            InvalidPromptSetError: an entry is malformed, repeated or too large.
            UnreachableError: no answer.
        """
        requests = _prompt_set_messages(prompt_set_name(prompt_set), entries)
        response = self._wire.call_stream(self._wire.admin.CreatePromptSet, requests)
        return prompt_set_info(response.prompt_set)

    def prompt_sets(self) -> tuple[PromptSetInfo, ...]:
        """Every prompt set, by name.

        Raises:
            UnreachableError: no answer.
        """
        found: list[PromptSetInfo] = []
        token = ""
        while True:
            request = pb.ListPromptSetsRequest(page_size=_PAGE_SIZE, page_token=token)
            response = self._wire.call(self._wire.admin.ListPromptSets, request)
            found.extend(prompt_set_info(one) for one in response.prompt_sets)
            token = response.next_page_token
            if not token:
                return tuple(found)

    def create_pool(self, pool: str, spec: PoolSpec) -> PoolInfo:
        """Creates a pool. The same spec again answers the stored pool.

        Raises:
            PoolExistsError: the name is taken by a pool with another spec.
            PromptSetNotFoundError: store the prompt set first.
            InvalidPoolError: the spec contradicts itself or a limit.
            UnreachableError: no answer.
        """
        request = pb.CreatePoolRequest(name=pool_name(pool), spec=pool_spec_to_proto(spec))
        return pool_info(self._wire.call(self._wire.admin.CreatePool, request).pool)

    def workers(self) -> tuple[WorkerInfo, ...]:
        """Every worker that is connected now.

        Raises:
            UnreachableError: no answer.
        """
        found: list[WorkerInfo] = []
        token = ""
        while True:
            request = pb.ListWorkersRequest(page_size=_PAGE_SIZE, page_token=token)
            response = self._wire.call(self._wire.admin.ListWorkers, request)
            found.extend(worker_info(one) for one in response.workers)
            token = response.next_page_token
            if not token:
                return tuple(found)


def _prompt_set_messages(name: str, entries: Iterable[PromptEntry]) -> list[pb.CreatePromptSetRequest]:
    """Messages of about 1 MiB; the first names the set and counts its prompts, even if there is none."""
    requests = [pb.CreatePromptSetRequest(name=name)]
    size = 0
    count = 0
    for entry in map(prompt_entry_to_proto, entries):
        entry_size = entry.ByteSize() + 8
        if requests[-1].entries and size + entry_size > _MESSAGE_SIZE:
            requests.append(pb.CreatePromptSetRequest())
            size = 0
        requests[-1].entries.append(entry)
        size += entry_size
        count += 1
    requests[0].prompt_count = min(count, _INT32_MAX)  # the broker refuses far fewer
    return requests
