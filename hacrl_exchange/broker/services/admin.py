"""AdminService: what operators call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from hacrl_exchange import codec
from hacrl_exchange._pb import admin_service_pb2 as pb
from hacrl_exchange._pb import admin_service_pb2_grpc, prompt_pb2
from hacrl_exchange.broker.broker import Broker
from hacrl_exchange.broker.interceptors import Context
from hacrl_exchange.broker.prompts import PromptSet
from hacrl_exchange.broker.services.exchange import pool_message
from hacrl_exchange.broker.services.requests import bare_id, page
from hacrl_exchange.errors import InvalidPromptSetError


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    """Stores prompt sets, makes pools, lists workers."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def CreatePromptSet(
        self, request_iterator: AsyncIterator[pb.CreatePromptSetRequest], context: Context
    ) -> pb.CreatePromptSetResponse:
        name = ""
        entries: list[prompt_pb2.PromptEntry] = []
        size = 0
        limit = self._broker.limits.max_prompt_set_size
        async for request in request_iterator:
            if not entries and not name:
                name = bare_id(request.name, collection="promptSets", field="name")
            size += request.ByteSize()
            if size > limit:
                raise InvalidPromptSetError(
                    f"The prompt set is larger than {limit} bytes; nothing was stored. Split it.", limit=limit
                )
            entries.extend(request.entries)
        if not name:
            name = bare_id(name, collection="promptSets", field="name")
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


def _message(stored: PromptSet) -> prompt_pb2.PromptSet:
    return prompt_pb2.PromptSet(
        name=f"promptSets/{stored.name}", digest=stored.digest, prompt_count=len(stored.entries)
    )
