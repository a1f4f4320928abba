"""docs/verifiers.md says what the code does: its examples are cut from tested code, its names exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from hacrl_exchange.types import UnscoredKind, VerdictReason
from hacrl_verifiers.cli import worker
from hacrl_verifiers.registry import installed, load

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "verifiers.md").read_text()
EXAMPLE = re.compile(r"<!-- from (\S+): (\S+) -->\n```python\n(.*?)```", re.DOTALL)


def test_examples_are_cut_from_tested_code() -> None:
    examples = EXAMPLE.findall(PAGE)

    assert len(examples) == PAGE.count("```python")
    for path, mark, text in examples:
        source = (ROOT / path).read_text()
        cut = source.split(f"# -- start {mark} --\n")[1].split(f"# -- end {mark} --")[0]
        assert text.strip() == cut.strip()


@pytest.mark.parametrize("name", sorted(installed()))
def test_every_built_in_is_in_the_table_with_its_settings(name: str) -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
    settings = row.split("|")[4]

    assert re.findall(r"`(\w+)`", settings) == list(load(name).config)


def test_every_option_of_the_worker_is_explained() -> None:
    options = inspect.signature(worker).parameters

    assert [name for name in options if f"--{name.replace('_', '-')}" not in PAGE] == []


def test_every_reason_that_a_worker_gives_is_explained() -> None:
    given_by_workers = ("RAISED", "BAD_RESULT", "CRASHED", "ITEM_DEADLINE", "VERIFIER_UNAVAILABLE")

    assert all(VerdictReason[reason].name in PAGE for reason in given_by_workers)
    assert all(kind.name in PAGE for kind in UnscoredKind if kind is not UnscoredKind.UNSUPPORTED)
