"""A prompt set is stored whole or not at all, and storing a large one leaves the broker its breath."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hacrl_exchange._pb import admin_service_pb2 as pb
from hacrl_exchange._pb import prompt_pb2, records_pb2
from hacrl_exchange.broker.broker import Broker
from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.broker.services.admin import AdminService
from hacrl_exchange.errors import InvalidPromptSetError, InvalidRequestError


def entries_of(count: int, *, content: str = "?", reference: str = "4") -> list[prompt_pb2.PromptEntry]:
    return [
        prompt_pb2.PromptEntry(
            prompt=prompt_pb2.Prompt(
                prompt_id=f"q{n}", messages=[prompt_pb2.Message(role="user", content=content)]
            ),
            reference_json=reference,
        )
        for n in range(count)
    ]


class Context:
    """A call that its client gave up, or did not."""

    def __init__(self, *, cancelled: bool = False, remaining: float | None = None) -> None:
        self._cancelled = cancelled
        self._remaining = remaining

    def cancelled(self) -> bool:
        return self._cancelled

    def time_remaining(self) -> float | None:
        return self._remaining


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    broker = await Broker.open(tmp_path, limits=Limits())
    yield broker
    await broker.stop()


async def upload(
    broker: Broker, requests: Sequence[pb.CreatePromptSetRequest], context: Context | None = None
) -> Any:
    async def stream() -> AsyncIterator[pb.CreatePromptSetRequest]:
        for request in requests:
            yield request

    service = AdminService(broker)
    return await service.CreatePromptSet(stream(), context or Context())  # type: ignore[arg-type]


def message(entries: Iterable[prompt_pb2.PromptEntry], *, name: str = "", count: int = 0) -> Any:
    return pb.CreatePromptSetRequest(
        name=f"promptSets/{name}" if name else "", entries=entries, prompt_count=count
    )


@pytest.mark.parametrize("came", [0, 1, 3, 5, 6])
async def test_a_set_of_which_more_or_fewer_prompts_came_is_not_stored(broker: Broker, came: int) -> None:
    prompts = entries_of(came)
    with pytest.raises(InvalidPromptSetError, match="promised 4 prompts"):
        await upload(broker, [message(prompts[:2], name="s", count=4), message(prompts[2:])])
    assert broker.prompts.all() == []


async def test_a_set_that_came_whole_is_stored_and_named_by_its_canonical_bytes(broker: Broker) -> None:
    prompts = entries_of(10_000)
    response = await upload(
        broker, [message(prompts[:7], name="s", count=10_000), message(prompts[7:], name="s")]
    )
    body = records_pb2.PromptSetBody(entries=prompts).SerializeToString(deterministic=True)
    assert response.prompt_set.digest == hashlib.sha256(body).digest()
    assert response.prompt_set.prompt_count == 10_000


@pytest.mark.parametrize("context", [Context(cancelled=True), Context(remaining=0.0)])
async def test_a_whole_set_of_a_client_that_gave_up_is_not_stored(broker: Broker, context: Context) -> None:
    with pytest.raises(InvalidPromptSetError, match="given up"):
        await upload(broker, [message(entries_of(1), name="s", count=1)], context)
    assert broker.prompts.all() == []


async def test_a_later_message_cannot_name_another_set(broker: Broker) -> None:
    with pytest.raises(InvalidRequestError, match="promptSets/t"):
        await upload(broker, [message(entries_of(1), name="s", count=1), message([], name="t")])
    assert broker.prompts.all() == []


@pytest.mark.parametrize("count", [0, -1, 1_000_001])
async def test_a_promise_out_of_range_is_refused_at_once(broker: Broker, count: int) -> None:
    with pytest.raises(InvalidPromptSetError, match=r"at least one prompt|the limit is 1000000"):
        await upload(broker, [message(entries_of(1), name="s", count=count)])


@pytest.mark.parametrize("reference", ["[" * 100_000, '{"a":' * 100_000, "NaN", "-Infinity", "{", "[1] 2"])
async def test_a_reference_that_is_not_strict_json_is_refused(broker: Broker, reference: str) -> None:
    with pytest.raises(InvalidPromptSetError, match="not JSON") as caught:
        await broker.prompts.create("s", entries_of(1, reference=reference))
    assert caught.value.metadata["index"] == "0"
    assert len(str(caught.value)) < 300


async def test_storing_a_large_set_leaves_the_event_loop_running(broker: Broker) -> None:
    storing = asyncio.ensure_future(broker.prompts.create("s", entries_of(60_000)))
    turns = 0
    while not storing.done():
        await asyncio.sleep(0)
        turns += 1
    assert (await storing).prompt_ids[-1] == "q59999"
    assert turns > 20
