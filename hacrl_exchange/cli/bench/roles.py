"""The parts of the benchmark that are processes of their own: publisher, worker, consumer.

Each uses the SDK as a stranger would. Times are of the monotonic clock, which all processes of a machine
share, so that phases with several of them can be measured.
"""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from hacrl_exchange.cli.bench.corpus import TOKENIZER_FINGERPRINT, Language, Shape, without_numbers
from hacrl_exchange.client import Exchange, JointBatch, OfferedVerifier, VerdictReport, WorkerClient, connect
from hacrl_exchange.errors import AlreadyVerifiedError, ExchangeError, StepNotFoundError
from hacrl_exchange.types import Group, PolicyVersion, Rollout, Scored, VerifierIdentity

VERIFIER = "bench-length"
"""Scores a text 1 if it is longer than 100 characters: as good as no work at all."""
_IDENTITY = VerifierIdentity(VERIFIER, "1", bytes(32))
_AGENT = "publisher"
_WORKER_THREADS = 2
_GROUPS_PER_LEASE = 64
_POLL_SECONDS = 0.005

Progress = Callable[[int], None]
"""Told how many rollouts are done."""


class Publisher:
    """An agent with groups in memory, made before the clock runs."""

    def __init__(self) -> None:
        self._language: Language | None = None
        self._groups: list[tuple[Rollout, ...]] = []

    def generate(
        self, *, groups: int, seed: int, rollouts: int, tokens: int, text_only: bool, progress: Progress
    ) -> dict[str, Any]:
        """Makes groups; forgets those from before.

        What was made is frozen for the garbage collector: a trainer does not hold thousands of groups, and
        would not pay for walking them again and again.
        """
        gc.unfreeze()
        self._language = self._language or Language()
        self._groups = []
        for group in self._language.groups(groups, seed=seed, shape=Shape(rollouts, tokens)):
            self._groups.append(without_numbers(group) if text_only else group)
            if len(self._groups) % 64 == 0:
                progress(len(self._groups) * rollouts)
        gc.collect()
        gc.freeze()
        return {}

    def publish(self, *, broker: str, pool: str, journal: str, progress: Progress) -> dict[str, Any]:
        """Publishes all groups, step by step, through the SDK."""
        waiting = iter(self._groups)
        receipts = tokens = wire_bytes = rollouts = 0
        call_seconds: list[float] = []
        with connect(broker) as exchange:
            agent = exchange.join(pool, agent=_AGENT, journal=Path(journal))
            began, cpu = time.monotonic(), time.process_time()
            with agent:
                version = PolicyVersion(agent.session, 0)
                for step in agent.steps(timeout_seconds=60):
                    report = agent.publish(
                        _group(prompt.prompt_id, next(waiting), version) for prompt in step.prompts
                    )
                    receipts += len(report.receipts)
                    rollouts += sum(receipt.rollout_count for receipt in report.receipts)
                    wire_bytes += report.wire_bytes
                    call_seconds += report.call_seconds
                    progress(rollouts)
                    if receipts >= len(self._groups):
                        break
                ended, cpu = time.monotonic(), time.process_time() - cpu
        tokens = sum(one.token_count for group in self._groups for one in group)
        self._groups = []
        return {
            "began": began,
            "ended": ended,
            "cpu_seconds": cpu,
            "rollouts": rollouts,
            "tokens": tokens,
            "wire_bytes": wire_bytes,
            "call_seconds": call_seconds,
        }


def _group(prompt_id: str, rollouts: tuple[Rollout, ...], version: PolicyVersion) -> Group:
    return Group(
        prompt_id=prompt_id,
        rollouts=rollouts,
        tokenizer_fingerprint=TOKENIZER_FINGERPRINT,
        policy_start=version,
        policy_end=version,
    )


class Worker:
    """Leases groups, scores texts by their length, reports. Two threads: one waits while one works."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done = 0
        self._last = 0.0

    def verify(self, *, broker: str, rollouts: int, progress: Progress) -> dict[str, Any]:
        """Works until so many rollouts have verdicts."""
        self._done = 0
        failures: list[BaseException] = []
        with WorkerClient(broker) as client:
            offered = [OfferedVerifier(VERIFIER, "1")]
            worker = client.register("bench", offered=offered).worker
            began, cpu = time.monotonic(), time.process_time()

            def work() -> None:
                try:
                    while self._done < rollouts:
                        self._turn(client, worker, progress)
                except BaseException as error:
                    failures.append(error)
                    self._done = rollouts

            threads = [threading.Thread(target=work) for _ in range(_WORKER_THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if failures:
            raise failures[0]
        cpu = time.process_time() - cpu
        return {"began": began, "ended": self._last, "cpu_seconds": cpu, "rollouts": rollouts}

    def _turn(self, client: WorkerClient, worker: str, progress: Progress) -> None:
        lease = client.acquire(worker, max_groups=_GROUPS_PER_LEASE, wait_seconds=0.2)
        if lease is None:
            return
        reports = [
            VerdictReport(
                group.name,
                group.generation,
                _IDENTITY,
                tuple(Scored(float(len(rollout.text) > 100)) for rollout in group.rollouts),
            )
            for group in lease.groups
        ]
        refusals = client.report(worker, lease=lease.lease, reports=reports)
        for refusal in refusals:
            if refusal is not None and not isinstance(refusal, AlreadyVerifiedError):
                raise refusal
        with self._lock:
            self._done += sum(
                group.rollout_count
                for group, refusal in zip(lease.groups, refusals, strict=True)
                if refusal is None
            )
            self._last = time.monotonic()
            progress(self._done)


class Consumer:
    """A reader that wants every verified group with text, tokens and log-probs."""

    def consume(self, *, broker: str, pool: str, steps: int, progress: Progress) -> dict[str, Any]:
        """Fetches, decodes and proves the joint batches of all steps."""
        rollouts = tokens = wire_bytes = 0
        with connect(broker) as exchange:
            began, cpu = time.monotonic(), time.process_time()
            for batch in _batches(exchange, pool, steps):
                for group in batch.groups:
                    rollouts += sum(isinstance(verdict, Scored) for verdict in group.verdicts)
                    tokens += sum(rollout.token_count for rollout in group.group.rollouts)
                wire_bytes += batch.wire_bytes
                progress(rollouts)
            ended, cpu = time.monotonic(), time.process_time() - cpu
        return {
            "began": began,
            "ended": ended,
            "cpu_seconds": cpu,
            "rollouts": rollouts,
            "tokens": tokens,
            "wire_bytes": wire_bytes,
        }

    def recount(
        self, *, broker: str, pools: dict[str, int], journals: list[str], progress: Progress
    ) -> dict[str, Any]:
        """Looks for every receipt of the journals among the groups that the broker delivers."""
        promised: dict[tuple[str, int, str, str], str] = {}
        for journal in journals:
            for line in Path(journal).read_text(encoding="utf-8").splitlines():
                one = json.loads(line)
                promised[one["pool"], one["step"], one["prompt_id"], one["agent"]] = one["digest"]
        found = 0
        with connect(broker) as exchange:
            for pool, steps in pools.items():
                for batch in _batches(exchange, pool, steps):
                    for group in batch.groups:
                        slot = (pool, batch.step, group.group.prompt_id, group.agent)
                        found += promised.get(slot) == group.digest.hex()
                    progress(found)
        return {"receipts": len(promised), "recovered": found}


def _batches(exchange: Exchange, pool: str, steps: int) -> Iterator[JointBatch]:
    step = 1
    while step <= steps:
        try:
            yield exchange.replay(pool, step)
            step += 1
        except StepNotFoundError:
            time.sleep(_POLL_SECONDS)


def serve(lines: Iterator[str], *, answer: Callable[[dict[str, Any]], None]) -> None:
    """Does what each line asks, a JSON object with "role", "do" and arguments, until there are no more.

    Answers progress as {"progress": n} and the end as {"done": {...}} or {"failed": "..."}.
    """
    roles = {"publisher": Publisher(), "worker": Worker(), "consumer": Consumer()}
    for line in lines:
        asked = json.loads(line)
        role, verb = roles[asked.pop("role")], asked.pop("do")
        try:
            result = getattr(role, verb)(**asked, progress=lambda done: answer({"progress": done}))
        except (ExchangeError, OSError, TimeoutError) as error:
            answer({"failed": str(error)})
        else:
            answer({"done": result})


def main() -> None:
    """The body of a role's process: lines in on stdin, lines out on stdout."""
    import sys

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), flush=True)

    gc.freeze()  # what is imported by now stays
    with closing(sys.stdin) as lines:
        serve(iter(lines), answer=answer)


if __name__ == "__main__":
    main()
