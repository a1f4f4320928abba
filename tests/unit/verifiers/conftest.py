"""A pool over the sample verifiers, and a way to wait for processes without sleeping."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from hacrl_exchange.types import Message, Prompt
from hacrl_verifiers.isolation import Job, Limits, Pool, Responses
from hacrl_verifiers.results import Judgement

SAMPLES = (
    "equal",
    "returns",
    "same_length",
    "hostile",
    "environment",
    "spoils",
    "sees",
    "KnownWords",
    "HostileBatch",
    "ShortBatch",
    "BadSetup",
    "DyingSetup",
)
PROMPT = Prompt("p1", (Message("user", "What is 2 + 2?"),), "arithmetic")

Judge = Callable[..., list[Judgement]]


@pytest.fixture(scope="session")
def sample_specs() -> list[str]:
    return [f"sample_verifiers:{name}" for name in SAMPLES]


@pytest.fixture(scope="module")
def pool(sample_specs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("SAMPLE_PIDS", str(tmp_path_factory.mktemp("pids") / "pids"))
        patch.setenv("HACRL_WORKER_KEY", "secret")
        with Pool(sample_specs, slots=2, limits=Limits(memory_bytes=1 << 30)) as made:
            yield made


@pytest.fixture
def judge(pool: Pool) -> Judge:
    """Runs texts, in groups of 8, through slot 0."""

    def run(
        verifier: str,
        texts: Sequence[str],
        *,
        reference: str = "null",
        config: str = "{}",
        deadline: float = 5.0,
        tokens: Sequence[Sequence[int]] = (),
    ) -> list[Judgement]:
        groups = tuple(
            Responses(PROMPT, reference, tuple(texts[n : n + 8]), tuple(tokens[n : n + 8]))
            for n in range(0, len(texts), 8)
        )
        return pool.slots[0].run(Job(verifier, config, deadline, groups))

    return run


@pytest.fixture(scope="session")
def await_death() -> Callable[[int], bool]:
    """Waits until a process has ended; False if it still lives after 10 s."""

    def wait(pid: int) -> bool:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            return bool(select.select([descriptor], [], [], 10.0)[0])
        finally:
            os.close(descriptor)

    return wait
