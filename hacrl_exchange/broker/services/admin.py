"""AdminService: what operators call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from hacrl_exchange import codec
from hacrl_exchange._pb import admin_service_pb2 as pb
from hacrl_exchange._pb import admin_service_pb2_grpc, prompt_pb2
from hacrl_exchange.broker.broker import Broker
from hacrl_exchange.broker.interceptors import Context
from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.broker.prompts import PromptSet
from hacrl_exchange.broker.services.exchange import pool_message
from hacrl_exchange.broker.services.requests import bare_id, page
from hacrl_exchange.errors import InvalidPromptSetError, InvalidRequestError


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    """Stores prompt sets, makes pools, lists workers."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def CreatePromptSet(
        self, request_iterator: AsyncIterator[pb.CreatePromptSetRequest], context: Context
    ) -> pb.CreatePromptSetResponse:
        name, entries = await _received(request_iterator, limits=self._broker.limits)
        remaining: float | None = context.time_remaining()
        if context.cancelled() or (remaining is not None and remaining <= 0):
            raise InvalidPromptSetError("The upload was given up by its client; nothing was stored.")
        stored = await asyncio.shield(self._broker.prompts.create(name, entries))
        return pb.CreatePromptSetResponse(prompt_set=_message(stored))

    async def ListPromptSets(
        self, request: pb.ListPromptSetsRequest, context: Context
    ) -> pb.ListPromptSetsResponse:
        sets = self._broker.prompts.all()
        chosen, token = page(request, [stored.name for stored in sets], sets)
        return pb.ListPromptSetsResponse(
            prompt_sets=[_message(stored) for stored in chosen], next_page_token=token
        )

    async def CreatePool(self, request: pb.CreatePoolRequest, context: Context) -> pb.CreatePoolResponse:
        name = bare_id(request.name, collection="pools", field="name")
        bare_id(request.spec.prompt_set, collection="promptSets", field="spec.prompt_set")
        spec = codec.pool_spec_from_proto(request.spec)
        pool = await asyncio.shield(self._broker.create_pool(name, spec))
        return pb.CreatePoolResponse(pool=pool_message(pool))

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Context) -> pb.ListWorkersResponse:
        workers = sorted(self._broker.desk.workers(), key=lambda worker: worker.worker_id)
        chosen, token = page(request, [worker.worker_id for worker in workers], workers)
        return pb.ListWorkersResponse(
            workers=[
                pb.Worker(
                    worker=worker.worker_id,
                    identity=worker.identity,
                    verifiers=worker.verifiers,
                    leased_group_count=worker.leased_group_count,
                )
                for worker in chosen
            ],
            next_page_token=token,
        )


async def _received(
    requests: AsyncIterator[pb.CreatePromptSetRequest], *, limits: Limits
) -> tuple[str, list[prompt_pb2.PromptEntry]]:
    """The name and every entry of an upload. A stream that breaks off just ends here; only the count tells.

    Raises:
        InvalidRequestError: the set's name is missing, malformed or contradicts itself.
        InvalidPromptSetError: too large, or not as many entries as the first message promised.
    """
    first: pb.CreatePromptSetRequest | None = None
    name = ""
    entries: list[prompt_pb2.PromptEntry] = []
    size = 0
    async for request in requests:
        if first is None:
            first = request
            name = bare_id(request.name, collection="promptSets", field="name")
            _check_count(request.prompt_count, limits=limits)
        elif request.name not in ("", first.name):
            raise InvalidRequestError(
                f"A later message names {request.name[:100]!r}, but the first named {first.name!r}; "
                "nothing was stored. Use one call per prompt set.",
                field="name",
            )
        size += request.ByteSize()
        if size > limits.max_prompt_set_size:
            raise InvalidPromptSetError(
                f"The prompt set is larger than {limits.max_prompt_set_size} bytes; nothing was stored. "
                "Split it.",
                limit=limits.max_prompt_set_size,
            )
        entries.extend(request.entries)
        if len(entries) > first.prompt_count:
            break
    if first is None:
        raise InvalidPromptSetError("The upload ended before its first message; nothing was stored.")
    if len(entries) != first.prompt_count:
        came = f"more than {first.prompt_count}" if len(entries) > first.prompt_count else f"{len(entries)}"
        raise InvalidPromptSetError(
            f"The upload promised {first.prompt_count} prompts, but {came} came; nothing was stored. "
            "Send the whole set again.",
            prompt_count=first.prompt_count,
        )
    return name, entries


def _check_count(prompt_count: int, *, limits: Limits) -> None:
    if prompt_count <= 0:
        raise InvalidPromptSetError(
            "A prompt set needs at least one prompt, and prompt_count of the first message says how many "
            f"will come; it is {prompt_count}. Nothing was stored.",
            prompt_count=prompt_count,
        )
    if prompt_count > limits.max_prompts_per_set:
        raise InvalidPromptSetError(
            f"The prompt set has {prompt_count} prompts and the limit is {limits.max_prompts_per_set}; "
            "nothing was stored. Split it.",
            limit=limits.max_prompts_per_set,
        )


def _message(stored: PromptSet) -> prompt_pb2.PromptSet:
    return prompt_pb2.PromptSet(
        name=f"promptSets/{stored.name}", digest=stored.digest, prompt_count=len(stored.entries)
    )
