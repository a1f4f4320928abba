"""The loop of a forked child: takes jobs, runs a verifier on each item, streams the results.

The code under test runs in this process and may do anything to it. What this file can promise is only that
an honest child reports honestly; isolation.py judges everything else from outside, and kills.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any, NoReturn, TypeAlias

from hacrl_exchange.types import Message, Prompt, VerdictReason
from hacrl_verifiers import _frames
from hacrl_verifiers._progress import PREPARING, Progress
from hacrl_verifiers.api import BatchCheck, ConfigError, Item, Verifier
from hacrl_verifiers.results import BadResultError, Judgement, clipped, failed, judge, to_wire

# Results wait at most this long for company, so that a death costs little to repeat.
_FLUSH_SECONDS = 0.005
_FLUSH_COUNT = 100
_OUT_OF_MEMORY_EXIT = 70

_Wire: TypeAlias = float | list[object]
_Run: TypeAlias = Callable[[Sequence[Item]], list[_Wire]]


def serve(connection: socket.socket, progress: Progress, verifiers: Mapping[str, Verifier]) -> NoReturn:
    """Answers jobs until the supervisor closes the connection. Never returns, never raises."""
    try:
        _serve(connection, progress, verifiers)
    except BaseException:  # the supervisor sees the connection end and knows which item ran
        os._exit(1)
    os._exit(0)


def _serve(connection: socket.socket, progress: Progress, verifiers: Mapping[str, Verifier]) -> None:
    me = os.getpid()
    reader = _frames.FrameReader(_frames.MAX_JOB_BYTES)
    prepared: dict[tuple[str, str], tuple[_Run, int]] = {}
    while (message := _frames.receive(connection, reader)) is not None:
        job: Any = message
        number, name, config_json, single, groups = job
        progress.mark(PREPARING, 0)
        key = (name, config_json)
        if key not in prepared:
            try:
                prepared[key] = _prepare(verifiers[name], config_json)
            except MemoryError:
                raise
            except BaseException as error:
                connection.sendall(_frames.encode([number, "refused", _refusal(error)]))
                continue
        run, chunk = prepared[key]
        _run_job(connection, progress, number, run, 1 if single else chunk, single, _items(groups), me)


def _run_job(
    connection: socket.socket,
    progress: Progress,
    number: int,
    run: _Run,
    chunk: int,
    single: bool,
    items: Iterator[Item],
    me: int,
) -> None:
    """Runs the items in chunks. `single` sends each result before the next item starts."""
    results: list[_Wire] = []
    first = done = 0
    flushed = monotonic()
    while batch := _take(items, chunk):
        progress.mark(done, len(batch))
        results += run(batch)
        if os.getpid() != me:
            os._exit(0)  # the verifier forked and came back twice: one of us answers
        signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm left behind would hit the next item
        done += len(batch)
        if single or len(results) >= _FLUSH_COUNT or monotonic() - flushed > _FLUSH_SECONDS:
            connection.sendall(_frames.encode([number, first, results]))
            results, first, flushed = [], done, monotonic()
    if results:
        connection.sendall(_frames.encode([number, first, results]))


def _prepare(verifier: Verifier, config_json: str) -> tuple[_Run, int]:
    settings = verifier.settings(config_json)
    if verifier.check is None:
        return _batch_runner(verifier.prepared(settings)), max(1, verifier.batch_size)
    return _single_runner(verifier, settings), 1


def _single_runner(verifier: Verifier, settings: Mapping[str, Any]) -> _Run:
    check, keywords = verifier.check, verifier.keywords
    assert check is not None

    def run(batch: Sequence[Item]) -> list[_Wire]:
        item = batch[0]
        given: dict[str, Any] = {}
        if "prompt" in keywords:
            given["prompt"] = item.prompt
        if "config" in keywords:
            given["config"] = settings
        if "item" in keywords:
            given["item"] = item
        try:
            return [_wire(check(item.response, item.reference, **given))]
        except MemoryError:
            os._exit(_OUT_OF_MEMORY_EXIT)
        except BaseException as error:
            return [_failure(error)]

    return run


def _batch_runner(instance: BatchCheck) -> _Run:
    def run(batch: Sequence[Item]) -> list[_Wire]:
        try:
            returned: object = instance.verify(batch)
            if not isinstance(returned, Sequence) or isinstance(returned, str) or len(returned) != len(batch):
                raise BadResultError(f"The verifier must return a sequence of {len(batch)} results.")
            return [_wire_or_failure(result) for result in returned]
        except MemoryError:
            os._exit(_OUT_OF_MEMORY_EXIT)
        except BaseException as error:
            if len(batch) == 1:
                return [_failure(error)]
            # One item spoils a batch: the others must not pay for it.
            return [wire for item in batch for wire in run([item])]

    return run


def _wire_or_failure(result: object) -> _Wire:
    try:
        return _wire(result)
    except BadResultError as error:
        return _failure(error)


def _wire(result: object) -> _Wire:
    if type(result) is float and math.isfinite(result):
        return result
    return to_wire(Judgement(judge(result)))


def _failure(error: BaseException) -> _Wire:
    reason = VerdictReason.BAD_RESULT if isinstance(error, BadResultError) else VerdictReason.RAISED
    return to_wire(failed(reason, _described(error)))


def _refusal(error: BaseException) -> str:
    return str(error) if isinstance(error, ConfigError) else _described(error)


def _described(error: BaseException) -> str:
    try:
        text = f"{type(error).__name__}: {error}"
        frames = traceback.extract_tb(error.__traceback__)
        if frames:
            text = f"{clipped(text)[:1800]} ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"
        return clipped(text)
    except BaseException:  # __str__ of a stranger's exception
        return "The verifier raised an exception that cannot be shown."


def _take(items: Iterator[Item], count: int) -> list[Item]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == count:
            break
    return batch


def _items(groups: list[Any]) -> Iterator[Item]:
    for prompt_id, source, messages, reference_json, texts, tokens in groups:
        prompt = Prompt(prompt_id, tuple(Message(role, content) for role, content in messages), source)
        reference = json.loads(reference_json or "null")
        for position, text in enumerate(texts):
            if position and isinstance(reference, dict | list):
                reference = json.loads(reference_json)  # a scorer may have changed its copy
            yield Item(text, reference, prompt, tokens[position] if tokens else None)
